"""Torch's own step, for what the kernels do not cover."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack

from pyopt.parameter import is_dense

HALVES = (torch.bfloat16, torch.float16)


def step_by_torch(optimizer: Any, left: list[tuple[int, torch.Tensor]], factor: float) -> None:
    """The step of the torch class behind an optimizer on some of its parameters.

    It runs on an object beside the optimizer with the same state, so that nobody ever sees other groups than all.

    Args:
        optimizer: one of pyopt.torch.
        left: the parameters, each with the index of its group.
        factor: of the gradients.
    """
    displaced = [t for _, p in left for t in _displaced(optimizer, p)]
    if displaced and len(left) > 1:  # in turn, for they may share memory
        for each in left:
            step_by_torch(optimizer, [each], factor)
        return
    places = [(t, t.data) for t in displaced]
    try:
        for t, place in places:
            t.data = place.clone()
        _step_by_torch(optimizer, left, factor)
    finally:
        for t, place in places:
            place.copy_(t.data)
            t.data = place


def _displaced(optimizer: Any, p: torch.Tensor) -> list[torch.Tensor]:
    """Tensors to which torch adds a sparse gradient, and which begin behind the start of their storage.

    torch (2.13) counts that distance twice there, and writes where other things lie.
    """
    if p.grad is None or p.grad.layout is not torch.sparse_coo:
        return []
    tensors = [p, *(value for value in optimizer.state.get(p, {}).values() if isinstance(value, torch.Tensor))]
    return [t for t in tensors if t.layout is torch.strided and t.storage_offset()]


def _step_by_torch(optimizer: Any, left: list[tuple[int, torch.Tensor]], factor: float) -> None:
    cls: Any = type(optimizer)
    beside = object.__new__(cls)
    vars(beside).update(vars(optimizer))
    for key in ("_pyopt_workspace", "_pyopt_grad_scale", "_pyopt_found_inf"):  # the scale is in the factor
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
    """The groups of what is left: split into lists of one kind where the user asked for `fused` or `foreach`."""
    result: dict[Any, dict[str, Any]] = {}
    for index, p in left:
        group = optimizer.param_groups[index]
        add_missing_state(optimizer, p, group)
        key: Any = index
        if group.get("fused"):
            key = index, fused_kind(optimizer, p)
        elif group.get("foreach"):
            key = index, type(p), type(p.grad)
        if key not in result:
            result[key] = {**group, "params": []}
            if key == (index, "no"):
                result[key]["fused"] = False
        result[key]["params"].append(p)
    return list(result.values())


def add_missing_state(optimizer: Any, p: torch.Tensor, group: dict[str, Any]) -> None:
    """torch makes state where there is no entry at all, and misses it where the user has one of their own."""
    entry = optimizer.state.get(p)
    if (
        entry
        and "step" not in entry
        and optimizer._core.counts_steps
        and entry.keys().isdisjoint(optimizer._core.state_names)
    ):
        side = optimizer._side(optimizer)
        if side.reason(group) is None:
            entry.update(side.new_state(p, group))


def fused_kind(optimizer: Any, p: torch.Tensor) -> str:
    """ "no" for a parameter that must not take torch's fused kernel; the others take it with all or no state."""
    state = optimizer.state.get(p) or {}
    tensors = [v for k, v in state.items() if k != "step" and v is not None]
    if p.device.type == "cpu":
        # There they walk through memory without a look at strides, and know no other layouts.
        first, *others = map(_local, (p, p.grad, *tensors))
        if first is None or p.dtype not in (*HALVES, torch.float32, torch.float64):
            return "no"
        if first.layout != torch.strided or not is_dense(first.shape, first.stride(), 1):
            return "no"
        if not all(each is not None and _lies_like(each, first) for each in others):
            return "no"
        if isinstance(optimizer, torch.optim.SGD) and p.dtype in HALVES and not fused_sgd_is_right(p.dtype):
            return "no"
    return "with state" if tensors else "without state"


def _local(tensor: Any) -> torch.Tensor | None:
    """The memory of a plain tensor or of this process's part of a DTensor; None for other kinds."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor  # type: ignore[no-any-return]
    return getattr(tensor, "_local_tensor", None)


def _lies_like(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.layout == b.layout and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


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
