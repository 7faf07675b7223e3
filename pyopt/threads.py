"""How many threads a step uses: the default, the setting, and what a fork does to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

from pyopt import _engine


def set_num_threads(n: int) -> None:
    """Let steps use n threads; a lower limit that OpenMP is given (threadpoolctl, torch.set_num_threads) wins.

    Args:
        n: number of threads, >= 1.

    Raises:
        TypeError, ValueError: n is no integer, or < 1.
    """
    _set_num_threads(n)


def _set_num_threads(n: int) -> int:
    """Check and set; returns the number before."""
    if not isinstance(n, Integral) or isinstance(n, bool):
        raise TypeError(f"num_threads == {n!r}, must be an int, not {type(n).__name__}")
    if not 1 <= n < 2**15:
        raise ValueError(f"num_threads == {n!r}, must be >= 1 and < 32768")
    return _engine.set_team(int(n))


def get_num_threads() -> int:
    """How many threads a step in this Python thread would use; 1 in a forked child."""
    return _engine.get_team()


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Let steps use n threads inside a `with` block, in all Python threads.

    Example:
        >>> import pyopt
        >>> with pyopt.num_threads(1):
        ...     pyopt.get_num_threads()
        1
    """
    before = _set_num_threads(n)
    try:
        yield
    finally:
        _engine.set_team(before)


def default_num_threads() -> tuple[int, str]:
    """The number of threads to begin with, and why: OMP_NUM_THREADS, affinity and cgroup quota, whichever is least."""
    limits = [(_affinity(), "CPUs this process may use")]
    if (quota := cgroup_quota()) is not None:
        limits.append((max(1, int(quota)), "cgroup CPU quota"))
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        limits.append((int(first), "OMP_NUM_THREADS"))
    return min(limits, key=lambda limit: limit[0])


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_quota(root: str | os.PathLike[str] = "/") -> float | None:
    """CPUs that the cgroups of this process grant (v2 cpu.max, v1 cpu.cfs_quota_us), from its own up to the root."""
    quotas = []
    for entry in (_read(root, "proc/self/cgroup") or "").splitlines():
        _, controllers, path = entry.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = os.path.join(root, "sys/fs/cgroup", "cpu" if controllers else "")
        # Inside a container the path is the host's and the mount its own cgroup: the mount itself is looked at last.
        parts = path.strip("/").split("/") if path.strip("/") else []
        quotas += [_quota(os.path.join(mount, *parts[:n])) for n in range(len(parts), -1, -1)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(directory: str) -> float | None:
    limit = _read(directory, "cpu.max")
    if limit is None:
        limit = f"{_read(directory, 'cpu.cfs_quota_us')} {_read(directory, 'cpu.cfs_period_us')}"
    try:
        quota, period = map(int, limit.split())
    except ValueError:  # "max", or no such files
        return None
    return quota / period if quota > 0 else None


def _read(directory: str | os.PathLike[str], name: str) -> str | None:
    try:
        with open(os.path.join(directory, name)) as file:
            return file.read()
    except OSError:
        return None


_engine.set_team(default_num_threads()[0])
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_engine.after_fork)
