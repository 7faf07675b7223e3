"""The step of the torch optimizers: pyopt's workspace for what its kernels cover, torch's own step for the rest."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad, profiler
from torch.optim import optimizer as torch_optimizer

import pyopt
from pyopt import checks, storage
from pyopt._asked import Average, asked
from pyopt._options import check_options
from pyopt.torch._tensors import BlockLeft, TensorWorkspace
from pyopt.torch.fallback import step_by_torch
from pyopt.torch.flat import FlatState, zero_flattened

Group = dict[str, Any]
Step = TypeVar("Step", bound=Callable[..., Any])
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

NO_AVERAGES: list[Average] = []
GLOBAL_PRE_HOOKS = torch_optimizer._global_optimizer_pre_hooks
GLOBAL_POST_HOOKS = torch_optimizer._global_optimizer_post_hooks


def hidden_from_dynamo(function: Step) -> Step:
    """torch.compile breaks its graph at a call of this function once, and looks at nothing that it calls.

    As torch._dynamo.disable does, but without a wrapper that costs every step, and without importing torch._dynamo.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    frames: Any = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    else:  # older torch looks at what the function calls
        frames.skip_code(function.__code__)
    return function


def hooked_where_somebody_looks(function: Step) -> Step:
    """`step` with what torch's constructor wraps around it, where there is a hook or a profiler to see it.

    The wrapper takes longer than the step of a small tensor.
    """
    observed: Any = torch_optimizer.Optimizer.profile_hook_step(function)

    @functools.wraps(function)
    def step(self: KernelStepMixin, *args: Any, **kwargs: Any) -> Any:
        try:
            if (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or GLOBAL_PRE_HOOKS
                or GLOBAL_POST_HOOKS
                or profiler._is_profiler_enabled
                or _profiler_enabled()
            ) and getattr(type(self).step, "__code__", None) is not observed.__code__:  # a subclass's step has run them
                return observed(self, *args, **kwargs)
            return function(self, *args, **kwargs)
        except BaseException:
            for key in ("_pyopt_grad_scale", "_pyopt_found_inf"):  # of this step alone
                self.__dict__.pop(key, None)
            raise

    step.hooked = True  # type: ignore[attr-defined]
    return hidden_from_dynamo(cast(Step, step))


class FromScaler:
    """`grad_scale` or `found_inf`. What GradScaler sets counts while its call runs: one that raises leaves nothing."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.key = name, f"_pyopt_{name}"

    def __get__(self, optimizer: KernelStepMixin | None, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        value, scaler = vars(optimizer).get(self.key, (self, None))
        if scaler is not None and not is_running(scaler):
            del vars(optimizer)[self.key]
            value = self
        if value is self:
            raise AttributeError(f"{type(optimizer).__name__!r} object has no attribute {self.name!r}")
        return value

    def __set__(self, optimizer: KernelStepMixin, value: Any) -> None:
        caller = sys._getframe(1)
        is_scaler = caller.f_globals.get("__name__") == "torch.amp.grad_scaler"
        vars(optimizer)[self.key] = value, caller if is_scaler else None

    def __delete__(self, optimizer: KernelStepMixin) -> None:
        if vars(optimizer).pop(self.key, None) is None:
            raise AttributeError(self.name)


def is_running(call: FrameType) -> bool:
    """Whether a call is not over yet, asked from within it or after it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is call


