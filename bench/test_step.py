"""One step of every optimizer and of its roof, in pytest-benchmark's tables: `pytest bench`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rivals import CASES, Tensors, make

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("name", ["pyopt", "roof"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("count", "size"), [(1, 1 << 20), (1000, 64)], ids=["1M", "1000x64"])
def test_step(benchmark: Any, count: int, size: int, case: str, name: str) -> None:
    benchmark.group = f"{case}, {count} x {size}"
    tensors = Tensors(count, size, len(CASES[case].states), np.float32)
    contestant = make(CASES[case], name, tensors)
    benchmark.pedantic(contestant.step, setup=contestant.flip, rounds=50, warmup_rounds=2)
    assert all(np.isfinite(p).all() for p in tensors.params)
