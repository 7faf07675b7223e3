"""What the tests of clipping, of the extras of a step and of averages share: oracles, and optimizers that are alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pyopt
import reference
from all_optimizers import TABLE, bits, params_of, random, values

MATRICES = [(pyopt.Adafactor, {}), (pyopt.Muon, {"lr": 0.1}), (pyopt.MuonAdamW, {})]
SUMMING = [(pyopt.LAMB, {"lr": 0.1}), (pyopt.LARS, {"lr": 0.1}), (pyopt.Prodigy, {"d0": 1e-2})]
EVERY = [row[:2] for row in TABLE] + SUMMING + MATRICES
IDS = ["-".join([cls.__name__, *options]) for cls, options in EVERY]
every = pytest.mark.parametrize("cls, options", EVERY, ids=IDS)
# One with compiled rule and much state, one with sums, one of matrices, one in NumPy.
FEW = [EVERY[i] for i in (5, 32, 35, 31)]
few = pytest.mark.parametrize("cls, options", FEW, ids=[cls.__name__ for cls, _ in FEW])
SHAPES = [(3, 4), (5,), (0, 3), (), (40, 50)]
BAD = [math.nan, math.inf, -math.inf]


# --- oracles ----------------------------------------------------------------------------------------------------------


def exact_norm(arrays: Any, p: float = 2.0) -> float:
    """The p-norm of all elements together, in float64: scaled by the largest, summed without rounding."""
    x = np.concatenate([np.abs(np.asarray(a, np.float64)).ravel() for a in arrays if a is not None] or [np.zeros(0)])
    if not x.size or np.isnan(x).any():
        return math.nan if x.size else 0.0
    largest = float(x.max())
    if p == math.inf or largest in (0.0, math.inf):
        return largest
    return largest * math.fsum(((x / largest) ** p).tolist()) ** (1 / p)


def clip_factor(max_norm: float, norm: float) -> float:
    """torch's: min(1, max_norm / (norm + 1e-6)), and NaN of a NaN."""
    return norm if math.isnan(norm) else min(1.0, max_norm / (norm + 1e-6))


def scaled(g: Any, factor: float) -> Any:
    """The gradient times the factor, in its own dtype."""
    with np.errstate(invalid="ignore"):
        return None if g is None else np.asarray(g * g.dtype.type(factor))


class Mean:
    """An average after the fact: an EMA by its decay, warmup and every, an SWA by its start and every.

    average + w * (p - average), w as a number of the array's dtype; or, where `nearer`, that of torch.lerp, which
    measures from the nearer end. Both are the formula in the interface.
    """

    def __init__(
        self, kind: str, nearer: bool, decay: float = 0.999, warmup: float = 0, every: int = 1, start: int = 0
    ):
        self.kind, self.nearer, self.decay, self.warmup, self.every, self.start = (
            kind,
            nearer,
            decay,
            warmup,
            every,
            start,
        )
        self.n = self.steps = 0
        self.averages: list[Any] = []

    def weight(self) -> float:
        if self.kind == "SWA":
            return 1 / (self.n + 1)
        return 1 - (min(self.decay, (1 + self.n) / (self.warmup + self.n)) if self.warmup > 0 else self.decay)

    def follow(self, arrays: list[Any]) -> None:
        """A step was taken, and these are the parameters now; one that is new is copied."""
        self.steps += 1
        if self.steps % self.every or self.steps < self.start:
            return
        w = self.weight() if self.n else 1.0
        for i, p in enumerate(arrays):
            if self.n == 0 or i >= len(self.averages):
                self.averages[i : i + 1] = [p.copy()]
            else:
                a = self.averages[i]
                self.averages[i] = np.asarray(reference.lerp(a, p, w) if self.nearer else a + p.dtype.type(w) * (p - a))
        self.n += 1


class Beside:
    """Both forms of the oracle beside an average, one of which it must be in all its updates."""

    def __init__(self, average: Any, kind: str, **options: Any) -> None:
        self.average = average
        self.forms = [Mean(kind, nearer, **options) for nearer in (False, True)]

    def follow(self, arrays: list[Any]) -> None:
        for form in self.forms:
            form.follow(arrays)

    def check(self, as_array: Any = np.asarray) -> None:
        assert self.average.n_averaged == self.forms[0].n
        if self.forms[0].n:
            found = [bits(as_array(a)) for a in self.average.averages[: len(self.forms[0].averages)]]
            expected = [[bits(a) for a in form.averages] for form in self.forms]
            assert found in expected, "the average is not the formula's"


# --- optimizers that are alike ----------------------------------------------------------------------------------------


def alike(cls: Any, options: Any, n: int = 2, dtype: str = "float32", steps: int = 2, seed: int = 0) -> list[Any]:
    """Optimizers with the same numbers, of two groups, after the same steps, with the same gradients."""
    shapes = [(3, 4), (0, 3), (4, 2), (40, 50)] if cls is pyopt.Muon else SHAPES
    opts = []
    for _ in range(n):
        params = [pyopt.Parameter(random(shape, dtype, seed + i)) for i, shape in enumerate(shapes)]
        opts.append(cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], **options))
    for step in range(steps):
        set_gradients(*opts, seed=1000 + step)
        for opt in opts:
            opt.step()
    set_gradients(*opts, seed=2000)
    return opts


def set_gradients(*opts: Any, seed: int = 0, scale: float = 1.0) -> None:
    for opt in opts:
        for i, p in enumerate(params_of(opt)):
            p.grad = np.asarray(random(p.shape, p.dtype, 100 * seed + i) * p.dtype.type(scale))


def gradients(opt: Any) -> list[Any]:
    return [p.grad for p in params_of(opt)]


def gradient_bits(opt: Any) -> list[Any]:
    return [None if g is None else bits(np.asarray(g)) for g in gradients(opt)]


def numbers(opt: Any) -> Any:
    """All that a step may change in an optimizer, in bits: parameters, state and the numbers of its groups."""
    return values(opt), [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


def average_numbers(*averages: Any) -> Any:
    """All of an average, in bits."""
    saved = [average.state_dict() for average in averages]
    return [{**s, "averages": [bits(np.asarray(a)) for a in s["averages"]]} for s in saved]


def cleared(g: Any) -> bool:
    """Zeros, none of them negative."""
    return bits(np.asarray(g)) == bits(np.zeros_like(np.asarray(g)))


def raises_and_changes_nothing(action: Any, state: Any, errors: Any, match: str) -> None:
    """It raises, and what `state` returns is as before."""
    before = state()
    with pytest.raises(errors, match=match):
        action()
    assert state() == before, "it raised, and something has changed"