class KernelStepMixin:
    """Mixin in front of a torch optimizer: its `step`, by the rule of the pyopt optimizer `core`.

    Covered are dense tensors of float32, float64, bfloat16 and float16 on the CPU, with gradients of any memory
    order; in SGD, Adagrad, SparseAdam, FTRL and RowwiseAdagrad sparse ones of rows too, unless momentum or weight
    decay would move other rows. The short types are computed in float32 and rounded once,
    where torch's default rounds after each operation. What is not covered (other sparse gradients, complex numbers,
    other devices, tensor subclasses, `differentiable=True`, parameters whose elements do not lie side by side or
    that share memory) take torch's own step; so does all of a step that a dispatch mode, a tracer or forward-mode
    differentiation follows.
    """

    _core: ClassVar[type[pyopt.Optimizer]]
    _side: ClassVar[type[Side]]
    _workspace_type: ClassVar[type[TensorWorkspace]] = TensorWorkspace
    state: Any
    defaults: Group
    param_groups: list[Group]
    _optimizer_step_pre_hooks: dict[int, Any]
    _optimizer_step_post_hooks: dict[int, Any]
    _averages: list[Average] = NO_AVERAGES
    grad_scale = FromScaler()
    found_inf = FromScaler()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        stored = {key: kwargs.pop(key) for key in storage.Storage.__annotations__.keys() & kwargs.keys()}
        self._check_storage(stored)
        super().__init__(*args, **kwargs)
        if stored := storage.checked(stored):  # else the groups are those of torch
            for group in (self.defaults, *self.param_groups):
                group.update({**stored, **group})
        side = self._side(self)
        for group in self.param_groups:
            if self.state and storage.checked(group):  # torch's Adagrad makes it at once
                for p in group["params"]:
                    self.state[p].update(side.new_state(p, {**side.later, **checks.plain(group)}))

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; of the options of pyopt.Storage in the group the plain form is kept."""
        if isinstance(param_group, dict):
            self._check_storage(param_group)
        with workspace_of(self):
            super().add_param_group(param_group)  # type: ignore[misc]
            self.param_groups[-1].update(storage.checked(self.param_groups[-1]))

    def _check_storage(self, options: Group) -> None:
        """Raise for an option of pyopt.Storage that is not right, or that the optimizer has not."""
        storage.check_for(type(self).__name__, self._core, storage.checked(options))

    def __init_subclass__(cls, core: type[pyopt.Optimizer] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if core is not None:
            cls._core = core
            if "__init__" not in vars(cls):
                cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]
            names = ["rule", "counts_steps", "number_states", "shared_numbers", "state_names", "later", "short_types"]
            names += ["unsigned_states", "needs_rows"]
            declared = {name: getattr(core, name) for name in names}
            declared["has_int_steps"] = core is pyopt.SparseAdam
            cls._side = type("Side", (Side,), {"__slots__": (), "core": core, **declared})

    @hooked_where_somebody_looks
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        nonfinite: str = "apply",
        zero_grad: bool | str = False,
        gradient_factor: float = 1.0,
    ) -> Any:
        """Update every parameter that has a gradient, once; returns what the closure returned, or None.

        max_norm, nonfinite, zero_grad and gradient_factor are those of pyopt.Optimizer.step: clipping, the refusal of
        NaN and inf, zeros for the gradients, and what they count times, in the pass over memory that the step is.
        """
        what = asked(max_norm, nonfinite, zero_grad, gradient_factor)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        attributes = self.__dict__
        factor = 1.0
        if "_pyopt_found_inf" in attributes and float(getattr(self, "found_inf", 0) or 0):
            if zero_grad:
                self.zero_grad(zero_grad == "set_to_none")
            return loss
        if "_pyopt_grad_scale" in attributes:
            scale = getattr(self, "grad_scale", None)
            factor = 1.0 if scale is None else float(torch.as_tensor(scale, dtype=torch.float64).reciprocal())
        workspace = attributes.get("_pyopt_workspace") or workspace_of(self)
        if is_observed():
            if isinstance(self.state, FlatState):
                self.state.release_all()  # torch steps by parameter
            workspace.step_by(self._step_observed, self._side(self), None, what, factor)
        else:
            try:
                workspace.step(self._side(self), None, what, factor)
            except BlockLeft:
                workspace.step_apart(self._side(self), None, what, factor)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the gradients of flattened parameters are filled with zeros."""
        zero_flattened(self.param_groups, functools.partial(super().zero_grad, set_to_none))  # type: ignore[misc]

    def _step_observed(self, grads: list[Any] | None, factor: float) -> None:
        groups = enumerate(self.param_groups)
        left = [(i, p) for i, group in groups for p in group["params"] if p.grad is not None]
        refuse_storage(self, left, "for a step that a dispatch mode, a tracer or forward-mode differentiation follows")
        self._step_by_torch(left, factor)

    def _stage(self) -> tuple[TensorWorkspace, Side]:
        """The workspace of the steps, and what it asks."""
        return workspace_of(self), self._side(self)

    @property
    def last_grad_norm(self) -> float | None:
        """The norm of all gradients in the last step that computed it, for max_norm or nonfinite; None before."""
        return workspace_of(self).last_grad_norm

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for a norm that was not finite; can be set."""
        return workspace_of(self).skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, steps: int) -> None:
        checks.count("skipped_steps", steps)
        workspace_of(self).skipped_steps = steps

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and not in the middle of a step of another thread."""
        with workspace_of(self):
            return super().state_dict()  # type: ignore[misc, no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, and not in the middle of a step of another thread.

        The options of pyopt.Storage are the optimizer's own where a group of the checkpoint has none of them. In a
        group that has any, arrays keep the type in which they were saved; torch's type of the parameter in the others.
        """
        vars(self)["_pyopt_loading"] = loading = {"stored": [storage.checked(group) for group in self.param_groups]}
        capture = self.register_load_state_dict_pre_hook(  # type: ignore[attr-defined]
            lambda _, state_dict: loading.update(saved=state_dict)
        )
        try:
            with workspace_of(self):
                super().load_state_dict(state_dict)  # type: ignore[misc]
        finally:
            capture.remove()
            vars(self).pop("_pyopt_loading", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = vars(self).pop("_pyopt_loading", None)
        if loading is not None:
            keep_types(loading["saved"], state, loading["stored"], self._core.number_states)
        super().__setstate__(state)  # type: ignore[misc]

    def _step_by_torch(self, left: list[tuple[int, torch.Tensor]], factor: float) -> None:
        """Torch's step on these parameters alone, gradients multiplied by factor."""
        step_by_torch(self, left, factor)


