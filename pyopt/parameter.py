"""What an optimizer updates: arrays with their gradients, and the checks on both."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from numpy.lib.array_utils import byte_bounds

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
FLOAT16 = np.dtype(np.float16)


def is_short(dtype: np.dtype[Any]) -> bool:
    """Whether elements are float16 or bfloat16, the one of ml_dtypes: stored so, computed with in float32."""
    return dtype == FLOAT16 or (dtype.name == "bfloat16" and dtype.type.__module__ == "ml_dtypes")


def go_together(dtype: np.dtype[Any], other: np.dtype[Any]) -> bool:
    """Whether a rule can step a parameter of one type with a gradient or a state of another."""
    if np.dtype(np.float64) in (dtype, other):
        return dtype == other
    # The last as a file has tensors of bfloat16: bits with a name.
    return all(each == np.float32 or is_short(each) or each.names == ("bfloat16",) for each in (dtype, other))


def types_beside(dtype: np.dtype[Any]) -> str:
    """The types that go with a parameter of one, for messages."""
    return "float64 like the parameter" if dtype == np.float64 else f"float32, float16 or bfloat16 with {dtype}"


def check_type_beside(what: str, dtype: np.dtype[Any], of_parameter: np.dtype[Any]) -> None:
    """Raise unless a gradient or a state of this type goes with a parameter of another."""
    if not dtype.isnative or not (dtype == of_parameter or go_together(of_parameter, dtype)):
        raise TypeError(f"{what} has dtype {dtype}, must be {types_beside(of_parameter)}")


class Parameter:
    """An array to be optimized, and its gradient.

    Args:
        data: writable float32, float64, float16 or bfloat16 (of ml_dtypes) ndarray of any shape, dense in memory (C- or
            F-contiguous, or a transpose of such). It is not copied: the optimizer writes into it. Each step looks at it
            anew: a shape or strides that were set in place are followed, and an array that was made read-only is an
            error that names it.
        grad: gradient of the loss, same shape as `data`, in any memory order; None for "none". float64 with float64;
            with the others float32, float16 or bfloat16. Or the rows of it that are not zero, a RowSparse, where the
            optimizer takes it.
        name: used in error messages.

    Raises:
        TypeError: `data` is no ndarray, or of another dtype.
        ValueError: `data` is read-only, misaligned or not dense.

    Example:
        >>> w = Parameter(np.zeros(3, np.float32), name="w")
        >>> w.grad = np.ones(3, np.float32)
        >>> w
        Parameter(name='w', shape=(3,), dtype=float32, grad=True)

    It is no array: compute with `data`. `np.asarray(w)` gives it too.
    """

    __slots__ = ("__weakref__", "_data", "grad", "name")

    def __init__(self, data: np.ndarray[Any, Any], grad: Any = None, name: str | None = None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name == {name!r}, must be a str or None")
        self.name: str | None = name
        self.data = data
        self.grad: Any = grad

    @property
    def data(self) -> np.ndarray[Any, Any]:
        """The array; rebinding it is noticed at the next step."""
        return self._data

    @data.setter
    def data(self, data: np.ndarray[Any, Any]) -> None:
        self._data = check_data(f"parameter {self.name!r}" if self.name else "parameter", data)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(self._data.shape)

    @property
    def dtype(self) -> Any:
        """Of the array."""
        return self._data.dtype

    @property
    def ndim(self) -> int:
        """Number of axes of the array."""
        return self._data.ndim

    @property
    def size(self) -> int:
        """Number of elements of the array."""
        return self._data.size

    def __len__(self) -> int:
        return len(self._data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self._data, dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> NoReturn:
        self._no_arithmetic()

    def _no_arithmetic(self, *_: Any) -> NoReturn:
        name = f"the Parameter {self.name!r}" if self.name else "a Parameter"
        raise TypeError(f"{name} is no array: it has no arithmetic, comparisons, items or truth value, use its `.data`")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _no_arithmetic
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = _no_arithmetic
    __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _no_arithmetic
    __getitem__ = __setitem__ = __bool__ = _no_arithmetic

    def __repr__(self) -> str:
        name = f"name={self.name!r}, " if self.name else ""
        return f"Parameter({name}shape={self.data.shape}, dtype={self.data.dtype}, grad={self.grad is not None})"


def label(index: int, param: Any) -> str:
    """How messages call a parameter: by its name, else by its place over all groups."""
    name = getattr(param, "name", None)
    return f"parameter {name!r}" if name else f"parameter {index}"


def check_state_is_dict(what: str, entry: Any) -> None:
    """Raise unless the state of a parameter is a dict."""
    if not isinstance(entry, dict):
        raise TypeError(f"{what}: its state is a {type(entry).__name__}, must be a dict")


def check_data(what: str, data: Any) -> np.ndarray[Any, Any]:
    """The array, if the kernels can walk it."""
    if not isinstance(data, np.ndarray) or isinstance(data, np.ma.MaskedArray):
        raise TypeError(f"{what} is a {type(data).__name__}, must be a numpy.ndarray")
    if not data.dtype.isnative or not go_together(data.dtype, data.dtype):
        raise TypeError(
            f"{what} has dtype {data.dtype.str} ({data.dtype}), must be native float32 or float64, float16 or bfloat16"
        )
    if not data.flags.writeable:
        raise ValueError(f"{what} is read-only, must be writable")
    if not data.flags.aligned:
        raise ValueError(f"{what} is misaligned, must lie at a multiple of {data.dtype.alignment} bytes")
    if not is_dense(data.shape, data.strides, data.itemsize):
        raise ValueError(
            f"{what} has shape {data.shape} and strides {data.strides}, must be dense: its elements side by side in "
            "memory, in any order of the axes. Pass the array that this is a view of, or a copy."
        )
    return data


def check_c_order(what: str, data: np.ndarray[Any, Any]) -> None:
    """Raise unless the rows of a table lie one behind the other."""
    if not data.flags.c_contiguous:
        raise ValueError(
            f"{what} has shape {data.shape} and strides {data.strides}, must be in C order to be stepped row by row"
        )


def is_dense(shape: Sequence[int], strides: Sequence[int], unit: int) -> bool:
    """Whether the elements, each as long as `unit` in the strides, lie side by side, in any order of the axes."""
    expected = unit
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length != 1 and stride != expected:
            return 0 in shape
        expected *= length
    return True


def check_gradient(what: str, data: np.ndarray[Any, Any], grad: Any) -> np.ndarray[Any, Any]:
    """The gradient as an ndarray, if it fits the parameter; its memory order is free."""
    if not hasattr(grad, "__array__") or isinstance(grad, np.ma.MaskedArray):
        raise TypeError(f"{what}: gradient is a {type(grad).__name__}, must be an array of dtype {data.dtype}")
    grad = np.asarray(grad)
    array: np.ndarray[Any, Any] = grad
    check_type_beside(f"{what}: gradient", array.dtype, data.dtype)
    if array.shape != data.shape:
        raise ValueError(f"{what}: gradient has shape {array.shape}, must be {data.shape} like the parameter")
    return array


def check_long(what: str, data: np.ndarray[Any, Any], owner: str) -> np.ndarray[Any, Any]:
    """The array, if it is of a type that code without conversion can step."""
    if data.dtype not in DTYPES:
        raise TypeError(f"{what} has dtype {data.dtype}, must be float32 or float64 for {owner}")
    return data


def check_state_values(
    what: str, name: str, state: dict[str, Any], data: np.ndarray[Any, Any], by_row: bool = False
) -> None:
    """Raise unless the state has an array of this name with the parameter's shape, or a number per row, and a dtype
    that goes with the parameter's."""
    if name not in state:
        raise KeyError(f"{what}: state has no {name!r}, only {sorted(state)}; was an option that needs it turned on?")
    array = state[name]
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{what}: state {name!r} is a {type(array).__name__}, must be a numpy.ndarray")
    check_type_beside(f"{what}: state {name!r}", array.dtype, data.dtype)
    if by_row and array.shape != data.shape[:1]:
        raise ValueError(f"{what}: state {name!r} has shape {array.shape}, must be {data.shape[:1]}: a number per row")
    if not by_row and array.shape != data.shape:
        raise ValueError(f"{what}: state {name!r} has shape {array.shape}, must be {data.shape} like the parameter")


