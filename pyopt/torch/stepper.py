"""The step of the torch optimizers: pyopt's table for what its kernels cover, torch's own step for the rest."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch._C import _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.optim import optimizer as torch_optimizer

import pyopt
from pyopt.torch._tensors import TensorWorkspace

Group = dict[str, Any]
GLOBAL_HOOKS = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)


class Stepper:
    """Mixin in front of a torch optimizer: its `step`, by the rule of the pyopt optimizer `core`.

    Covered are dense float32 and float64 tensors on the CPU, with gradients of any memory order. What is not (sparse
    gradients, complex and half precision, other devices, tensor subclasses, `differentiable=True`, parameters whose
    elements do not lie side by side or that share memory) takes the for-loop of torch's own step, per parameter; so
    does all of a step that a dispatch mode, a tracer or forward-mode differentiation follows.
    """

    _core: ClassVar[type[pyopt.Optimizer]]
    state: Any
    defaults: Group
    param_groups: list[Group]
    _optimizer_step_pre_hooks: dict[int, Any]
    _optimizer_step_post_hooks: dict[int, Any]

    def __init_subclass__(cls, core: type[pyopt.Optimizer] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if core is not None:
            cls._core = core

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, once; returns what the closure returned, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf):
            return loss
        factor = 1.0 if grad_scale is None else float(torch.as_tensor(grad_scale, dtype=torch.float64).reciprocal())
        if _watched():
            groups = enumerate(self.param_groups)
            self._step_by_torch([(i, p) for i, group in groups for p in group["params"] if p.grad is not None], factor)
        else:
            _table(self).step(Side(self), None, factor)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler hands over grad_scale and found_inf, and leaves the gradients as they are.

        Not where hooks or a step of the user's own see them: they expect gradients without the scale.
        """
        hooks = (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, *GLOBAL_HOOKS)
        step = inspect.unwrap(self.step)
        return not any(hooks) and getattr(step, "__func__", step) is Stepper.step

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, supports: bool) -> None:
        """torch's constructors set it with fused=True."""

    def _step_by_torch(self, left: list[tuple[int, torch.Tensor]], factor: float) -> None:
        """Torch's step on these parameters alone; on the CPU its for-loop, since its fused kernels ignore strides."""
        subsets: dict[tuple[int, bool], list[torch.Tensor]] = defaultdict(list)
        for index, p in left:
            subsets[index, p.device.type == "cpu"].append(p)
        groups = []
        for (index, on_cpu), params in subsets.items():
            group = {**self.param_groups[index], "params": params}
            if on_cpu:
                group.update({key: False for key in ("fused", "foreach") if key in group})
            groups.append(group)
        # The scale is pyopt's matter: torch's for-loop wants gradients without it.
        hidden: dict[str, Any] = {
            key: self.__dict__.pop(key) for key in ("grad_scale", "found_inf") if key in self.__dict__
        }
        grads = {p: p.grad for _, p in left} if factor != 1 else {}
        whole, self.param_groups = self.param_groups, groups
        try:
            for p, grad in grads.items():
                p.grad = grad * factor if grad is not None else None
            _torch_step(type(self))(self)
        finally:
            self.param_groups = whole
            self.__dict__.update(hidden)
            for p, grad in grads.items():
                p.grad = grad


class Side:
    """What the table asks of an optimizer, answered for one of torch's by the pyopt optimizer behind it.

    A class of its own, so that subclasses of the optimizer are free in their names.
    """

    def __init__(self, optimizer: Stepper) -> None:
        self.optimizer = optimizer
        self.core = core = optimizer._core
        self.rule, self.counts_steps, self.state_names = core.rule, core.counts_steps, core.state_names
        self.number_states = core.number_states
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def check_group(self, group: Group) -> None:
        """torch checks in its constructors alone."""

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        """The numbers of the rule; older torch has fewer hyper-parameters in its groups."""
        return self.core.scalars(self, {**self.core.later, **group}, step)  # type: ignore[arg-type]

    def state_streams(self, group: Group) -> tuple[str | None, ...] | None:
        """The state behind each stream of the rule, None for a group that is left to torch."""
        return None if self.reason(group) else self.core.state_streams(self, group)  # type: ignore[arg-type]

    @staticmethod
    def reason(group: Group) -> str | None:
        """Why a whole group is left to torch."""
        return next((f"{key}=True" for key in ("differentiable", "capturable") if group.get(key)), None)

    @torch.no_grad()
    def new_state(self, p: torch.Tensor, group: Group) -> dict[str, Any]:
        """The state of a parameter before its first step, as torch makes it."""
        state: dict[str, Any] = {}
        if self.counts_steps:
            double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
            state["step"] = torch.zeros((), dtype=torch.float64 if double else torch.float32)
        for name in filter(None, self.state_streams(group) or ()):
            value = self.core.initial_value(self, name, self.defaults)  # type: ignore[arg-type]
            state[name] = torch.full_like(p, value, memory_format=torch.preserve_format)
        return state

    def step_by_torch(self, left: list[tuple[int, torch.Tensor]], factor: float) -> None:
        """The step of what is left to torch."""
        self.optimizer._step_by_torch(left, factor)


def _table(optimizer: Stepper) -> TensorWorkspace:
    """The optimizer's; torch's __getstate__ leaves it behind in copies."""
    table = vars(optimizer).get("_pyopt_table")
    if table is None:
        table = vars(optimizer)["_pyopt_table"] = TensorWorkspace()
    return table


def _watched() -> bool:
    """Whether somebody follows what torch computes: dispatch modes, tracers, forward-mode differentiation."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or _len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0


def _torch_step(cls: type) -> Callable[..., Any]:
    """The step of the torch class behind ours, without the hooks that torch wraps around it."""
    base = next(base for base in cls.__mro__ if base.__module__.startswith("torch.") and "step" in vars(base))
    step = vars(base)["step"]
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


def explain(optimizer: Stepper) -> None:
    """Print per parameter whether the next step is pyopt's or torch's, and why.

    Args:
        optimizer: one of pyopt.torch. Some reasons lie in the gradients: call it after backward.

    Raises:
        TypeError: an optimizer of another kind.

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> w.grad = torch.ones(3)
        >>> optim.explain(optim.SGD([("weight", w)]))
        weight  (3,)  float32  pyopt
    """
    if not isinstance(optimizer, Stepper):
        raise TypeError(f"optimizer is a {type(optimizer).__module__} optimizer, must be one of pyopt.torch")
    place = 0
    for index, p, reason in _table(optimizer).explain(Side(optimizer)):
        group = optimizer.param_groups[index]
        place = place + 1 if p is not group["params"][0] else 0
        name = group["param_names"][place] if "param_names" in group else f"group {index}, parameter {place}"
        shape = "uninitialized" if is_lazy(p) else tuple(p.shape)
        path = "pyopt" if reason is None else f"torch: {reason}"
        when = "" if p.grad is not None else "  (once it has a gradient)"
        print(f"{name}  {shape}  {str(p.dtype).removeprefix('torch.')}  {path}{when}")
