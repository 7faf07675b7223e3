"""Which level of instructions the kernels use: one source, compiled once per level, chosen here at import."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pyopt._engine import get_cpu_level

# Ascending; each includes those before it.
LEVELS = {"baseline": "pyopt._kernels", "v3": "pyopt._kernels_v3", "v4": "pyopt._kernels_v4"}


def built_levels() -> list[str]:
    """The levels that this build holds; other architectures than x86-64 have the baseline alone."""
    return [level for level, module in LEVELS.items() if find_spec(module) is not None]


def supported_levels() -> list[str]:
    """The built levels that the CPU and the operating system can run."""
    names = list(LEVELS)
    return [level for level in built_levels() if names.index(level) <= get_cpu_level()]


def chosen_level() -> str:
    """The best supported level, or the one that PYOPT_ISA names."""
    forced = os.environ.get("PYOPT_ISA", "")
    if not forced:
        return supported_levels()[-1]
    if forced not in LEVELS:
        raise ValueError(f"PYOPT_ISA == {forced!r}, must be one of {', '.join(LEVELS)}")
    if forced not in supported_levels():
        raise RuntimeError(f"PYOPT_ISA == {forced!r}, but this machine runs only {', '.join(supported_levels())}")
    return forced


level = chosen_level()
kernels: Any = import_module(LEVELS[level])
