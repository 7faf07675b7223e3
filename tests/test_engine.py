"""What bits must not depend on: instruction set, thread count, split into tensors, alignment; and what a step keeps."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyopt
from cases import BRIEF, CASES, DTYPES, SIZES, Case, assert_same_bits, gradients, parameters
from pyopt import _isa
from pyopt._engine import threads_used

ROW_COST = 64  # of one tensor, in elements


def on_level(optimizer: pyopt.Optimizer, level: str) -> pyopt.Optimizer:
    """The optimizer with the kernels of a level."""
    name = next(name for name in vars(_isa.kernels) if getattr(_isa.kernels, name) is type(optimizer).rule)
    optimizer.rule = getattr(import_module(_isa.LEVELS[level]), name)
    return optimizer


@pytest.mark.parametrize("level", [level for level in _isa.supported_levels() if level != "baseline"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_levels_give_the_same_bits(case: Case, dtype: type, level: str) -> None:
    results = []
    for each in ("baseline", level):
        params = parameters(SIZES[:-3], dtype)
        optimizer = on_level(case.optimizer(params, **case.options), each)
        rng = np.random.default_rng(5)
        for _ in range(3):
            optimizer.step(grads=gradients(params, rng))
        results.append([p.data for p in params] + [a for p in params for a in optimizer.state[p].values()])
    for a, b in zip(*results, strict=True):
        if isinstance(a, np.ndarray):
            assert_same_bits(a, b, f"{case} on {level}")


@contextmanager
def everything_shared() -> Iterator[None]:
    """However little there is to do, threads do it."""
    pyopt._engine.set_parallel_cost(0)
    try:
        yield
    finally:
        pyopt._engine.set_parallel_cost(-1)


@settings(deadline=None, max_examples=100)
@given(
    case=st.sampled_from(CASES),
    dtype=st.sampled_from(DTYPES),
    total=st.integers(1, 6000),
    cuts=st.lists(st.integers(0, 6000), max_size=8),
    offsets=st.lists(st.integers(0, 16), min_size=9, max_size=9),
    threads=st.integers(1, 5),
    level=st.sampled_from(_isa.supported_levels()),
)
def test_splits_alignment_threads_and_levels(
    case: Case, dtype: type, total: int, cuts: list, offsets: list, threads: int, level: str
) -> None:
    """The same numbers in one tensor, and cut into tensors at any place and any alignment."""
    rng = np.random.default_rng(total)
    data = rng.standard_normal(total).astype(dtype)
    grads = [rng.standard_normal(total).astype(dtype) for _ in range(3)]
    bounds = [0, *sorted(min(cut, total) for cut in cuts), total]
    pieces = []
    for (begin, end), offset in zip(pairwise(bounds), offsets, strict=False):
        buffer = np.empty(end - begin + offset, dtype)
        buffer[offset:] = data[begin:end]
        pieces.append(pyopt.Parameter(buffer[offset:]))
    many = on_level(case.optimizer(pieces, **case.options), level)
    if not case.sums:
        wholes = [pyopt.Parameter(data.copy())]
    else:  # sums over a tensor are its own: the same tensors, aligned, in one thread
        wholes = [pyopt.Parameter(data[begin:end].copy()) for begin, end in pairwise(bounds)]
    one = case.optimizer(wholes, **case.options)

    with pyopt.num_threads(1):
        for g in grads:
            one.step(grads=[g[begin:end] for begin, end in pairwise(bounds)] if case.sums else [g])
    with everything_shared(), pyopt.num_threads(threads):
        for g in grads:
            many.step(grads=[g[begin:end] for begin, end in pairwise(bounds)])
            assert threads_used() == threads
    assert_same_bits(*(np.concatenate([p.data for p in params]) for params in (pieces, wholes)), str(case))
    for name, value in one.state[wholes[0]].items():
        if isinstance(value, np.ndarray):
            ours, theirs = (
                np.concatenate([optimizer.state[p][name] for p in params])
                for optimizer, params in ((many, pieces), (one, wholes))
            )
            assert_same_bits(ours, theirs, f"{case} {name}")
    for name in case.optimizer.shared_numbers:
        assert many.param_groups[0][name] == one.param_groups[0][name]


def test_threads_used_is_what_openmp_gave() -> None:
    """Small work runs in one thread, large work in all, and a step tells of its own Python thread."""
    small, large = (pyopt.SGD([np.ones(n, np.float32)]) for n in (100, 1_000_000))

    def step(optimizer: pyopt.Optimizer) -> int:
        optimizer.step(grads=[np.ones_like(optimizer.param_groups[0]["params"][0].data)])
        return threads_used()

    with pyopt.num_threads(3):
        assert [step(small), step(large)] == [1, 3]
        thread = threading.Thread(target=step, args=[small])
        thread.start()
        thread.join(60)
        assert threads_used() == 3
    with pyopt.num_threads(1):
        assert step(large) == 1


@pytest.mark.parametrize(
    "environment, used",
    [({"OMP_THREAD_LIMIT": "1"}, 1), ({"OMP_THREAD_LIMIT": "2"}, 2), ({"OMP_DYNAMIC": "true"}, None)],
)
def test_a_smaller_team_does_all_the_work(environment: dict[str, str], used: int | None) -> None:
    """Where OpenMP gives fewer threads than there are parts, none of them is left out."""
    code = """
