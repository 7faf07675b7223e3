"""What an optimizer updates: arrays with their gradients, and the checks on both."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Set
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


class Parameter:
    """An array to be optimized, and its gradient.

    Args:
        data: writable float32 or float64 ndarray of any shape, dense in memory (C- or F-contiguous, or a transpose of
            such). It is not copied: the optimizer holds its buffer and writes into it, also if the array is made
            read-only later.
        grad: gradient of the loss, same shape and dtype as `data`, in any memory order; None for "none".
        name: used in error messages.

    Raises:
        TypeError: `data` is no ndarray, or of another dtype.
        ValueError: `data` is read-only, misaligned or not dense.

    Example:
        >>> w = Parameter(np.zeros(3, np.float32), name="w")
        >>> w.grad = np.ones(3, np.float32)
        >>> w
        Parameter(name='w', shape=(3,), dtype=float32, grad=True)
    """

    __slots__ = ("__weakref__", "_data", "grad", "name")

    def __init__(self, data: np.ndarray[Any, Any], grad: Any = None, name: str | None = None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name == {name!r}, must be a str or None")
        self.name = name
        self.data = data
        self.grad = grad

    @property
    def data(self) -> np.ndarray[Any, Any]:
        """The array; rebinding it is noticed at the next step."""
        return self._data

    @data.setter
    def data(self, data: np.ndarray[Any, Any]) -> None:
        self._data = check_data(f"parameter {self.name!r}" if self.name else "parameter", data)

    def __repr__(self) -> str:
        name = f"name={self.name!r}, " if self.name else ""
        return f"Parameter({name}shape={self.data.shape}, dtype={self.data.dtype}, grad={self.grad is not None})"


def as_parameters(params: Any, first: int) -> tuple[list[Parameter], list[str] | None]:
    """The "params" of a group as a list of Parameters, and their names where they came as (name, array) pairs.

    first is the number of parameters in the groups before, for messages.
    """
    if isinstance(params, (np.ndarray, Parameter)):
        params = [params]
    if isinstance(params, (str, Mapping, Set)) or not isinstance(params, Iterable):
        raise TypeError(f"'params' is a {type(params).__name__}, must be an ordered iterable of arrays")
    parameters = []
    names = []
    for i, item in enumerate(params, first):
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            names.append(item[0])
            item = item[1]
        if not isinstance(item, Parameter):
            name = names[-1] if len(names) > i - first else None
            check_data(f"parameter {name!r}" if name else f"parameter {i}", item)
            item = Parameter(item, name=name)
        elif item.name is None and len(names) > i - first:
            item.name = names[-1]
        parameters.append(item)
    if names and len(names) != len(parameters):
        raise ValueError(f"{len(names)} of {len(parameters)} parameters of a group have names, must be all or none")
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the name {duplicates[0]!r} stands for two parameters of a group, must be unique")
    return parameters, names or None


def label(index: int, param: Any) -> str:
    """How messages call a parameter: by its name, else by its place over all groups."""
    name = getattr(param, "name", None)
    return f"parameter {name!r}" if name else f"parameter {index}"


def check_data(what: str, data: Any) -> np.ndarray[Any, Any]:
    """The array, if the kernels can walk it."""
    if not isinstance(data, np.ndarray) or isinstance(data, np.ma.MaskedArray):
        raise TypeError(f"{what} is a {type(data).__name__}, must be a numpy.ndarray")
    if data.dtype not in DTYPES or not data.dtype.isnative:
        raise TypeError(f"{what} has dtype {data.dtype.str} ({data.dtype}), must be native float32 or float64")
    if not data.flags.writeable:
        raise ValueError(f"{what} is read-only, must be writable")
    if not data.flags.aligned:
        raise ValueError(f"{what} is misaligned, must lie at a multiple of {data.dtype.alignment} bytes")
    if not is_dense(data):
        raise ValueError(
            f"{what} has shape {data.shape} and strides {data.strides}, must be dense: its elements side by side in "
            "memory, in any order of the axes. Pass the array that this is a view of, or a copy."
        )
    return data


def is_dense(array: np.ndarray[Any, Any]) -> bool:
    """Whether the elements lie side by side: contiguous after a permutation of the axes."""
    axes = sorted(range(array.ndim), key=lambda axis: array.strides[axis], reverse=True)
    return bool(array.transpose(axes).flags.c_contiguous)


def check_gradient(what: str, data: np.ndarray[Any, Any], grad: Any) -> np.ndarray[Any, Any]:
    """The gradient as an ndarray, if it fits the parameter; its memory order is free."""
    if not hasattr(grad, "__array__") or isinstance(grad, np.ma.MaskedArray):
        raise TypeError(f"{what}: gradient is a {type(grad).__name__}, must be an array of dtype {data.dtype}")
    grad = np.asarray(grad)
    array: np.ndarray[Any, Any] = grad
    if array.dtype != data.dtype:
        raise TypeError(f"{what}: gradient has dtype {array.dtype}, must be {data.dtype} like the parameter")
    if array.shape != data.shape:
        raise ValueError(f"{what}: gradient has shape {array.shape}, must be {data.shape} like the parameter")
    return array


def check_state_values(what: str, name: str, state: dict[str, Any], data: np.ndarray[Any, Any]) -> None:
    """Raise unless the state has an array of this name with the parameter's shape and dtype."""
    if name not in state:
        raise KeyError(f"{what}: state has no {name!r}, only {sorted(state)}; was an option that needs it turned on?")
    array = state[name]
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{what}: state {name!r} is a {type(array).__name__}, must be a numpy.ndarray")
    if array.dtype != data.dtype:
        raise TypeError(f"{what}: state {name!r} has dtype {array.dtype}, must be {data.dtype} like the parameter")
    if array.shape != data.shape:
        raise ValueError(f"{what}: state {name!r} has shape {array.shape}, must be {data.shape} like the parameter")


def check_state(what: str, name: str, state: dict[str, Any], data: np.ndarray[Any, Any]) -> None:
    """Raise unless the state array of this name can be walked together with the parameter."""
    check_state_values(what, name, state, data)
    array = check_data(f"{what}: state {name!r}", state[name])
    strides = [[s for s, n in zip(a.strides, a.shape, strict=True) if n > 1] for a in (array, data)]
    if array.size and strides[0] != strides[1]:
        raise ValueError(
            f"{what}: state {name!r} has strides {array.strides}, must have {data.strides} like the parameter"
        )


Range = tuple[int, int, str, int]  # addresses, the end excluded; what lies there, and of which parameter


def check_no_overlap(ranges: Iterable[Range]) -> list[Range]:
    """The ranges that are not empty, in ascending order; ValueError if two share memory."""
    ordered = sorted(r for r in ranges if r[0] < r[1])
    for (begin, end, first, _), (other_begin, other_end, second, _) in pairwise(ordered):
        if other_begin < end:
            same = "the same array" if (begin, end) == (other_begin, other_end) else "overlapping memory"
            raise ValueError(f"{first} and {second} share {same}; each must have its own")
    return ordered


def parameter_ranges(params: Iterable[Parameter]) -> list[Range]:
    """Where parameters lie in memory."""
    return [(*byte_bounds(p.data), label(i, p), i) for i, p in enumerate(params) if p.data.size]


def apart_from(ranges: list[Range], grad: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The gradient, read-only; a copy of it if it lies in one of the ranges, which the step will write to."""
    begin, end = byte_bounds(grad)
    k = bisect_right(ranges, begin, key=lambda bounds: bounds[1])
    grad = grad.copy() if k < len(ranges) and ranges[k][0] < end else grad.view()
    grad.flags.writeable = False
    return grad
