"""The number of threads, who may limit it, and what becomes of it in a forked child."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import pyopt
from pyopt import threads
from pyopt._engine import threads_used
from test_engine import in_fresh_process

own_library = pytest.mark.skipif(sys.platform != "linux", reason="libgomp is a library of its own on Linux alone")


def test_setting() -> None:
    before = pyopt.get_num_threads()
    with pyopt.num_threads(3):
        assert pyopt.get_num_threads() == 3
        with pyopt.num_threads(1):
            assert pyopt.get_num_threads() == 1
        assert pyopt.get_num_threads() == 3
    assert pyopt.get_num_threads() == before
    pyopt.set_num_threads(before)


def in_thread(*calls: Callable[[], object]) -> None:
    """Run them one after the other in another Python thread."""
    with ThreadPoolExecutor(1) as pool:
        for call in calls:
            pool.submit(call).result(60)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_overlapping_blocks_leave_the_number_as_it_was(order: tuple[int, ...]) -> None:
    """Blocks of three Python threads, left in any order: of those open the last entered counts."""
    before = pyopt.get_num_threads()
    blocks = [pyopt.num_threads(n) for n in (3, 1, 2)]
    with ExitStack() as pools:
        run = [pools.enter_context(ThreadPoolExecutor(1)).submit for _ in blocks]
        for i, block in enumerate(blocks):
            run[i](block.__enter__).result(60)
        still_open = [0, 1, 2]
        for i in order:
            assert pyopt.get_num_threads() == (3, 1, 2)[still_open[-1]]
            run[i](block_exit, blocks[i]).result(60)
            still_open.remove(i)
    assert pyopt.get_num_threads() == before


def block_exit(block: pyopt.num_threads) -> None:
    block.__exit__(None, None, None)


def test_setting_inside_a_block_ends_with_it() -> None:
    before = pyopt.get_num_threads()
    with pyopt.num_threads(2):
        with pyopt.num_threads(3):
            pyopt.set_num_threads(4)
            assert pyopt.get_num_threads() == 4
        assert pyopt.get_num_threads() == 2
    assert pyopt.get_num_threads() == before


def test_setting_beside_the_block_of_another_thread_outlasts_it() -> None:
    before = pyopt.get_num_threads()
    try:
        with pyopt.num_threads(2):
            in_thread(lambda: pyopt.set_num_threads(5))
            assert pyopt.get_num_threads() == 2
        assert pyopt.get_num_threads() == 5
    finally:
        pyopt.set_num_threads(before)


def test_a_block_is_a_decorator_and_can_be_entered_again() -> None:
    before = pyopt.get_num_threads()

    @pyopt.num_threads(3)
    def nested(depth: int) -> int:
        return nested(depth - 1) if depth else pyopt.get_num_threads()

    assert nested(3) == 3
    assert pyopt.get_num_threads() == before


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that sends signals")
def test_signals_leave_no_block_open() -> None:
    """An interrupt at any moment finds a block entered whole or not at all."""
    code = """
import signal, time, pyopt
class Interrupt(Exception): pass
def interrupt(*_): raise Interrupt
signal.signal(signal.SIGALRM, interrupt)
before = pyopt.get_num_threads()
count, end = 0, time.monotonic() + 3
while count < 2000 and time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + count % 50))
        for _ in range(10**7):
            with pyopt.num_threads(before + 1):
                with pyopt.num_threads(before + 2):
                    pass
    except Interrupt:
        count += 1
        assert pyopt.get_num_threads() == before, count
print(count)
"""
    result = in_fresh_process(code)
    assert result.returncode == 0 and int(result.stdout) > 100, result.stderr


LIMIT = """
import os, resource, sys, threading, time, numpy as np, pyopt
def limit():
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 2**20, resource.RLIM_INFINITY))
def step():
    p = pyopt.Parameter(np.ones(2_000_000, np.float32))
    pyopt.SGD([p], lr=1.0).step(grads=[np.ones(2_000_000, np.float32)])
    assert not p.data.any()
    return pyopt._engine.threads_used()
def step_in_new_thread():
    used = []
    thread = threading.Thread(target=lambda: used.append(step()))
    thread.start()
    thread.join()
    return used[0]
def running():
    return len(os.listdir("/proc/self/task"))
