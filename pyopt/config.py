"""What this installation consists of and how it will run: pyopt.show_config() and `python -m pyopt`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import numpy as np

from pyopt import _engine, _isa, threads


def config() -> dict[str, dict[str, Any]]:
    """The sections of show_config; values are str, int, bool or lists of str."""
    import platform  # with metadata 20 ms that `import pyopt` need not wait for
    from importlib import metadata

    default, reason = threads.default_num_threads()
    in_use = threads.get_num_threads()
    if _engine.is_forked():
        why = "this is a forked child: one thread"
    elif _engine.is_limited():
        why = f"OpenMP's own limit (torch.set_num_threads, threadpoolctl); the default is {default}: {reason}"
    elif in_use == default:
        why = reason
    else:
        why = f"set by the caller; the default is {default}: {reason}"
    sections: dict[str, dict[str, Any]] = {
        "pyopt": {"version": metadata.version("pyopt"), "path": os.path.dirname(__file__)},
        "machine": {"system": platform.system(), "architecture": platform.machine(), "python": sys.version.split()[0]},
        "instruction sets": {
            "built": _isa.built_levels(),
            "supported": _isa.supported_levels(),
            "chosen": _isa.level,
        },
        "openmp": {"runtimes": openmp_runtimes()},
        "threads": {
            "number": in_use,
            "why": why,
            "parallel from (elements)": _engine.get_parallel_cost() if in_use > 1 else "never, with one thread",
        },
        "denormals": {"flushed": _engine.get_flush_denormal()},
        "numpy": {"version": np.__version__},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        sections["torch"] = {"version": str(torch.__version__), "threads": torch.get_num_threads()}
    else:
        with suppress(metadata.PackageNotFoundError):
            sections["torch"] = {"version": metadata.version("torch"), "imported": False}
    return sections


def openmp_runtimes() -> list[str]:
    """The files of the OpenMP runtimes that this process has mapped; more than one is trouble."""
    try:
        with open("/proc/self/maps") as file:
            maps = file.read().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6}
    names = ("libgomp", "libomp", "libiomp")
    return sorted(path for path in paths if os.path.basename(path).startswith(names))


def show_config(mode: str = "stdout") -> dict[str, dict[str, Any]] | None:
    """Print, or return, what this installation consists of and how it will run: for bug reports.

    Args:
        mode: "stdout" prints, "dicts" returns a dict of dicts, as numpy.show_config.

    Raises:
        ValueError: another mode.

    Example:
        >>> import pyopt
        >>> pyopt.show_config(mode="dicts")["instruction sets"]["chosen"] in ("baseline", "v3", "v4")
        True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode == {mode!r}, must be 'stdout' or 'dicts'")
    sections = config()
    if mode == "dicts":
        return sections
    for section, values in sections.items():
        print(f"{section}:")
        for key, value in values.items():
            print(f"  {key}: {', '.join(value) if isinstance(value, list) else value}")
    return None
