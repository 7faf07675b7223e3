"""How many threads a step uses: the default, the setting, and what a fork does to it."""

from __future__ import annotations

import os
import re
import sys
import warnings
from contextlib import ContextDecorator
from numbers import Integral

from pyopt import _engine

MOST = 4096  # more than machines have CPUs; whether so many start is tried with real ones
NO_OPENMP = "the process has no OpenMP runtime: steps run in one thread until one is loaded, by `import torch` for one"


def set_num_threads(n: int) -> None:
    """Let steps use n threads; a lower limit that OpenMP is given (threadpoolctl, torch.set_num_threads) wins.

    Inside a `num_threads` block it changes the number of that block, which ends with it. While blocks of other Python
    threads alone are open, their number holds, and n once they have left.

    Args:
        n: number of threads, >= 1.

    Raises:
        TypeError, ValueError: n is no integer, or < 1.
        RuntimeError: the machine cannot start so many now. Where it cannot later, a step runs in one thread.

    Warns:
        RuntimeWarning: the process has no OpenMP runtime (macOS, before torch or scikit-learn is imported); the number
            holds as soon as one is loaded.
    """
    _engine.set_team(_checked(n))


def _checked(n: int) -> int:
    if not isinstance(n, Integral) or isinstance(n, bool):
        raise TypeError(f"num_threads == {n!r}, must be an int, not {type(n).__name__}")
    if not 1 <= n <= MOST:
        raise ValueError(f"num_threads == {n!r}, must be >= 1 and <= {MOST}")
    if n > 1 and _engine.openmp_in_use() is None:
        warnings.warn(f"num_threads == {n!r}, but {NO_OPENMP}", RuntimeWarning, stacklevel=3)
    return int(n)


def get_num_threads() -> int:
    """How many threads a step in this Python thread would use; 1 in a forked child, and without an OpenMP runtime."""
    return _engine.get_team()


class num_threads(_engine.TeamBlock, ContextDecorator):
    """Let steps use n threads inside a `with` block, in all Python threads.

    Blocks may overlap in several Python threads: of those still open the one entered last counts, and when all have
    left the number is as before.

    Args:
        n: number of threads, >= 1.

    Raises:
        TypeError, ValueError, RuntimeError: as set_num_threads.

    Example:
        >>> import pyopt
        >>> with pyopt.num_threads(1):
        ...     pyopt.get_num_threads()
        1
    """

    def __init__(self, n: int) -> None:
        super().__init__(_checked(n))


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
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return _engine.count_cpus() or os.cpu_count() or 1


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


def stack_size() -> int:
    """The bytes of stack that OMP_STACKSIZE or GOMP_STACKSIZE give to libgomp's threads; 0 where neither does."""
    for name in ("OMP_STACKSIZE", "GOMP_STACKSIZE"):
        if match := re.fullmatch(r"\s*(\d+)\s*([bkmg]?)\s*", os.environ.get(name, ""), re.IGNORECASE | re.ASCII):
            size = int(match[1]) << {"b": 0, "k": 10, "": 10, "m": 20, "g": 30}[match[2].lower()]
            return size if size <= sys.maxsize else 0
    return 0


_engine.set_stack_size(stack_size())
_engine.set_default_team(default_num_threads()[0])
