"""Plain data as JSON and back, exactly: what JSON has not stands in a dict with one key that begins with "$".

{"$float": "nan"}             also "-nan", "inf" and "-inf"
{"$tuple": [...]}
{"$dict": [[key, value]...]}  keys that are no strings, or begin with "$"
{"$array": name}              an array of the file
{"$tensor": name}             one that was a tensor of torch
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

ArrayOf = Callable[[str, bool], Any]  # an array of the file by name, and whether it was a tensor
MOST_DEPTH = 100  # of containers in each other: what can be saved can be loaded, from whatever depth of calls
AsArray = Callable[[str, Any], "np.ndarray[Any, Any] | None"]  # a tensor as an array, None for anything else


class Encoder:
    """Makes JSON of plain data, and gathers the arrays in it by names that say where they stand."""

    def __init__(self, tensor_as_array: AsArray) -> None:
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._tensor_as_array = tensor_as_array

    def encode(self, value: Any, where: str) -> Any:
        """The value as JSON.

        Raises:
            TypeError: something that is no plain data.
            ValueError: containers that are nested too deep, or contain themselves.
        """
        try:
            return self._encode(value, where, 0)
        except RecursionError:
            raise ValueError(f"{where} is nested too deep, or contains itself") from None

    def _encode(self, value: Any, where: str, depth: int) -> Any:
        if depth > MOST_DEPTH:
            raise RecursionError
        if isinstance(value, np.generic):
            value = value.item()
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": _not_finite(value)}
        if kind is list:
            return [self._encode(item, f"{where}.{i}", depth + 1) for i, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self._encode(item, f"{where}.{i}", depth + 1) for i, item in enumerate(value)]}
        if isinstance(value, dict):
            items = {key: self._encode(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
            if all(type(key) is str and not key.startswith("$") for key in items):
                return items
            return {"$dict": [[self._encode(key, f"a key of {where}", depth + 1), item] for key, item in items.items()]}
        if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
            return {"$array": self.add(where, value)}
        array = self._tensor_as_array(where, value)
        if array is not None:
            return {"$tensor": self.add(where, array)}
        raise TypeError(f"{where} is a {kind.__name__}, must be numbers, strings, None, lists, tuples, dicts or arrays")

    def add(self, where: str, array: np.ndarray[Any, Any]) -> str:
        """The name under which an array goes into the file."""
        name = where = where.encode("utf-8", "backslashreplace").decode()  # no lone surrogates
        i = 1
        while name in self.arrays:
            i += 1
            name = f"{where} ({i})"
        self.arrays[name] = array
        return name


def _not_finite(value: float) -> str:
    return "-nan" if math.isnan(value) and math.copysign(1, value) < 0 else repr(value)


def decoded(value: Any, array_of: ArrayOf, depth: int = 0) -> Any:
    """What JSON that was made by `Encoder.encode` stands for.

    Raises:
        ValueError: JSON of another kind, or nested too deep.
    """
    if depth > MOST_DEPTH:
        raise ValueError(f"is nested too deep, must be at most {MOST_DEPTH} containers in each other")
    depth += 1
    if isinstance(value, list):
        return [decoded(item, array_of, depth) for item in value]
    if not isinstance(value, dict):
        return value
    key = next((key for key in value if key.startswith("$")), None)
    if key is None:
        return {key: decoded(item, array_of, depth) for key, item in value.items()}
    held = value[key]
    if len(value) == 1:
        if key == "$float" and held in ("nan", "-nan", "inf", "-inf"):
            return float(held)
        if key == "$tuple" and isinstance(held, list):
            return tuple(decoded(item, array_of, depth) for item in held)
        if key == "$dict" and isinstance(held, list) and all(isinstance(p, list) and len(p) == 2 for p in held):
            return as_dict([(decoded(k, array_of, depth), decoded(v, array_of, depth)) for k, v in held])
        if key in ("$array", "$tensor") and isinstance(held, str):
            return array_of(held, key == "$tensor")
    raise ValueError(f"holds {str(value)[:80]}, which stands for nothing")


def as_dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The dict of keys and values, each key once."""
    try:
        result = dict(pairs)
    except TypeError as error:
        raise ValueError(f"has a key that cannot be one: {error}") from None
    if len(result) != len(pairs):
        raise ValueError(f"has a key twice: {[key for key, _ in pairs]}")
    return result
