"""The table that drives the tests: every optimizer with every combination of its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

import pyopt
import reference


@dataclass(frozen=True)
class Case:
    optimizer: type[pyopt.Optimizer]
    reference: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def sums(self) -> bool:
        """Whether the rule has numbers that follow from sums over whole tensors."""
        return self.optimizer in SUMMING or not self.options.keys().isdisjoint({"update_clip", "cautious"})

    @property
    def joint(self) -> bool:
        """Whether the sums go over all tensors together: the reference then takes all of them."""
        return bool(self.optimizer.shared_numbers)

    def step(self, params: list[tuple[Any, Any]], grads: list[Any], group: dict[str, Any]) -> Any:
        """The reference's step of all (parameter, state) that have a gradient, and the new shared numbers."""
        there = [i for i, g in enumerate(grads) if g is not None]
        result = list(params)
        if self.joint:
            if not there:
                return result, {}
            after, shared = self.reference([params[i] for i in there], [grads[i] for i in there], [group] * len(there))
        else:
            after, shared = [self.reference(params[i][0], grads[i], params[i][1], group) for i in there], {}
        for i, each in zip(there, after, strict=True):
            result[i] = each
        return result, shared

    def __str__(self) -> str:
        return "-".join([self.optimizer.__name__, *(f"{k}={v}" for k, v in self.options.items())]).replace(" ", "")


def combinations(optimizer: type[pyopt.Optimizer], oracle: Callable[..., Any], **choices: list[Any]) -> list[Case]:
    """A case per combination; a choice of None leaves the option at its default."""
    return [
        Case(optimizer, oracle, {k: v for k, v in zip(choices, values, strict=True) if v is not None})
        for values in product(*choices.values())
    ]


SUMMING = (pyopt.LAMB, pyopt.LARS, pyopt.Prodigy)
MAXIMIZE = [None, True]
DECAY = [None, 0.1]