def wait_for(count):
    until = time.monotonic() + 60
    while running() > count:
        assert time.monotonic() < until, running()
        time.sleep(0.001)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is Linux's")
@pytest.mark.parametrize(
    "code",
    [
        # An error that names the number, before anything has changed; smaller ones work on.
        """
limit()
before = pyopt.get_num_threads()
for attempt in (pyopt.set_num_threads, lambda n: pyopt.num_threads(n).__enter__()):
    try:
        attempt(1000)
    except RuntimeError as error:
        assert "num_threads == 1000, but this process can have only" in str(error), error
    else:
        raise AssertionError
    assert pyopt.get_num_threads() == before
pyopt.set_num_threads(3)
assert step() == 3
""",
        # Threads that run already run on; a thread that comes later does without.
        """
pyopt.set_num_threads(300)
limit()
assert step() == 300
assert step_in_new_thread() == 1
pyopt.set_num_threads(2)
assert step_in_new_thread() == 2
""",
        # A smaller team ended the others: they are tried again.
        """
before = running()
pyopt.set_num_threads(300)
with pyopt.num_threads(2):
    assert step() == 2
# They end in their own time, and the C library unmaps the stacks of those that have ended when the next one ends.
wait_for(before + 1)
threading.Thread(target=int).start()
wait_for(before + 1)
limit()
assert step() == 1
""",
        # The default is tried at the first step that would use it.
        """
pyopt._engine.set_default_team(300)
limit()
assert step() == 1
pyopt._engine.set_default_team(3)
assert step() == 3
""",
    ],
    ids=["setting", "new thread", "smaller team", "default"],
)
def test_threads_that_cannot_start_do_not_end_the_process(code: str) -> None:
    result = in_fresh_process(LIMIT + code)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is Linux's")
