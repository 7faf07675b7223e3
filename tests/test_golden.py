"""Digests of what steps give, stored: the same bits on every machine, by every compiler, and from version to version.

    PYOPT_GOLDEN=write pytest tests/test_golden.py    stores them anew, after a change that is meant to change bits

The inputs come of integers and powers of two alone, so that no library's function has a part in them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyopt
from cases import BRIEF, CASES, DTYPES, Case

STORED = Path(__file__).parent / "stored" / "golden.json"
SHAPES = [(), (7,), (33, 5), (1025,), (2500,)]
STEPS = 4
NAMES = {str(case): case for case in [*CASES, *BRIEF]}


@pytest.fixture(scope="module")
def stored() -> Iterator[dict[str, str]]:
    """What is stored, by the name of the case; with PYOPT_GOLDEN=write what the tests put there."""
    if os.environ.get("PYOPT_GOLDEN") != "write":
        yield json.loads(STORED.read_text())
        return
    digests: dict[str, str] = {}
    yield digests
    STORED.write_text(json.dumps(dict(sorted(digests.items())), indent=0) + "\n")


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Of either sign and many magnitudes, a few of them zero or denormal."""
    exponents = rng.integers(-40, -20, shape) - 120 * (rng.integers(0, 50, shape) == 0)
    return np.asarray(np.ldexp(rng.integers(-(2**24), 2**24, shape).astype(np.float64), exponents), dtype)


def content(array: Any) -> bytes:
    """Its bytes; the sign of a NaN that an operation makes is the machine's own, + on aarch64 and - on x86-64."""
    array = array.copy()
    array[np.isnan(array)] = np.nan if array.dtype.kind == "f" else 0
    return array.tobytes()


def digest_of(case: Case) -> str:
    digest = hashlib.sha256()
    for dtype in DTYPES:
        rng = np.random.default_rng(1)
        params = [pyopt.Parameter(values(rng, shape, dtype)) for shape in SHAPES]
        optimizer = case.optimizer(params, **case.options)
        for _ in range(STEPS):
            for p in params:
                p.grad = values(rng, p.data.shape, dtype)
            optimizer.step()
        for p in params:
            digest.update(content(p.data))
            for name, value in sorted(optimizer.state[p].items()):
                digest.update(name.encode() + content(np.asarray(value)))
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("name", NAMES)
def test_steps(stored: dict[str, str], name: str) -> None:
    digest = digest_of(NAMES[name])
    if os.environ.get("PYOPT_GOLDEN") == "write":
        stored[name] = digest
    assert stored.get(name) == digest


@pytest.mark.parametrize("norm_type", [1, 2, float("inf")])
def test_norms(stored: dict[str, str], norm_type: float) -> None:
    digest = hashlib.sha256()
    for dtype in DTYPES:
        rng = np.random.default_rng(2)
        gradients = [values(rng, shape, dtype) for shape in SHAPES]
        params = [pyopt.Parameter(np.zeros_like(g), g) for g in gradients]
        digest.update(np.float64(pyopt.clip_grad_norm_(params, 1e-3, norm_type)).tobytes())
        for p in params:
            digest.update(p.grad.tobytes())
    name = f"clip_grad_norm_, {norm_type}"
    if os.environ.get("PYOPT_GOLDEN") == "write":
        stored[name] = digest.hexdigest()[:16]
    assert stored.get(name) == digest.hexdigest()[:16]
