"""Gradients of tables of which a step touches few rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyopt.parameter import check_c_order, check_type_beside, is_short

INDICES = (np.dtype(np.int32), np.dtype(np.int64))


class RowSparse:
    """The gradient of a table of which few rows were used: the gradients of those rows, the rest is zero.

        dense[i] = sum of values[k] over all k with indices[k] == i

    A step of an optimizer that takes it (SGD, Adagrad, SparseAdam, FTRL, RowwiseAdagrad, LazyAdamW) costs what the
    touched rows cost, not the table. A row that stands there several times gets the sum of its values, made in double
    and rounded once, and is stepped once; the result is the same for every number of threads.

    Args:
        indices: int32 or int64 array of shape (n,), 0 <= indices < shape[0], in any order, repeated or not.
        values: float32, float64, float16 or bfloat16 array of shape (n, *shape[1:]); float64 with float64 parameters.
        shape: of the parameter, at least one axis; the parameter must lie in C order.
        is_sorted: a promise that indices do not descend; the step checks it. They are looked at in any case.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: one of another shape.

        In a step, IndexError: an index that is negative or beyond the table; TypeError or ValueError: indices that
        descend though they are promised not to, a shape that is not the parameter's, a dtype that does not go with it.

    Example:
        >>> import numpy as np
        >>> import pyopt
        >>> table = np.zeros((5, 2))
        >>> gradient = RowSparse([3, 1, 3], np.array([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0]]), table.shape)
        >>> pyopt.SGD([table], lr=0.5).step(grads=[gradient])
        >>> table.tolist()
        [[0.0, 0.0], [-5.0, -10.0], [0.0, 0.0], [-2.0, -3.0], [0.0, 0.0]]

    The arrays are not copied. What a rule does to a row that has no gradient in a step, decay of momentum, of weights,
    it does not do to a row that is not touched: see the optimizers.
    """

    __slots__ = ("indices", "is_sorted", "shape", "values")

    def __init__(self, indices: Any, values: Any, shape: Sequence[int], *, is_sorted: bool = False) -> None:
        if isinstance(indices, (list, tuple)):
            indices = np.array(indices, np.int64) if all(type(i) is int for i in indices) else np.array(indices)
        self.indices = indices
        self.values = values
        self.shape = tuple(map(int, shape))
        self.is_sorted = bool(is_sorted)
        self.arrays("RowSparse")

    def arrays(self, what: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Indices and values side by side in memory, copied where they are not; `what` begins the messages."""
        indices, values = self.indices, self.values
        for name, array in (("indices", indices), ("values", values)):
            if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
                raise TypeError(f"{what}: {name} is a {type(array).__name__}, must be a numpy.ndarray")
        if indices.dtype not in INDICES or not indices.dtype.isnative:
            raise TypeError(f"{what}: indices has dtype {indices.dtype.str} ({indices.dtype}), must be int32 or int64")
        if not values.dtype.isnative or not (values.dtype in ("float32", "float64") or is_short(values.dtype)):
            raise TypeError(
                f"{what}: values has dtype {values.dtype.str} ({values.dtype}), must be native float32 or float64, "
                "float16 or bfloat16"
            )
        if not self.shape or min(self.shape) < 0:
            raise ValueError(f"{what}: shape is {self.shape}, must have one axis or more, none negative")
        if indices.ndim != 1:
            raise ValueError(f"{what}: indices has shape {indices.shape}, must have one axis")
        expected = (len(indices), *self.shape[1:])
        if values.shape != expected:
            raise ValueError(f"{what}: values has shape {values.shape}, must be {expected}: one row per index")
        return _in_order(indices), _in_order(values)

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    def to_dense(self) -> np.ndarray[Any, Any]:
        """The gradient as an array of the whole table, summed as a step sums it: of short types in float32.

        Raises:
            IndexError: an index that is negative or beyond the table.
        """
        indices, values = self.arrays("RowSparse")
        wrong = np.flatnonzero((indices < 0) | (indices >= self.shape[0]))
        if wrong.size:
            raise IndexError(bad_index("RowSparse", self, int(wrong[0])))
        dense = np.zeros(self.shape, np.float64)
        np.add.at(dense, indices, values.astype(np.float64))
        return dense.astype(np.float32 if is_short(values.dtype) else values.dtype)

    def __repr__(self) -> str:
        return f"RowSparse({len(self.indices)} rows of shape {self.shape}, dtype={self.values.dtype})"


def _in_order(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.require(array, requirements=["C", "A", "E"])


def bad_index(what: str, grad: Any, place: int) -> str:
    """The message for an index that is not of the table."""
    return f"{what}: indices[{place}] == {int(grad.indices[place])}, must be 0 to {grad.shape[0] - 1}"


def check_rows(what: str, data: np.ndarray[Any, Any], grad: RowSparse) -> tuple[Any, Any]:
    """Indices and values of the gradient of a table, in order, if they fit it."""
    indices, values = grad.arrays(f"{what}: gradient")
    check_type_beside(f"{what}: gradient: values", values.dtype, data.dtype)
    if grad.shape != data.shape:
        raise ValueError(f"{what}: gradient has shape {grad.shape}, must be {data.shape} like the parameter")
    check_c_order(what, data)
    return indices, values
