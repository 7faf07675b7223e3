"""Whose step the parameters of an optimizer take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from pyopt.torch.step import KernelStepMixin, workspace_of


def explain(optimizer: Any) -> None:
    """Print per parameter whether the next step is pyopt's or torch's, and why.

    Args:
        optimizer: of pyopt.torch or of torch, or what wraps one as `.optimizer` or `.optim` (accelerate, ZeRO). Some
            reasons lie in the gradients: call it after backward.

    Raises:
        TypeError: an object of another kind.

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> w.grad = torch.ones(3)
        >>> optim.explain(optim.SGD([("weight", w)]))
        weight  (3,)  float32  pyopt
    """
    inner = unwrapped(optimizer)
    names = {id(p): name for group in inner.param_groups for p, name in names_of(group)}
    place = 0
    for index, p, reason in paths_of(inner):
        place = place + 1 if p is not inner.param_groups[index]["params"][0] else 0
        name = names.get(id(p), f"group {index}, parameter {place}")
        shape = "uninitialized" if is_lazy(p) else tuple(p.shape)
        path = "pyopt" if reason is None else f"torch: {reason}"
        when = "" if p.grad is not None else "  (once it has a gradient)"
        print(f"{name}  {shape}  {str(p.dtype).removeprefix('torch.')}  {path}{when}")


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within wrappers."""
    inner, seen = optimizer, set()
    while not isinstance(inner, KernelStepMixin) and id(inner) not in seen:
        seen.add(id(inner))
        inner = getattr(inner, "optimizer", None) or getattr(inner, "optim", None) or inner
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__qualname__}, must be an optimizer of torch or pyopt.torch, "
            "or wrap one as .optimizer or .optim"
        )
    return inner


def names_of(group: dict[str, Any]) -> Iterator[tuple[torch.Tensor, str]]:
    return zip(group["params"], group.get("param_names", ()), strict=False)


def paths_of(optimizer: torch.optim.Optimizer) -> list[tuple[int, torch.Tensor, str | None]]:
    """Per parameter the index of its group, and why its next step is torch's, or None."""
    if isinstance(optimizer, KernelStepMixin):
        return workspace_of(optimizer).explain(optimizer._side(optimizer))
    cls = type(optimizer)
    reason = f"its optimizer is {cls.__module__.removesuffix('.' + cls.__name__.lower())}.{cls.__qualname__}"
    return [(i, p, reason) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