def signature_of(cls: type) -> inspect.Signature:
    """The arguments of the torch class behind one of ours, and those of pyopt.Storage."""
    base = next(base for base in cls.__mro__ if base.__module__.startswith("torch."))
    of_torch = inspect.signature(base)
    core = cls._core  # type: ignore[attr-defined]
    own = [inspect.Parameter("storage", inspect.Parameter.VAR_KEYWORD)] if core.short_types else []
    return of_torch.replace(parameters=[*of_torch.parameters.values(), *own])


def keep_types(
    saved: dict[str, Any], state: dict[str, Any], stored: list[dict[str, Any]], numbers: Collection[str]
) -> None:
    """Give groups that a checkpoint makes their options of storage, and the state of such the types it was saved in.

    So in any group numbers of the whole tensor, and the codes of state in 8 bits with what is kept beside them.
    """
    for group, saved_group, own in zip(state["param_groups"], saved["param_groups"], stored, strict=True):
        if not storage.checked(saved_group):
            group.update({**own, **group})
        keeps = bool(storage.checked(group))
        for p, index in zip(group["params"], saved_group["params"], strict=True):
            entry, saved_entry = state["state"].get(p, {}), saved["state"].get(index, {})
            codes = [name for name in saved_entry if f"{name}_absmax" in saved_entry]
            own_types = {*numbers, *codes, *(f"{name}_absmax" for name in codes), *storage.MASTERS.values()}
            for name, value in saved_entry.items():
                if not isinstance(value, torch.Tensor) or name == "step" or entry[name].dtype == value.dtype:
                    continue
                if keeps or name in own_types:
                    entry[name] = value.to(device=p.device, copy=True)