def check_state(what: str, name: str, state: dict[str, Any], data: np.ndarray[Any, Any], by_row: bool = False) -> None:
    """Raise unless the state array of this name can be walked together with the parameter."""
    check_state_values(what, name, state, data, by_row)
    array = check_data(f"{what}: state {name!r}", state[name])
    if by_row:
        check_c_order(what, data)
        return
    if not same_order(data.shape, array.strides, data.strides, array.itemsize, data.itemsize):
        raise ValueError(
            f"{what}: state {name!r} has strides {array.strides}, must have {data.strides} like the parameter"
        )


def check_master(what: str, name: str, array: Any, data: np.ndarray[Any, Any]) -> None:
    """Raise unless what is kept beside a short parameter can be walked together with it."""
    check_master_values(what, name, array, data)
    check_state(what, name, {name: array.view(data.dtype)}, data)


def check_master_values(what: str, name: str, array: Any, data: np.ndarray[Any, Any]) -> None:
    """Raise unless it has the parameter's shape, and its type."""
    dtype = np.dtype(np.int16) if name == "low_bits" else data.dtype
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != data.shape:
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{what}: state {name!r} is {found}, must be {dtype} of shape {data.shape}")


def check_codes(what: str, name: str, codes: Any, scales: Any, data: np.ndarray[Any, Any]) -> None:
    """Raise unless these are a state in 8 bits of a parameter, and its scales."""
    blocks = (data.size + 255) // 256
    for key, array, dtype, shape in (
        (name, codes, np.uint8, data.shape),
        (f"{name}_absmax", scales, np.float32, (blocks,)),
    ):
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
            raise TypeError(f"{what}: state {key!r} is {found}, must be {np.dtype(dtype)} of shape {shape}")
    if data.dtype == np.float64 or not (data.flags.c_contiguous and codes.flags.c_contiguous):
        raise ValueError(f"{what}: state {name!r} is in 8 bits, must be so in C order alone, and not of float64")


