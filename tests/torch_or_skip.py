"""torch, or skip: what every test against torch imports first; and what the tests of pyopt.torch share.

PYOPT_REQUIRE_TORCH=1 makes a missing torch an error.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

if os.environ.get("PYOPT_REQUIRE_TORCH") == "1":
    import torch
else:
    torch = pytest.importorskip("torch", reason="torch is not installed; PYOPT_REQUIRE_TORCH=1 makes this an error")

import pyopt.torch as optim  # needs torch

FIVE = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"]
ELEVEN = [*FIVE, "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"]
MATRICES = ["Adafactor", "Muon"]
# One row per optimizer and set of state arrays.
BRIEF = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr": 0.1}),
]
BRIEF_IDS = ["-".join([name, *options]) for name, options in BRIEF]
DTYPES = [torch.float32, torch.float64]
brief = pytest.mark.parametrize(("name", "options"), BRIEF, ids=BRIEF_IDS)
each = pytest.mark.parametrize("name", FIVE)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# What may differ per step, up to ten steps, in ulps of the largest value that the element has had: the order of
# operations is the same, but torch contracts to FMA and its square root is not IEEE's.
ULPS = 6


def in_ulps(actual: Any, expected: Any, largest: Any) -> float:
    """The largest distance of two tensors, in ulps of the largest magnitude that each element has had."""
    actual, expected, largest = (x.detach().resolve_neg().numpy() for x in (actual, expected, largest))
    distance = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    return float((distance / np.spacing(np.maximum(largest, np.finfo(expected.dtype).tiny))).max(initial=0))


def bits(tensor: Any) -> Any:
    """The elements of a tensor of any dtype as integers, NaNs and signs of zeros included."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.detach().resolve_neg().resolve_conj()
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def new(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def new_parameters(*shapes: tuple[int, ...], dtype: Any = torch.float32) -> list[Any]:
    return [torch.nn.Parameter(new(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]


def small() -> list[Any]:
    return new_parameters((5, 4), (7,), ())


def parameters(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def random_gradients(optimizer: Any, generator: Any) -> list[Any]:
    """A gradient per parameter over many orders of magnitude, none zero, and without cancellation in the decay."""
    result = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            value = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            value *= 10 ** (torch.rand(p.shape, generator=generator, dtype=torch.float64) * 4 - 3)
            if group.get("weight_decay"):
                value = value.copysign(p.detach().double() * (-1 if group["maximize"] else 1))
            result.append(value.to(p.dtype))
    return result


def outcome(run: Callable[[], Any]) -> Any:
    """What a call comes to: its value, or the type and message of its exception."""
    try:
        return run()
    except Exception as error:
        return type(error), str(error)


def assert_same_layout(actual: Any, expected: Any, where: str = "state_dict", but: Iterable[str] = ()) -> None:
    """The same keys in the same order, types, and dtypes and shapes of tensors; other values equal, except of keys
    in `but`."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in set(expected) - set(but):
            assert_same_layout(actual[key], expected[key], f"{where}[{key!r}]", but)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same_layout(*pair, f"{where}[{i}]", but)
    elif isinstance(expected, torch.Tensor):
        for name in ("dtype", "shape", "device", "layout", "requires_grad"):
            assert getattr(actual, name) == getattr(expected, name), f"{where}.{name}"
    else:
        assert actual == expected, where


def assert_formula_is_the_kernels(ours: Any, theirs: Any, gradients: Callable[[list[Any], int], None]) -> None:
    """Step by step: of two optimizers one by the kernel, one by torch's operations; the gradients' factor counts."""
    for step in range(12):
        for optimizer in (ours, theirs):
            gradients(parameters(optimizer), step)
        ours.step()
        for p in parameters(theirs):
            p.grad *= 4
        theirs._step_by_torch([(0, p) for p in parameters(theirs)], 0.25)
        for p, q in zip(parameters(ours), parameters(theirs), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-11, atol=1e-13)
            assert list(ours.state[p]) == list(theirs.state[q])
            for name, value in ours.state[p].items():
                torch.testing.assert_close(theirs.state[q][name], value, rtol=1e-11, atol=1e-13)


class Twins:
    """An optimizer of pyopt.torch and torch's of the same name, on parameters of the same values.

    Args:
        name: of the class.
        build: called once for each of the two, returns what the constructor takes as params.
        options: of the constructor.
        oracle: of torch's constructor, where they differ.
    """

    def __init__(self, name: str, build: Callable[[], Any], options: Any = None, oracle: Any = None) -> None:
        options = options or {}
        self.ours = getattr(optim, name)(build(), **copy.deepcopy(options))
        self.theirs = getattr(torch.optim, name)(build(), **copy.deepcopy(options if oracle is None else oracle))
        self.steps = 0
        self.largest: dict[tuple[int, str], Any] = {}
        self._remember()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ours, self.theirs))

    def pairs(self) -> list[tuple[Any, Any]]:
        return list(zip(parameters(self.ours), parameters(self.theirs), strict=True))

    def _tensors(self) -> Iterator[tuple[int, str, Any, Any]]:
        for i, (p, q) in enumerate(self.pairs()):
            yield i, "parameter", p, q
            for name, value in self.theirs.state.get(q, {}).items():
                if name != "step" and value is not None:
                    yield i, name, self.ours.state[p][name], value

    def _remember(self) -> None:
        for i, name, _, expected in self._tensors():
            now = expected.detach().abs()
            before = self.largest.get((i, name), self.largest.get((i, "parameter")) if name == "ax" else None)
            # An element's history is lost where somebody rebinds the parameter.
            ok = before is not None and before.shape == now.shape and before.dtype == now.dtype
            self.largest[i, name] = torch.maximum(before, now) if ok else now

    def step(self, grads: Iterable[Any] | None = None, *, check: bool = True) -> None:
        """Set the gradients, the same tensors on both sides, step both and compare."""
        if grads is not None:
            grads = list(grads)
            for pair, g in zip(self.pairs(), grads, strict=True):
                for p in pair:
                    p.grad = g
            before = [None if g is None else g.clone() for g in grads]
        self.ours.step()
        self.theirs.step()
        self.steps += 1
        if grads is not None:
            for g, b in zip(grads, before, strict=True):
                assert g is None or same_bits(g, b), "a gradient was written"
        if check:
            self.check()

    def run(self, steps: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            self.step(random_gradients(self.theirs, generator))

    def check(self, ulps: float | None = None) -> None:
        """Compare parameters and state, element by element."""
        self._remember()
        ulps = ULPS * min(max(self.steps, 1), 10) if ulps is None else ulps
        for p, q in self.pairs():
            ours, theirs = self.ours.state.get(p, {}), self.theirs.state.get(q, {})
            assert list(ours) == list(theirs), "other state than torch's"
            if isinstance(theirs.get("step"), torch.Tensor):
                assert ours["step"].dtype == theirs["step"].dtype and ours["step"].shape == theirs["step"].shape
                assert ours["step"].item() == theirs["step"].item()
        for i, name, actual, expected in self._tensors():
            what = f"{name} of parameter {i} after {self.steps} steps"
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
            if expected.dtype in (torch.float32, torch.float64) and type(expected) in (
                torch.Tensor,
                torch.nn.Parameter,
            ):
                error = in_ulps(actual, expected, self.largest[i, name])
                assert error <= ulps, f"{what} is {error} ulps off, must be at most {ulps}"
            else:
                assert same_bits(actual, expected), what