CASES = [
    *combinations(pyopt.SGD, reference.sgd, weight_decay=DECAY, maximize=MAXIMIZE, lr=[0.1]),
    *combinations(
        pyopt.SGD, reference.sgd, momentum=[0.9], dampening=[None, 0.5], weight_decay=DECAY, maximize=MAXIMIZE
    ),
    *combinations(pyopt.SGD, reference.sgd, momentum=[0.9], nesterov=[True], weight_decay=DECAY, maximize=MAXIMIZE),
    *combinations(pyopt.Lion, reference.lion, weight_decay=DECAY, maximize=MAXIMIZE, betas=[None, (0.5, 0.75)]),
    *combinations(
        pyopt.Adagrad,
        reference.adagrad,
        lr_decay=[None, 0.1],
        initial_accumulator_value=[None, 0.5],
        weight_decay=DECAY,
        maximize=MAXIMIZE,
    ),
    *combinations(
        pyopt.RMSprop,
        reference.rmsprop,
        centered=[None, True],
        momentum=[None, 0.9],
        weight_decay=DECAY,
        maximize=MAXIMIZE,
        alpha=[None, 0.4],
    ),
    *combinations(
        pyopt.Adam,
        reference.adam,
        amsgrad=[None, True],
        weight_decay=DECAY,
        decoupled_weight_decay=[None, True],
        maximize=MAXIMIZE,
        betas=[None, (0.2, 0.9)],
    ),
    *combinations(pyopt.AdamW, reference.adam, amsgrad=[None, True], maximize=MAXIMIZE, eps=[None, 1e-3]),
    *combinations(
        pyopt.Adam,
        reference.adam,
        amsgrad=[None, True],
        weight_decay=DECAY,
        decoupled_weight_decay=[None, True],
        update_clip=[True],
        cautious=[None, True],
        betas=[None, (0.2, 0.9)],
    ),
    *combinations(
        pyopt.Adam,
        reference.adam,
        amsgrad=[None, True],
        weight_decay=DECAY,
        maximize=MAXIMIZE,
        cautious=[True],
        betas=[None, (0.2, 0.9)],
    ),
    *combinations(pyopt.AdamW, reference.adam, update_clip=[None, True], cautious=[True], maximize=MAXIMIZE),
    *combinations(
        pyopt.LAMB,
        reference.lamb,
        betas=[None, (0.2, 0.9)],
        weight_decay=DECAY,
        trust_ratio=[None, False],
        maximize=MAXIMIZE,
    ),
    *combinations(
        pyopt.LARS,
        reference.lars,
        momentum=[None, 0],
        nesterov=[None, True],
        weight_decay=DECAY,
        trust_coefficient=[None, 0.1],
        trust_ratio=[None, False],
        maximize=MAXIMIZE,
    ),
    *combinations(
        pyopt.Prodigy,
        reference.prodigy,
        betas=[None, (0.2, 0.9)],
        beta3=[None, 0.5],
        weight_decay=DECAY,
        decoupled_weight_decay=[None, False],
        bias_correction=[None, True],
        safeguard_warmup=[None, True],
        d0=[None, 1e-2],
        maximize=MAXIMIZE,
    ),
    *combinations(pyopt.Adadelta, reference.adadelta, rho=[None, 0.5], weight_decay=DECAY, maximize=MAXIMIZE),
    *combinations(
        pyopt.Adamax,
        reference.adamax,
        betas=[None, (0.2, 0.9)],
        weight_decay=DECAY,
        maximize=MAXIMIZE,
        eps=[None, 1e-3],
    ),
    *combinations(
        pyopt.NAdam,
        reference.nadam,
        weight_decay=DECAY,
        decoupled_weight_decay=[None, True],
        maximize=MAXIMIZE,
        betas=[None, (0.2, 0.9)],
        momentum_decay=[None, 0.1],
    ),
    *combinations(
        pyopt.RAdam,
        reference.radam,
        weight_decay=DECAY,
        decoupled_weight_decay=[None, True],
        maximize=MAXIMIZE,
        betas=[None, (0.2, 0.9), (0.9, 0.5)],
    ),
    *combinations(
        pyopt.ASGD,
        reference.asgd,
        lambd=[None, 0.1],
        alpha=[None, 0.5],
        t0=[None, 3],
        weight_decay=DECAY,
        maximize=MAXIMIZE,
    ),
    *combinations(
        pyopt.Rprop, reference.rprop, etas=[None, (0.3, 2)], step_sizes=[None, (5e-3, 0.02)], maximize=MAXIMIZE
    ),
    *combinations(
        pyopt.AdaBelief,
        reference.adabelief,
        weight_decay=DECAY,
        decoupled_weight_decay=[None, False],
        maximize=MAXIMIZE,
        betas=[None, (0.2, 0.9)],
        eps=[None, 1e-8],
    ),
    *combinations(
        pyopt.ADOPT,
        reference.adopt,
        weight_decay=DECAY,
        decoupled_weight_decay=[None, True],
        maximize=MAXIMIZE,
        betas=[None, (0.2, 0.9)],
    ),
    *combinations(
        pyopt.AdEMAMix,
        reference.ademamix,
        weight_decay=DECAY,
        maximize=MAXIMIZE,
        betas=[None, (0.2, 0.9, 0.95)],
        beta3_warmup=[None, 8],
        alpha_warmup=[None, 5],
    ),
    *combinations(
        pyopt.Adan,
        reference.adan,
        weight_decay=[None, 0],
        maximize=MAXIMIZE,
        betas=[None, (0.2, 0.3, 0.9)],
        eps=[None, 1e-3],
    ),
    *combinations(
        pyopt.FTRL,
        reference.ftrl,
        l1=[None, 2],
        l2=[None, 0.5],
        beta=[None, 1],
        initial_accumulator_value=[None, 0],
        maximize=MAXIMIZE,
    ),
    *combinations(
        pyopt.RowwiseAdagrad,
        reference.rowwise_adagrad,
        eps=[None, 1e-2],
        weight_decay=DECAY,
        decoupled_weight_decay=[None, True],
        initial_accumulator_value=[None, 0.5],
        maximize=MAXIMIZE,
    ),
    *combinations(
        pyopt.SGDScheduleFree,
        reference.sgd_schedule_free,
        lr=[0.1],
        momentum=[None, 0.3],
        weight_decay=DECAY,
        warmup_steps=[None, 4],
        r=[None, 1.5],
        maximize=MAXIMIZE,
    ),
    *combinations(
        pyopt.AdamWScheduleFree,
        reference.adamw_schedule_free,
        betas=[None, (0.3, 0.9)],
        weight_decay=DECAY,
        warmup_steps=[None, 4],
        weight_lr_power=[None, 1],
        maximize=MAXIMIZE,
    ),
]