def test_threads_need_the_stack_that_openmp_gives_them() -> None:
    code = LIMIT + "limit(); pyopt.set_num_threads(2); assert step() == 2\ntry: pyopt.set_num_threads(5)\n"
    code += "except RuntimeError: print('refused')"
    assert in_fresh_process(code, OMP_STACKSIZE="64M").stdout == "refused\n"
    assert in_fresh_process(code, OMP_STACKSIZE="64k").stdout == ""


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, 0),
        ({"OMP_STACKSIZE": "100"}, 100 * 1024),
        ({"OMP_STACKSIZE": " 2 M "}, 2 * 2**20),
        ({"OMP_STACKSIZE": "3b"}, 3),
        ({"GOMP_STACKSIZE": "1g"}, 2**30),
        ({"OMP_STACKSIZE": "1m", "GOMP_STACKSIZE": "1g"}, 2**20),
        ({"OMP_STACKSIZE": "much"}, 0),
        ({"OMP_STACKSIZE": "9" * 30}, 0),
    ],
    ids=str,
)
def test_stack_size(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int) -> None:
    for name in ("OMP_STACKSIZE", "GOMP_STACKSIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert threads.stack_size() == expected


@pytest.mark.parametrize(
    "n, error",
    [(0, ValueError), (-1, ValueError), (4097, ValueError), (32767, ValueError), (2.0, TypeError), (True, TypeError)],
)
def test_bad_setting(n: object, error: type) -> None:
    before = pyopt.get_num_threads()
    with pytest.raises(error, match=f"num_threads == {n}"):
        pyopt.set_num_threads(n)  # type: ignore[arg-type]
    with pytest.raises(error, match=f"num_threads == {n}"), pyopt.num_threads(n):  # type: ignore[arg-type]
        pass
    assert pyopt.get_num_threads() == before


PIN = {
    "linux": "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])",
    "win32": "from ctypes import *; assert windll.kernel32.SetProcessAffinityMask(c_void_p(-1), c_size_t(1))",
}


def test_default_obeys_environment_and_affinity() -> None:
    code = "import pyopt; print(pyopt.get_num_threads())"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert in_fresh_process(code, OMP_NUM_THREADS="1").stdout == "1\n"
    assert int(in_fresh_process(code, OMP_NUM_THREADS="64").stdout) <= cpus
    if sys.platform in PIN:
        assert in_fresh_process(f"{PIN[sys.platform]}\n{code}").stdout == "1\n"


@pytest.mark.parametrize(
    "cgroup, files, expected",
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2),
        ("0::/docker/x\n", {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (
            "4:memory:/m\n2:cpu,cpuacct:/job\n",
            {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("2:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "1"}, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "broken\n"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_cgroup_quota(tmp_path: Path, cgroup: str, files: dict[str, str], expected: float | None) -> None:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cgroup_quota(tmp_path) == expected


@pytest.mark.parametrize("quota, most", [(0.5, 1), (1.9, 1), (None, 2**15)])
def test_default_obeys_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, most: int) -> None:
    """Whole CPUs of it, and never none."""
    monkeypatch.setattr(threads, "cgroup_quota", lambda: quota)
    assert 1 <= threads.default_num_threads()[0] <= most


@own_library
def test_threadpoolctl_sees_and_limits() -> None:
    assert any(info["user_api"] == "openmp" for info in threadpoolctl.threadpool_info())
    with pyopt.num_threads(2):
        with threadpoolctl.threadpool_limits(1, user_api="openmp"):
            assert pyopt.get_num_threads() == 1
        assert pyopt.get_num_threads() == 2


SET_BEFORE = """
import ctypes, ctypes.util, sys
openmp = ctypes.CDLL("libgomp.so.1")
openmp.omp_set_num_threads(1)
import pyopt
print(pyopt.get_num_threads())
pyopt.set_num_threads(4)
print(pyopt.get_num_threads(), "OpenMP's own limit" in pyopt.show_config(mode="dicts")["threads"]["why"])
openmp.omp_set_num_threads(2)
print(pyopt.get_num_threads())
"""


@own_library
def test_a_limit_that_was_set_before_the_import_is_obeyed() -> None:
    """OpenMP's number by its environment (here 3) is none; what the process has set since is."""
    assert in_fresh_process(SET_BEFORE, OMP_NUM_THREADS="3").stdout == "1\n1 True\n2\n"


def test_torch_set_num_threads_before_the_import_is_obeyed() -> None:
    pytest.importorskip("torch")
    code = """
import torch
torch.set_num_threads(1)
import pyopt
print(pyopt.get_num_threads())
torch.set_num_threads(2)
pyopt.set_num_threads(4)
print(pyopt.get_num_threads())
"""
    assert in_fresh_process(code, OMP_NUM_THREADS="3").stdout == "1\n2\n"


@own_library
def test_threadpoolctl_around_the_import() -> None:
    code = """
import threadpoolctl, ctypes
ctypes.CDLL("libgomp.so.1")
with threadpoolctl.threadpool_limits(1, user_api="openmp"):
    import pyopt
    print(pyopt.get_num_threads())
pyopt.set_num_threads(2)
print(pyopt.get_num_threads())
"""
    assert in_fresh_process(code, OMP_NUM_THREADS="3").stdout == "1\n2\n"


N = 300_000


def step_twice(optimizer: pyopt.Optimizer) -> bytes:
    for k in (1, 2):
        optimizer.step(grads=[np.linspace(-k, k, N, dtype=np.float32)])
        assert threads_used() == pyopt.get_num_threads()
    return optimizer.param_groups[0]["params"][0].data.tobytes()


def new_optimizer() -> pyopt.Optimizer:
    return pyopt.Adam([np.linspace(0, 1, N, dtype=np.float32)])


def in_child(optimizer: pyopt.Optimizer, queue: multiprocessing.Queue) -> None:
    queue.put((step_twice(optimizer), pyopt.get_num_threads()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing_child_steps_on(method: str) -> None:
    """After the parent has stepped with threads a child does not hang, and computes the same bits."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    with pyopt.num_threads(2):
        optimizer = new_optimizer()
        step_twice(optimizer)
        child = context.Process(target=in_child, args=(optimizer, queue))
        child.start()
        data, n = queue.get(timeout=60)
        child.join(60)
        assert child.exitcode == 0
        assert data == step_twice(optimizer)
        assert n == 1 or method != "fork"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_os_fork_child_steps_on() -> None:
    with pyopt.num_threads(2):
        optimizer = new_optimizer()
        step_twice(optimizer)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a hang becomes a failure
            status = 1
            try:
                with os.fdopen(write, "wb") as pipe:
                    pipe.write(step_twice(optimizer))
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            data = pipe.read()
        assert os.waitpid(pid, 0)[1] == 0
        assert data == step_twice(optimizer)
