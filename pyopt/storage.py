"""How parameters and state lie in memory: shorter than they are computed with, and what rounding would take from them.

Every compiled rule computes in float32 (in float64 for float64 parameters) and rounds once, when it stores. What it
stores in is the parameter's own type, unless one of the options below says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from pyopt._isa import kernels
from pyopt.checks import count, positive
from pyopt.parameter import is_short


class Storage(TypedDict, total=False):
    """Options of every optimizer with a compiled rule; keys of groups too.

    Args:
        state_dtype: type of new state arrays: "float32", "bfloat16", "float16", or a dtype of NumPy or torch; None
            for the parameter's own. "8bit" (Adam, AdamW, AdEMAMix, Lion, SGD) stores one byte per element and one
            float32 per 256; tensors of less than 4096 elements, and such as are not in C order, get float32. State
            of float64 parameters stays float64.
        master: what the state keeps beside a bfloat16 or float16 parameter, so that steps below its precision add
            up: "split" (bfloat16) the lower half of a float32 as "low_bits", int16, so that the bits are those of
            training in float32; "kahan" what rounding took as "compensation", in the parameter's type; None
            nothing.
        rounding: "nearest", or "stochastic" for bfloat16 and float16 parameters: up or down by chance, so that the
            mean is right; the bits depend on seed, step and element alone. Not with master.
        seed: an int >= 0, for rounding="stochastic".
        max_row_norm: > 0, in those that take gradients of rows (RowSparse): a row whose 2-norm is larger when a step
            has touched it is multiplied by max_row_norm / (norm + 1e-7), as torch.nn.Embedding does with max_norm to
            rows that it looks up. An array as gradient touches all rows; a row is what lies under one index of the
            first axis. The norm is that of the numbers as they are stored, in double; NaN stays. The parameter must
            lie in C order. None for no bound.
    """

    state_dtype: Any
    master: str | None
    rounding: str
    seed: int
    max_row_norm: float | None


USUAL: Mapping[str, Any] = {
    "state_dtype": None,
    "master": None,
    "rounding": "nearest",
    "seed": 0,
    "rounding_step": 0,
    "max_row_norm": None,
}
STATE_DTYPES = ("float32", "bfloat16", "float16", "8bit")
MASTERS = {"split": "low_bits", "kahan": "compensation"}  # with the names of their state
LEAST_BLOCKWISE = 4096  # elements, from which 8 bits pay
BLOCK = 256  # elements that share a scale in 8 bits


def checked(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of storage of a group in their plain form, those that are not the usual ones.

    Raises:
        TypeError, ValueError: an option that is none of what Storage allows.
    """
    found = {key: group[key] for key in USUAL if key in group}
    if not found:
        return found
    if "state_dtype" in found:
        found["state_dtype"] = state_dtype_of(found["state_dtype"])
    if found.get("master") not in (None, *MASTERS):
        raise ValueError(f"master == {found['master']!r}, must be 'split', 'kahan' or None")
    if found.get("rounding", "nearest") not in ("nearest", "stochastic"):
        raise ValueError(f"rounding == {found['rounding']!r}, must be 'nearest' or 'stochastic'")
    for key in ("seed", "rounding_step"):
        count(key, found.get(key, 0))
    if found.get("max_row_norm") is not None:
        positive("max_row_norm", found["max_row_norm"])
    chance = found.get("rounding") == "stochastic"
    if chance and found.get("master") is not None:
        raise ValueError(f"master == {found['master']!r} with rounding == 'stochastic', must be one of the two")
    if chance:  # the count of its steps goes with it
        found = {"seed": 0, "rounding_step": 0, **found}
        return {key: value for key, value in found.items() if key != "max_row_norm" or value is not None}
    return {key: value for key, value in found.items() if value != USUAL[key]}


def state_dtype_of(value: Any) -> str | None:
    """A dtype by its name, whichever way it was given."""
    if value is None or (isinstance(value, str) and value in STATE_DTYPES):
        return value
    name = str(value).removeprefix("torch.")
    if name not in STATE_DTYPES:
        try:
            name = np.dtype(value).name
        except TypeError:
            name = ""
    if name not in STATE_DTYPES[:3]:
        raise ValueError(f"state_dtype == {value!r}, must be None or one of {', '.join(map(repr, STATE_DTYPES))}")
    return name


def dynamic_map(signed: bool) -> np.ndarray[Any, Any]:
    """The 256 numbers of 8 bits, ascending, float32."""
    return np.array(kernels.numbers_of_codes(signed), np.uint32).view(np.float32)


def in_codes(size: int, is_contiguous: bool, dtype: str, storage: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter is stored in 8 bits, whose groups of elements count in C order."""
    return storage.get("state_dtype") == "8bit" and size >= LEAST_BLOCKWISE and is_contiguous and dtype != "float64"


def state_type(dtype: np.dtype[Any], storage: Mapping[str, Any]) -> np.dtype[Any]:
    """The type of the state of a parameter, in other than 8 bits."""
    name = storage.get("state_dtype")
    return dtype if name is None or dtype == np.float64 else dtype_of("float32" if name == "8bit" else name)


def master_of(dtype: str, storage: Mapping[str, Any]) -> str | None:
    """The name of what the state keeps beside a parameter of this type; None for nothing."""
    master = storage.get("master")
    if master is None or dtype not in ("bfloat16", "float16") or (master == "split" and dtype == "float16"):
        return None
    return MASTERS[master]


def check_for(name: str, core: Any, storage: Mapping[str, Any]) -> None:
    """Raise for an option that a class of optimizers has not."""
    if storage.get("max_row_norm") is not None and not _takes_rows(core):
        raise TypeError(f"{name} has no option 'max_row_norm', as it takes no gradients of rows")
    if (others := storage.keys() - {"max_row_norm"}) and not core.short_types:
        raise TypeError(f"{name} has no option {min(others)!r}, as it has no compiled rule")
    if storage.get("state_dtype") == "8bit" and core.unsigned_states is None:
        raise ValueError(f"state_dtype == '8bit', which {name} has not")


def _takes_rows(core: Any) -> bool:
    """Whether an optimizer, or a class of them, takes gradients of rows with some options."""
    takes: Any = core.takes_rows
    return bool(takes(core, {}) if isinstance(core, type) else takes({}))


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's dtype of this name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(
                "bfloat16 needs the package ml_dtypes, since NumPy has none: pip install ml_dtypes"
            ) from None
        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(name)


def rounding_step(group: Mapping[str, Any]) -> int:
    """How many steps of a group have been rounded by chance."""
    count("rounding_step", group.get("rounding_step", 0))
    return int(group.get("rounding_step", 0))


def largest(dtype: np.dtype[Any]) -> float:
    """The largest finite number of a type."""
    return 3.3895313892515355e38 if is_short(dtype) and dtype.name == "bfloat16" else float(np.finfo(dtype).max)