# One case per optimizer and set of streams, for what does not depend on the other options.
BRIEF = [
    Case(pyopt.SGD, reference.sgd),
    Case(pyopt.SGD, reference.sgd, {"momentum": 0.9, "nesterov": True}),
    Case(pyopt.Lion, reference.lion, {"weight_decay": 0.1}),
    Case(pyopt.Adagrad, reference.adagrad),
    Case(pyopt.RMSprop, reference.rmsprop),
    Case(pyopt.RMSprop, reference.rmsprop, {"momentum": 0.9, "centered": True}),
    Case(pyopt.Adam, reference.adam, {"weight_decay": 0.1}),
    Case(pyopt.Adam, reference.adam, {"amsgrad": True}),
    Case(pyopt.AdamW, reference.adam),
    Case(pyopt.AdamW, reference.adam, {"update_clip": True}),
    Case(pyopt.AdamW, reference.adam, {"cautious": True, "amsgrad": True}),
    Case(pyopt.LAMB, reference.lamb, {"weight_decay": 0.1}),
    Case(pyopt.LARS, reference.lars, {"weight_decay": 0.1}),
    Case(pyopt.Prodigy, reference.prodigy, {"weight_decay": 0.1, "d0": 1e-3}),
    Case(pyopt.Adadelta, reference.adadelta),
    Case(pyopt.Adamax, reference.adamax),
    Case(pyopt.NAdam, reference.nadam),
    Case(pyopt.RAdam, reference.radam, {"betas": (0.9, 0.5)}),
    Case(pyopt.RAdam, reference.radam),
    Case(pyopt.ASGD, reference.asgd, {"t0": 1}),
    Case(pyopt.Rprop, reference.rprop),
    Case(pyopt.AdaBelief, reference.adabelief, {"weight_decay": 0.1}),
    Case(pyopt.ADOPT, reference.adopt),
    Case(pyopt.AdEMAMix, reference.ademamix),
    Case(pyopt.Adan, reference.adan),
    Case(pyopt.FTRL, reference.ftrl, {"l1": 0.1}),
    Case(pyopt.RowwiseAdagrad, reference.rowwise_adagrad, {"weight_decay": 0.1}),
    Case(pyopt.SGDScheduleFree, reference.sgd_schedule_free, {"weight_decay": 0.1}),
    Case(pyopt.AdamWScheduleFree, reference.adamw_schedule_free, {"weight_decay": 0.1}),
]

DTYPES = [np.float32, np.float64]

# 0, 1, every width of a vector in elements minus and plus one, whole lines of the cut, blocks of sums, several parts.
WIDTHS = sorted({max(0, k * w + d) for w in (1, 2, 4, 8, 16, 32, 64) for k in (1, 3) for d in (-1, 0, 1)})
SIZES = [*WIDTHS, 1023, 1024, 1025, 2048, 3000, 16383, 16384, 16385, 40_000, 70_001]


def parameters(shapes: list[Any], dtype: Any, seed: int = 0) -> list[pyopt.Parameter]:
    rng = np.random.default_rng(seed)
    return [pyopt.Parameter(np.asarray(rng.standard_normal(shape), dtype)) for shape in shapes]


def gradients(params: list[pyopt.Parameter], rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """Gradients over many orders of magnitude, none of them zero."""
    return [
        np.asarray(rng.standard_normal(p.data.shape) * 10.0 ** rng.uniform(-4, 2, p.data.shape), p.data.dtype)
        for p in params
    ]


def assert_same_bits(actual: Any, expected: Any, what: str) -> None:
    """Equal element by element in bits, so that 0.0 and -0.0 differ and NaNs count."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    bits = f"u{actual.dtype.itemsize}"
    wrong = (np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)).reshape(actual.shape)
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {wrong.size} elements differ, the first at {np.argwhere(wrong)[0]}: "
        f"{actual[wrong].flat[0]!r}, must be {expected[wrong].flat[0]!r}"
    )
