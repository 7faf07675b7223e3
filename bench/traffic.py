"""What each optimizer keeps and moves per element, from its declaration: `python bench/traffic.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

import pyopt
from pyopt import Optimizer


def traffic(optimizer: type[Optimizer], dtype: Any = np.float32, **options: Any) -> tuple[int, int]:
    """Bytes of state per element, and bytes that a step moves per element.

    A step reads parameter and gradient and writes the parameter; each state array that the options need it reads and
    writes.
    """
    one = optimizer([np.empty(1, dtype)], **options)
    states = sum(name is not None for name in one.state_streams(one.param_groups[0]))
    itemsize = np.dtype(dtype).itemsize
    return states * itemsize, (3 + 2 * states) * itemsize


def catalogue() -> list[type[Optimizer]]:
    """Every optimizer with a compiled rule, in the order of the package."""
    found = [value for value in vars(pyopt).values() if isinstance(value, type) and issubclass(value, Optimizer)]
    return [cls for cls in found if cls.rule is not None]


if __name__ == "__main__":
    print("| float32, default options | state, bytes per element | moved, bytes per element |\n|---|---|---|")
    for cls in catalogue():
        print(f"| {cls.__name__} | {traffic(cls)[0]} | {traffic(cls)[1]} |")
