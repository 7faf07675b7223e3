"""Torch's own step, for what the kernels do not cover."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack

HALVES = (torch.bfloat16, torch.float16)


def step_by_torch(optimizer: Any, left: list[tuple[int, torch.Tensor]], factor: float) -> None:
    """The step of the torch class behind an optimizer on some of its parameters.

    It runs on an object beside the optimizer with the same state, so that nobody ever sees other groups than all.

    Args:
        optimizer: one of pyopt.torch.
        left: the parameters, each with the index of its group.
        factor: of the gradients.
    """
    cls: Any = type(optimizer)
    beside = object.__new__(cls)
    vars(beside).update(vars(optimizer))
    for key in ("_pyopt_table", "_pyopt_grad_scale", "_pyopt_found_inf"):  # the scale is in the factor
        vars(beside).pop(key, None)
    beside.param_groups = groups_of(optimizer, left)
    if factor == 1:
        _torch_step(cls)(beside)
        return
    grads = [(p, p.grad, p.grad * factor) for _, p in left if p.grad is not None]
    try:
        for p, _, unscaled in grads:
            p.grad = unscaled
        _torch_step(cls)(beside)
    finally:
        for p, grad, _ in grads:
            p.grad = grad


def groups_of(optimizer: Any, left: list[tuple[int, torch.Tensor]]) -> list[dict[str, Any]]:
    """The groups of what is left, one each for those that may take torch's fused kernels where these are asked for."""
    subsets: dict[Any, list[torch.Tensor]] = {}
    groups = optimizer.param_groups
    for index, p in left:
        key: Any = index
        if groups[index].get("fused"):
            key = index, *fused_kind(optimizer, p)
        if key in subsets:
            subsets[key].append(p)
        else:
            subsets[key] = [p]
    result = []
    for key, params in subsets.items():
        if isinstance(key, tuple):
            result.append({**groups[key[0]], "params": params, "fused": key[1]})
        else:
            result.append({**groups[key], "params": params})
    return result


def fused_kind(optimizer: Any, p: torch.Tensor) -> tuple[bool, bool]:
    """Whether a parameter may take torch's fused kernel, and whether it has state: the kernels want all or none."""
    state = optimizer.state.get(p) or {}
    tensors = [v for k, v in state.items() if k != "step" and v is not None]
    if p.device.type != "cpu":
        return True, bool(tensors)
    # On the CPU they walk through memory without a look at strides, and know no other layouts.
    first = _local(p)
    if first is None or p.dtype not in (*HALVES, torch.float32, torch.float64):
        return False, False
    others = [_local(t) for t in (p.grad, *tensors)]
    if not (
        first.layout == torch.strided
        and _is_dense(first)
        and all(t is not None and _lies_like(t, first) for t in others)
    ):
        return False, False
    if isinstance(optimizer, torch.optim.SGD) and p.dtype in HALVES and not fused_sgd_is_right(p.dtype):
        return False, False
    return True, bool(tensors)


def _local(tensor: Any) -> torch.Tensor | None:
    """The memory of a plain tensor or of this process's part of a DTensor; None for other kinds."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor  # type: ignore[no-any-return]
    return getattr(tensor, "_local_tensor", None)


def _lies_like(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.layout == b.layout and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie side by side, in any order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def fused_sgd_is_right(dtype: torch.dtype) -> bool:
    """Whether torch's fused SGD updates half types as a whole; 2.13 leaves out all but the last of a tensor."""
    return _len_torch_dispatch_stack() == 0 and _moves_whole_vectors(dtype)  # a mode would make it a dry run


@functools.cache
def _moves_whole_vectors(dtype: torch.dtype) -> bool:
    p, g = (torch.ones(64, dtype=dtype, device="cpu") for _ in range(2))
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0}
    options.update(nesterov=False, maximize=False, is_first_step=False)
    torch._fused_sgd_([p], [g], [], **options)
    return not p.any()


def _torch_step(cls: type) -> Callable[..., Any]:
    """The step of the torch class behind ours, without the hooks that torch wraps around it."""
    base = next(base for base in cls.__mro__ if base.__module__.startswith("torch.") and "step" in vars(base))
    step = vars(base)["step"]
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]