class Side:
    """What a workspace asks of an optimizer, answered for one of torch's by the pyopt optimizer behind it.

    A class of its own, so that subclasses of the optimizer are free in their names; made anew for each step, so that
    it holds nothing from before. Every class of the catalogue has a subclass, with what its core declares.
    """

    __slots__ = ("_averages", "defaults", "optimizer", "param_groups", "state")
    core: ClassVar[type[pyopt.Optimizer]]
    rule: ClassVar[Any]
    counts_steps: ClassVar[bool]
    number_states: ClassVar[tuple[str, ...]]
    shared_numbers: ClassVar[tuple[str, ...]]
    state_names: ClassVar[Any]
    unsigned_states: ClassVar[Any]
    short_types: ClassVar[bool]
    later: ClassVar[Any]  # what older torch has not in its groups
    needs_rows: ClassVar[bool]
    has_int_steps: ClassVar[bool] = False  # torch.optim.SparseAdam alone counts in ints

    def __init__(self, optimizer: KernelStepMixin) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults
        self._averages = optimizer._averages

    def check_group(self, group: Group) -> None:
        """torch checks in its constructors alone."""

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        """The numbers of the rule."""
        try:
            return self.core.scalars(self, group, step)  # type: ignore[arg-type]
        except (ArithmeticError, TypeError, ValueError):  # torch takes anything in a group: say which option it is
            check_options({key: group[key] for key in self.defaults if key in group}, self.core.checks)
            raise

    def rule_of(self, group: Group) -> Any:
        """The rule for a group."""
        return self.core.rule_of(self, group)  # type: ignore[arg-type]

    def next_numbers(self, group: Group, step: int, numbers: dict[str, float]) -> dict[str, float]:
        """What the numbers of the state are after a step."""
        return self.core.next_numbers(self, group, step, numbers)  # type: ignore[arg-type]

    def state_streams(self, group: Group) -> tuple[str | None, ...] | None:
        """The state behind each stream of the rule, None for a group that is left to torch."""
        return None if self.reason(group) else self.core.state_streams(self, group)  # type: ignore[arg-type]

    def takes_rows(self, group: Group) -> bool:
        """Whether the kernels step the rows of a sparse gradient as torch does: momentum and decay move all others."""
        moves_others = hasattr(torch.optim, self.core.__name__) and (group.get("momentum") or group.get("weight_decay"))
        return not moves_others and self.core.takes_rows(self, group)  # type: ignore[arg-type]

    @staticmethod
    def reason(group: Group) -> str | None:
        """Why a whole group is left to torch."""
        return next((f"{key}=True" for key in ("differentiable", "capturable") if group.get(key)), None)

    def new_state(self, p: torch.Tensor, group: Group) -> dict[str, Any]:
        """The state of a parameter before its first step, as torch makes it."""
        state: dict[str, Any] = {}
        double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
        scalar_dtype = torch.float64 if double else torch.float32
        # torch's Adagrad takes it from the defaults, whatever the group says.
        options = self.defaults if self.core is pyopt.Adagrad else group
        if self.counts_steps:
            state["step"] = 0 if self.has_int_steps else torch.zeros((), dtype=scalar_dtype)
        for name in self.number_states:
            number = self.core.initial_value(self, name, options)  # type: ignore[arg-type]
            is_torchs = hasattr(torch.optim, self.core.__name__)
            state[name] = torch.tensor(number, dtype=scalar_dtype if is_torchs else torch.float64)
        stored = storage.checked(group)
        of_state = "float32" if stored.get("state_dtype") == "8bit" else stored.get("state_dtype")
        dtype = getattr(torch, of_state or "", p.dtype)
        in_codes = not p.is_complex() and storage.in_codes(p.numel(), p.is_contiguous(), str(p.dtype)[6:], stored)
        if in_codes and hasattr(p, "placements"):
            raise TypeError("a parameter is a DTensor, whose state cannot be in 8 bits")
        dtype = p.dtype if p.dtype == torch.float64 or p.is_complex() else dtype
        for name in filter(None, self.state_streams(group) or ()):
            value: complex = self.core.initial_value(self, name, options)  # type: ignore[arg-type]
            if in_codes:
                zero = 0 if name in (self.unsigned_states or ()) else 127
                state[name] = torch.full_like(p, zero, memory_format=torch.preserve_format, dtype=torch.uint8)
                state[f"{name}_absmax"] = torch.zeros((p.numel() + 255) // 256, dtype=torch.float32)
                continue
            if self.rule.by_row:
                state[name] = torch.full(p.shape[:1], value, dtype=dtype.to_real(), device=p.device)
                continue
            value = complex(value, value) if p.is_complex() else value
            state[name] = torch.full_like(p, value, memory_format=torch.preserve_format, dtype=dtype)
        if (master := storage.master_of(NAMES.get(p.dtype, ""), stored)) is not None:
            dtype = torch.int16 if master == "low_bits" else p.dtype
            state[master] = torch.zeros_like(p, memory_format=torch.preserve_format, dtype=dtype)
        return state

    def step_by_torch(self, left: list[tuple[int, torch.Tensor]], factor: float) -> None:
        """The step of what is left to torch."""
        refuse_storage(self.optimizer, left, "for a step that is left to torch: see pyopt.torch.explain")
        self.optimizer._step_by_torch(left, factor)


def refuse_storage(optimizer: Any, left: list[tuple[int, torch.Tensor]], where: str) -> None:
    """Raise where torch's step would leave out an option of storage."""
    for index, p in left:
        stored = storage.checked(optimizer.param_groups[index])
        if not stored.keys().isdisjoint(("state_dtype", "max_row_norm")) or (stored and p.dtype in NAMES):
            place = next(i for i, other in enumerate(all_of(optimizer)) if other is p)
            raise RuntimeError(f"parameter {place} has the option {min(stored)!r}, which is not {where}")


def all_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """All parameters, in their order."""
    return (p for group in optimizer.param_groups for p in group["params"])


def workspace_of(optimizer: KernelStepMixin) -> TensorWorkspace:
    """The optimizer's; torch's __getstate__ leaves it behind in copies."""
    return vars(optimizer).setdefault("_pyopt_workspace", optimizer._workspace_type())  # type: ignore[no-any-return]


def is_observed() -> bool:
    """Whether somebody follows what torch computes: dispatch modes, tracers, forward-mode differentiation."""
    return _is_tracing() or _len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0
