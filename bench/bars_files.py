"""The bar of files: 1 GB saved and loaded against a plain write + fsync and a plain read of the same bytes.

python bench/bars_files.py [FOLDER]    both sides in one process, interleaved; medians of ratios
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pyopt

ROUNDS = 9


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def plain_write(path: Path, arrays: list[Any]) -> None:
    with open(path, "wb", buffering=0) as file:
        for array in arrays:
            file.write(array)
        os.fsync(file.fileno())


def plain_read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def plain_read_into(path: Path, arrays: list[Any]) -> None:
    """What no loader can beat: the bytes straight to where they belong, whether or not they are right."""
    with open(path, "rb", buffering=0) as file:
        for array in arrays:
            file.readinto(array)


def forget(path: Path) -> None:
    """Out of the system's memory, so that the disk must be read."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def peak_beyond(work: Callable[[], Any]) -> float:
    """By how many MB the resident memory rises at most while it works."""

    def memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    Path("/proc/self/clear_refs").write_text("5")
    before = memory()
    work()
    return (memory() - before) / 1e3


def main(folder: str | None = None) -> None:
    shapes = [(4096, 4096), *[(1024, 1024)] * 60, *[(1024,)] * 60]  # a third of 1 GB; Adam has two more
    params = {str(i): np.ones(shape, np.float32) for i, shape in enumerate(shapes)}
    optimizer = pyopt.Adam(params)
    optimizer.step(grads={name: np.ones_like(p) for name, p in params.items()})
    arrays = [*params.values()]
    for entry in optimizer.state.values():
        arrays += [entry["exp_avg"], entry["exp_avg_sq"]]
    total = sum(array.nbytes for array in arrays)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        ours, plain = Path(name) / "ours", Path(name) / "plain"

        def save() -> None:
            pyopt.save(ours, optimizer)

        def load() -> None:
            pyopt.load(ours, optimizer)

        def write() -> None:
            plain_write(plain, arrays)

        for _ in range(2):
            write(), save(), load()
        print(f"{total / 1e9:.2f} GB, memory beyond: save {peak_beyond(save):.0f} MB, load {peak_beyond(load):.0f} MB")
        rivals: list[tuple[str, Callable[[], Any], Callable[[], Any], bool]] = [
            ("save / write + fsync", save, write, False),
            ("load / read, from the disk", load, lambda: plain_read(plain), True),
            ("load / read, in memory", load, lambda: plain_read(plain), False),
            ("load / read into the arrays, from the disk", load, lambda: plain_read_into(plain, arrays), True),
            ("load / read into the arrays, in memory", load, lambda: plain_read_into(plain, arrays), False),
        ]
        for what, work, rival, cold in rivals:
            times = []
            for _ in range(ROUNDS):
                pair = []
                for path, side in ((ours, work), (plain, rival)):
                    if cold:
                        forget(path)
                    pair.append(seconds(side))
                times.append(pair)
            mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(b / a for a, b in times)
            print(f"{what:45} {ratio:5.2f}x   {total / mine / 1e9:5.2f} GB/s, {total / theirs / 1e9:5.2f} GB/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
