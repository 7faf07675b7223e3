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
    used = _engine.openmp_in_use()
    if _engine.is_forked():
        why = "this is a forked child: one thread"
    elif used is None:
        why = threads.NO_OPENMP
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
        "openmp": {"in use": os.path.realpath(used) if used else "none", "runtimes": openmp_runtimes()},
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
    """The files of the OpenMP runtimes that this process has loaded; more than one is trouble."""
    return sorted({os.path.realpath(path) for path in _engine.openmp_runtimes()})


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
