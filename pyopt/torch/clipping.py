"""torch.nn.utils' functions on norms of gradients, in one pass over all tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch

from pyopt._isa import kernels
from pyopt._lazy import summed
from pyopt._norms import clip_factor, norm_of
from pyopt.torch._tensors import TensorBatch, power_sum

Tensor = torch.Tensor
Tensors = Tensor | Iterable[Tensor]


def get_total_norm(
    tensors: Tensors, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """torch.nn.utils.get_total_norm: the norm of all tensors together, as a tensor without axes.

    Summed in double, as pyopt.get_total_norm does, the same bits for any number of threads. foreach changes nothing.
    """
    grads = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    batch = TensorBatch(grads, [None] * len(grads))
    return as_tensor(_norm(batch, grads, float(norm_type), error_if_nonfinite), grads)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_: multiplies all gradients by min(1, max_norm / (norm + 1e-6)).

    `optimizer.step(max_norm=...)` does the same in the step, and leaves the gradients as they are: that is faster.
    foreach changes nothing. See pyopt.clip_grad_norm_.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([w], max_norm=1.0)
        tensor(5.)
        >>> w.grad
        tensor([0.6000, 0.8000])
    """
    grads, params = _gradients(parameters)
    batch = TensorBatch(grads, params)
    norm = _norm(batch, grads, float(norm_type), error_if_nonfinite)
    _scale(batch, grads, clip_factor(float(max_norm), norm))
    return as_tensor(norm, grads)


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """torch.nn.utils.clip_grads_with_norm_: clip_grad_norm_ with a norm that is known; foreach changes nothing."""
    grads, params = _gradients(parameters)
    _scale(TensorBatch(grads, params), grads, clip_factor(float(max_norm), float(total_norm)))


@torch.no_grad()
def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """torch.nn.utils.clip_grad_value_: all elements between -clip_value and clip_value; foreach changes nothing.

    Of sparse gradients of rows the sums are meant: one that is not coalesced becomes so.
    """
    grads, params = _gradients(parameters)
    batch = TensorBatch(grads, params)
    repeated = [(k, rows, values) for k, rows, values in batch.rows if rows.count < len(values)]
    once = {k: _each_row_once(grads[k], rows, values) for k, rows, values in repeated}
    for k in set(range(len(grads))) - set(batch.places):
        if grads[k].layout is torch.sparse_coo and not grads[k].is_coalesced():
            once[k] = grads[k].coalesce()
    if once:
        grads = [once.get(k, grad) for k, grad in enumerate(grads)]
        batch = TensorBatch(grads, params)
    clip_value = float(clip_value)
    batch.apply(kernels.clamp, {"most": clip_value})
    for grad in _others(batch, grads):
        (grad._values() if grad.is_sparse else grad).clamp_(-clip_value, clip_value)
    for k, grad in once.items():
        params[k].grad = grad


def _each_row_once(grad: Tensor, rows: Any, values: Tensor) -> Tensor:
    """A sparse gradient with the sums of its rows."""
    found, sums = summed(rows, values.numpy())
    indices = torch.from_numpy(found)[None]
    return torch.sparse_coo_tensor(
        indices, torch.from_numpy(sums), grad.shape, is_coalesced=True, check_invariants=False
    )


def _gradients(parameters: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients and the parameters that they are of."""
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    params = [p for p in params if p.grad is not None]
    grads: list[Any] = [p.grad for p in params]
    return grads, params


def _norm(batch: TensorBatch, grads: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> float:
    if not norm_type > 0:  # numbers of elements, smallest ones: torch's
        return float(torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite))

    def sums_of(power: float, scale: float) -> list[float]:
        if len(batch.places) == len(grads):
            return batch.sums(power, scale)
        sums = dict(zip(batch.places, batch.sums(power, scale), strict=True))
        return [sums[k] if k in sums else power_sum(grad, power, scale) for k, grad in enumerate(grads)]

    norm = norm_of(sums_of, norm_type)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"the total norm of order {norm_type} of all gradients is {norm}: non-finite, so it cannot be clipped"
        )
    return norm


def as_tensor(norm: float, grads: list[Tensor]) -> Tensor:
    """A norm as torch returns it, in the type of the gradients."""
    dtypes = {grad.dtype: None for grad in grads}
    dtype = functools.reduce(torch.promote_types, dtypes).to_real() if dtypes else torch.get_default_dtype()
    return torch.tensor(norm, dtype=dtype)


def _scale(batch: TensorBatch, grads: list[Tensor], factor: float) -> None:
    if factor == 1:
        return
    batch.apply(kernels.scale, {"factor": factor})
    for grad in _others(batch, grads):
        grad.mul_(factor)


def _others(batch: TensorBatch, grads: list[Tensor]) -> list[Tensor]:
    """What the batch leaves to torch, each once."""
    left = batch.copied
    if len(batch.places) < len(grads):
        ours = set(batch.places)
        left = [*left, *(grad for k, grad in enumerate(grads) if k not in ours)]
    return list({id(grad): grad for grad in left}.values())