import numpy as np, pyopt
pyopt.set_num_threads(4)
p = pyopt.Parameter(np.ones(200_000, np.float32))
pyopt.SGD([p], lr=1.0).step(grads=[np.ones(200_000, np.float32)])
print(pyopt.get_num_threads(), pyopt._engine.threads_used(), np.count_nonzero(p.data))
"""
    number, given, left = map(int, in_fresh_process(code, **environment).stdout.split())
    assert (number, left) == (4, 0) and given <= 4
    assert used is None or given == used


def test_size_from_which_threads_pay_is_no_measurement() -> None:
    """It follows from the number of threads alone, in any process at any load, and holds to the element."""
    code = "import pyopt; pyopt.set_num_threads({}); print(pyopt._engine.get_parallel_cost())"
    for n in (2, 3):
        with pyopt.num_threads(n):
            least = pyopt._engine.get_parallel_cost()
            assert int(in_fresh_process(code.format(n)).stdout) == least
            for size, used in ((least - ROW_COST - 1, 1), (least - ROW_COST, n)):
                pyopt.SGD([np.ones(size, np.float32)]).step(grads=[np.ones(size, np.float32)])
                assert threads_used() == used, size


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("level", _isa.supported_levels())
def test_level_can_be_forced(level: str) -> None:
    result = in_fresh_process("import pyopt; print(pyopt._isa.level, pyopt._isa.kernels.__name__)", PYOPT_ISA=level)
    assert result.stdout.split() == [level, _isa.LEVELS[level]], result.stderr


def test_best_level_is_the_default() -> None:
    result = in_fresh_process("import pyopt; print(pyopt._isa.level)", PYOPT_ISA="")
    assert result.stdout.strip() == _isa.supported_levels()[-1]


def test_unknown_level() -> None:
    result = in_fresh_process("import pyopt", PYOPT_ISA="avx9")
    assert result.returncode and "PYOPT_ISA == 'avx9', must be one of baseline, v3, v4" in result.stderr


def test_unsupported_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_isa, "get_cpu_level", lambda: 0)
    monkeypatch.setenv("PYOPT_ISA", "v3")
    with pytest.raises(RuntimeError, match="PYOPT_ISA == 'v3', but this machine runs only baseline"):
        _isa.chosen_level()


def test_flush_denormal_is_ieee_by_default_and_thread_independent() -> None:
    tiny = np.float32(1e-39)
    results = {}
    for flush in (False, True):
        for threads in (1, 2):
            p = pyopt.Parameter(np.full(200_000, tiny))
            optimizer = pyopt.SGD([p], lr=1.0)
            assert pyopt.set_flush_denormal(flush) is True and pyopt.get_flush_denormal() is flush
            try:
                with pyopt.num_threads(threads):
                    optimizer.step(grads=[np.full(200_000, np.float32(-1e-40))])
                    assert threads_used() == threads
            finally:
                pyopt.set_flush_denormal(False)
            results[flush, threads] = p.data
            assert np.float32(1e-39) * np.float32(1) != 0, "the caller's own mode is as before"
    assert (results[False, 1] == tiny + np.float32(1e-40)).all() and tiny + np.float32(1e-40) != tiny
    assert (results[True, 1] == 0).all()
    for flush in (False, True):
        assert_same_bits(results[flush, 1], results[flush, 2], f"flush {flush}")


def test_mode_of_the_caller_does_not_matter() -> None:
    """A thread that rounds another way gets the same bits, and keeps its mode."""
    code = """