def check_average(what: str, average: Any, data: np.ndarray[Any, Any]) -> None:
    """Raise unless an average can be walked together with its parameter: of its type, float32 for a short one."""
    check_state(what, "average", {"average": average}, data)
    if average.dtype != (expected := average_type(data.dtype)):
        raise TypeError(f"{what}: its average has dtype {average.dtype}, must be {expected}")


def average_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of the average of a parameter."""
    return dtype if dtype in DTYPES else DTYPES[0]


def same_order(
    shape: Sequence[int], strides: Sequence[int], other: Sequence[int], size: int = 1, other_size: int = 1
) -> bool:
    """Whether two arrays of one shape, of elements of these sizes, lay them out alike; a length of 1 has no stride."""
    return 0 in shape or all(s * other_size == t * size for s, t, n in zip(strides, other, shape, strict=True) if n > 1)


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


def memory_ranges(arrays: Iterable[np.ndarray[Any, Any]]) -> list[Range]:
    """Where arrays that do not overlap lie, in ascending order."""
    return sorted((*byte_bounds(array), "", 0) for array in arrays if array.size)


def overlapping(arrays: Iterable[np.ndarray[Any, Any]]) -> set[int]:
    """The ids of the arrays that share memory with another one."""
    found = set()
    last, last_end = 0, 0
    for begin, end, key in sorted((*byte_bounds(array), id(array)) for array in arrays if array.size):
        if begin < last_end:
            found |= {last, key}
        if end > last_end:
            last, last_end = key, end
    return found


def overlaps_itself(shape: Sequence[int], strides: Sequence[int], unit: int = 1) -> bool:
    """Whether two elements may lie in the same place; unit is the size of an element in the unit of the strides."""
    reach = 0
    for stride, length in sorted((abs(stride), length) for stride, length in zip(strides, shape, strict=True)):
        if length > 1:
            if stride < reach + unit:
                return 0 not in shape
            reach += stride * (length - 1)
    return False


def apart_from(ranges: list[Range], grad: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The gradient, read-only; a copy of it if it lies in one of the ranges, which the step will write to."""
    begin, end = byte_bounds(grad)
    k = bisect_right(ranges, begin, key=lambda bounds: bounds[1])
    grad = grad.copy() if k < len(ranges) and ranges[k][0] < end else grad.view()
    grad.flags.writeable = False
    return grad
