"""Norms of gradients, and gradients made smaller: torch.nn.utils' functions on arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np

from pyopt._arrays import ArrayBatch, with_gradients
from pyopt._isa import kernels
from pyopt._lazy import summed
from pyopt._norms import clip_factor, norm_of
from pyopt.checks import non_negative, positive_or_inf
from pyopt.parameter import Parameter, check_no_overlap, memory_ranges
from pyopt.sparse import RowSparse


def get_total_norm(tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> float:
    """The norm of all arrays together, as if they were one vector: (sum of |x|**norm_type)**(1 / norm_type).

    Args:
        tensors: float32, float64, float16 or bfloat16 arrays in any memory order, and RowSparse of float32 or float64:
            a list, a mapping, nested in each other as they may be. None is passed over; of a `Parameter` it is the
            gradient. Of a RowSparse it is the norm of the rows' sums.
        norm_type: > 0; inf takes the largest |x|.
        error_if_nonfinite: whether a norm that is NaN or inf is an error.

    Returns:
        The norm, 0.0 of nothing. It is summed in double, in blocks of 1024 elements of each array as they lie in memory
        (those of a Parameter's gradient as the Parameter does), the blocks and the arrays in their order: the same bits
        for any number of threads.

    Raises:
        TypeError, ValueError: what is no such array, or an argument out of its bounds.
        IndexError: an index of a RowSparse that is not of its table.
        RuntimeError: the norm is not finite, and error_if_nonfinite.

    Example:
        >>> get_total_norm([np.array([3.0]), np.array([4.0])])
        5.0

    torch's function of the same name takes the norm of the norms, in the type of the tensors.
    """
    return _norm(ArrayBatch(*_gradients(tensors, "tensors"), False), norm_type, error_if_nonfinite)


def clip_grad_norm_(
    parameters: Any, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> float:
    """Multiply all gradients, in place, by min(1, max_norm / (norm + 1e-6)).

    `optimizer.step(max_norm=...)` does the same in the step, and leaves the gradients as they are: that is faster.

    Args:
        parameters: Parameters, whose gradients are meant; or writable arrays and RowSparse, which are the gradients. A
            list, a mapping, nested in each other as they may be; None is passed over. Of a RowSparse the values are
            multiplied.
        max_norm: the norm that is left at most, > 0; inf changes nothing.
        norm_type, error_if_nonfinite: see `get_total_norm`.

    Returns:
        The norm before.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: see `get_total_norm`; a gradient that is read-only, or overlaps
            another in memory and is not the same. Nothing has changed then.

    Example:
        >>> w = Parameter(np.zeros(2), grad=np.array([3.0, 4.0]))
        >>> clip_grad_norm_([w], max_norm=1.0)
        5.0
        >>> w.grad.round(3)
        array([0.6, 0.8])

    Source: torch.nn.utils.clip_grad_norm_; R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent
    neural networks" (2013), section 3.2. A gradient of two parameters is multiplied once.
    """
    positive_or_inf("max_norm", max_norm)
    batch = _batch(parameters)
    norm = _norm(batch, norm_type, error_if_nonfinite)
    _scale(batch, clip_factor(max_norm, norm))
    return norm


def clip_grads_with_norm_(parameters: Any, max_norm: float, total_norm: float) -> None:
    """`clip_grad_norm_` with a norm that is known: multiply all gradients by min(1, max_norm / (total_norm + 1e-6)).

    Args:
        parameters, max_norm: see `clip_grad_norm_`.
        total_norm: the norm of all gradients, >= 0, also those of other processes; NaN makes all of them NaN.

    Raises:
        TypeError, ValueError: see `clip_grad_norm_`.

    Example:
        >>> w = Parameter(np.zeros(1), grad=np.array([4.0]))
        >>> clip_grads_with_norm_([w], max_norm=1.0, total_norm=8.0)
        >>> w.grad.round(3)
        array([0.5])
    """
    positive_or_inf("max_norm", max_norm)
    if not (isinstance(total_norm, float) and not math.isfinite(total_norm) and total_norm != -math.inf):
        non_negative("total_norm", total_norm)
    _scale(_batch(parameters), clip_factor(max_norm, total_norm))


def clip_grad_value_(parameters: Any, clip_value: float) -> None:
    """Bring all elements of the gradients, in place, between -clip_value and clip_value; NaN stays.

    Args:
        parameters: see `clip_grad_norm_`. Of a RowSparse the sums of the rows are meant: one that has a row several
            times gets new indices and values, each row once.
        clip_value: >= 0.

    Raises:
        TypeError, ValueError: see `clip_grad_norm_`.

    Example:
        >>> w = Parameter(np.zeros(3), grad=np.array([3.0, -0.5, -4.0]))
        >>> clip_grad_value_([w], 1.0)
        >>> w.grad
        array([ 1. , -0.5, -1. ])
    """
    if clip_value != math.inf:
        non_negative("clip_value", clip_value)
    grads, owners, names = _gradients(parameters, "parameters")
    batch = _batch_of(grads, owners, names)
    once = []
    for k, rows, values in batch.rows:
        if rows.count < len(values):
            once.append((grads[k], RowSparse(*summed(rows, values), grads[k].shape, is_sorted=True)))
            grads[k] = once[-1][1]
    if once:
        batch = _batch_of(grads, owners, names)
    batch.apply(kernels.clamp, {"most": clip_value})
    for grad, sums in once:
        grad.indices, grad.values, grad.is_sorted = sums.indices, sums.values, True


def check_norm_type(norm_type: float) -> None:
    """Raise unless it is > 0 or inf."""
    positive_or_inf("norm_type", norm_type)


def check_finite(norm: float, norm_type: float) -> None:
    """Raise for a norm that is NaN or inf."""
    if not math.isfinite(norm):
        raise RuntimeError(f"the norm of order {norm_type} of all gradients is {norm}, must be finite to clip them")


def _norm(batch: ArrayBatch, norm_type: float, error_if_nonfinite: bool) -> float:
    check_norm_type(norm_type)
    norm = norm_of(batch.sums, norm_type)
    if error_if_nonfinite:
        check_finite(norm, norm_type)
    return norm


def _scale(batch: ArrayBatch, factor: float) -> None:
    if factor != 1:
        batch.apply(kernels.scale, {"factor": factor})


def _batch(parameters: Any) -> ArrayBatch:
    """The gradients of parameters, to be written to."""
    return _batch_of(*_gradients(parameters, "parameters"))


def _batch_of(grads: list[Any], owners: list[Parameter | None], names: list[str | None]) -> ArrayBatch:
    batch = ArrayBatch(grads, owners, names, True)
    if batch.copied:  # a batch sees overlaps among those alone that it goes over where they lie
        arrays = [grad.values if isinstance(grad, RowSparse) else grad for grad in grads]
        unique = {(*ends, array.strides): array for array in arrays for *ends, _, _ in memory_ranges([array])}
        check_no_overlap([(b, e, f"gradient {i}", i) for i, (b, e, _) in enumerate(unique)])
    return batch


def _gradients(tree: Any, what: str) -> tuple[list[Any], list[Parameter | None], list[str | None]]:
    """Gradients; the Parameters that they are of, None for arrays by themselves; their names in mappings, or None."""
    if isinstance(tree, (str, Set)) or not isinstance(tree, (Parameter, RowSparse, np.ndarray, Iterable)):
        raise TypeError(f"{what} is a {type(tree).__name__}, must be an iterable of Parameters or arrays, or a mapping")
    tree = tree if isinstance(tree, (Parameter, RowSparse, np.ndarray, Mapping)) else list(tree)
    if isinstance(tree, list) and (params := with_gradients(tree)) is not None:
        return [p.grad for p in params], params, [None] * len(params)
    grads, owners, names = [], [], []
    for grad, owner, name in _walk(tree, ""):
        grads.append(grad)
        owners.append(owner)
        names.append(name or None)
    return grads, owners, names


def _walk(tree: Any, path: str) -> Iterator[tuple[Any, Parameter | None, str]]:
    if isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[0], str):  # with its name
        yield from _walk([tree[1]], tree[0])
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _walk([value], f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            if type(item) is Parameter or isinstance(item, Parameter):
                if item.grad is not None:
                    yield item.grad, item, path
            elif item is not None:
                yield from _walk(item, path)
    elif isinstance(tree, Parameter):
        yield from _walk([tree], path)
    else:
        yield tree, None, path
