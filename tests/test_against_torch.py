"""Every case that torch has against torch.optim, for-loop and fused: ulps per element after 1, 2 and 50 steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pyopt
from cases import CASES, DTYPES, Case, gradients, parameters
from torch_or_skip import torch

SHAPES = [(), (1,), (17,), (33, 31), (4099,)]
# What may differ after so many steps, in ulps of the largest value that the element has had: torch contracts to FMA,
# and its for-loop has a square root of its own.
ULPS = {1: 6, 2: 12, 50: 100}
FUSED = [pyopt.SGD, pyopt.Adagrad, pyopt.Adam, pyopt.AdamW]
TORCH_CASES = [case for case in CASES if hasattr(torch.optim, case.optimizer.__name__) and not case.sums]


def ulps(actual: Any, expected: Any, largest: Any) -> float:
    """The largest distance of two arrays, in ulps of the largest magnitude that each element has had."""
    distance = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    return float((distance / np.spacing(np.maximum(largest, np.finfo(expected.dtype).tiny))).max(initial=0))


@pytest.fixture(autouse=True)
def numbers_in_the_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch keeps the numbers of a state in the default dtype, whatever the parameter's."""
    torch.set_default_dtype(torch.float64 if request.getfixturevalue("dtype") is np.float64 else torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("fused", [False, True], ids=["for-loop", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_ulps(case: Case, dtype: type, fused: bool) -> None:
    kwargs: dict[str, Any] = {}
    if fused:  # or its other implementation, where torch has no fused one
        kwargs = {"fused" if case.optimizer in FUSED else "foreach": True}
    params = parameters(SHAPES, dtype)
    tensors = [torch.tensor(p.data) for p in params]
    ours = case.optimizer(params, **case.options)
    theirs = getattr(torch.optim, case.optimizer.__name__)(tensors, **case.options, **kwargs)
    # ASGD's average is at first the parameter.
    largest = {(i, name): np.abs(p.data) for i, p in enumerate(params) for name in ("parameter", "ax")}
    rng = np.random.default_rng(4)
    for step in range(1, 51):
        for p, t, g in zip(params, tensors, gradients(params, rng), strict=True):
            if "weight_decay" in case.options:  # g + weight_decay * p without cancellation: ulps of 0 say nothing
                g = np.copysign(g, -p.data if "maximize" in case.options else p.data)
            p.grad = g
            t.grad = torch.tensor(g)
        ours.step()
        theirs.step()
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            pairs = {"parameter": (p.data, t.numpy())}
            assert set(ours.state[p]) == set(theirs.state[t]), f"{case}: other state than torch's"
            for name, value in ours.state[p].items():
                if isinstance(value, (int, float)):  # a float32 or float64 tensor in torch
                    assert value == pytest.approx(theirs.state[t][name].item(), rel=1e-6)
                else:
                    pairs[name] = (value, theirs.state[t][name].numpy())
            for name, (actual, expected) in pairs.items():
                key = (i, name)
                largest[key] = np.maximum(largest.get(key, 0), np.abs(expected))
                if step in ULPS:
                    error = ulps(actual, expected, largest[key])
                    assert error <= ULPS[step], f"{case}: {name} of {p} is {error} ulps off after {step} steps"