import ctypes, ctypes.util, os, platform, numpy as np, pyopt
libm = ctypes.CDLL("ucrtbase" if os.name == "nt" else ctypes.util.find_library("m"))
# FE_UPWARD of <fenv.h>
UPWARD = 0x200 if os.name == "nt" else 0x400000 if platform.machine() in ("aarch64", "arm64") else 0x800
p = pyopt.Parameter(np.full(1000, 1, np.float32))
assert libm.fesetround(UPWARD) == 0
pyopt.SGD([p], lr=1.0).step(grads=[np.full(1000, -1e-9, np.float32)])
assert libm.fegetround() == UPWARD
libm.fesetround(0)
print((p.data == 1).all())
"""
    assert in_fresh_process(code).stdout.strip() == "True"


@pytest.mark.parametrize("case", BRIEF, ids=str)
def test_no_growth_after_the_first_step(case: Case) -> None:
    """50 steps need less than 1 MB beyond parameters, gradients and state."""
    pytest.importorskip("resource")
    code = f"""
import resource, sys
sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import numpy as np, pyopt
params = [pyopt.Parameter(np.ones(n, np.float32)) for n in (1_000_000, 300, 7)]
optimizer = pyopt.{case.optimizer.__name__}(params, **{case.options!r})
grads = [np.ones_like(p.data) for p in params]
optimizer.step(grads=grads)
others = [-g for g in grads]  # to and fro: Prodigy's estimate grows without end along one direction
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for k in range(50):
    for p, g in zip(params, grads if k % 2 else others): p.grad = g
    optimizer.step()
    optimizer.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = in_fresh_process(code)
    assert int(result.stdout) < 1024, f"{result.stdout} kB more; {result.stderr}"


def test_arrays_are_released_with_the_optimizer() -> None:
    data = np.ones(100, np.float32)
    optimizer = pyopt.Adam([data])
    optimizer.step(grads=[np.ones(100, np.float32)])
    before = sys.getrefcount(data)
    del optimizer
    gc.collect()
    assert sys.getrefcount(data) < before


def test_several_python_threads_on_different_optimizers() -> None:
    used = set()

    def train(seed: int, out: dict) -> None:
        params = parameters([50_000, 3, 7], np.float32, seed)
        optimizer = pyopt.Adam(params)
        rng = np.random.default_rng(seed)
        for _ in range(20):
            optimizer.step(grads=gradients(params, rng))
            used.add(threads_used())
        out[seed] = [p.data for p in params]

    alone: dict = {}
    together: dict = {}
    with pyopt.num_threads(2):
        for seed in range(4):
            train(seed, alone)
        threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert used == {2}
    for seed, arrays in alone.items():
        for a, b in zip(arrays, together[seed], strict=True):
            assert_same_bits(a, b, f"thread {seed}")


def test_two_threads_on_one_optimizer_get_an_error() -> None:
    """A step from inside a step (here: from the gradient's own conversion) is refused, and harmless."""
    p = pyopt.Parameter(np.ones(10, np.float32))
    optimizer = pyopt.Adam([p])
    errors = []

    class Meddling:
        dtype = np.dtype(np.float32)

        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            thread = threading.Thread(target=self.step)
            thread.start()
            thread.join(60)
            return np.ones(10, np.float32)

        def step(self) -> None:
            try:
                optimizer.step(grads=[np.ones(10, np.float32)])
            except RuntimeError as error:
                errors.append(str(error))

    optimizer.step(grads=[Meddling()])
    assert errors == ["step() of this optimizer is already running in another thread"]
    assert optimizer.state[p]["step"] == 1
    optimizer.step(grads=[np.ones(10, np.float32)])
    assert optimizer.state[p]["step"] == 2
