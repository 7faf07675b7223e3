"""The number of threads, who may limit it, and what becomes of it in a forked child."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import pyopt
from pyopt import threads
from test_engine import in_fresh_process


def test_setting() -> None:
    before = pyopt.get_num_threads()
    with pyopt.num_threads(3):
        assert pyopt.get_num_threads() == 3
        with pyopt.num_threads(1):
            assert pyopt.get_num_threads() == 1
        assert pyopt.get_num_threads() == 3
    assert pyopt.get_num_threads() == before
    pyopt.set_num_threads(before)


@pytest.mark.parametrize("n, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_setting(n: object, error: type) -> None:
    before = pyopt.get_num_threads()
    with pytest.raises(error, match=f"num_threads == {n}"):
        pyopt.set_num_threads(n)  # type: ignore[arg-type]
    with pytest.raises(error, match=f"num_threads == {n}"), pyopt.num_threads(n):  # type: ignore[arg-type]
        pass
    assert pyopt.get_num_threads() == before


def test_default_obeys_environment_and_affinity() -> None:
    code = "import pyopt; print(pyopt.get_num_threads())"
    cpus = len(os.sched_getaffinity(0))
    assert in_fresh_process(code, OMP_NUM_THREADS="1").stdout == "1\n"
    assert int(in_fresh_process(code, OMP_NUM_THREADS="64").stdout) <= cpus
    pinned = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n" + code
    assert in_fresh_process(pinned).stdout == "1\n"


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


def test_threadpoolctl_sees_and_limits() -> None:
    assert any(info["user_api"] == "openmp" for info in threadpoolctl.threadpool_info())
    with pyopt.num_threads(2):
        with threadpoolctl.threadpool_limits(1, user_api="openmp"):
            assert pyopt.get_num_threads() == 1
        assert pyopt.get_num_threads() == 2


N = 300_000


def step_twice(optimizer: pyopt.Optimizer) -> bytes:
    for k in (1, 2):
        optimizer.step(grads=[np.linspace(-k, k, N, dtype=np.float32)])
    return optimizer.param_groups[0]["params"][0].data.tobytes()


def new_optimizer() -> pyopt.Optimizer:
    return pyopt.Adam([np.linspace(0, 1, N, dtype=np.float32)])


def in_child(optimizer: pyopt.Optimizer, queue: multiprocessing.Queue) -> None:
    queue.put((step_twice(optimizer), pyopt.get_num_threads()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
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
