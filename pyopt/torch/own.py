"""What a class needs that torch has not: a constructor, and a step in torch's operations for what the kernels leave."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Concatenate, ParamSpec

import numpy as np
import torch

from pyopt._options import check_options
from pyopt.checks import plain
from pyopt.torch.step import KernelStepMixin, signature_of

P = ParamSpec("P")
Tensor = torch.Tensor
# (numbers of the rule, parameter, gradient, *states) -> (parameter, *states), all new; complex ones as pairs.
Formula = Callable[..., tuple[Tensor, ...]]


def constructor_of(core: Callable[P, Any]) -> Callable[[Any], Callable[Concatenate[Any, P], None]]:
    """The constructor of a pyopt optimizer, its options and their checks, for one of torch's kind.

    A decorator of an empty one: of a value that is assigned type checkers of users do not see the type.
    """

    @functools.wraps(core.__init__)
    def __init__(self: Any, params: Any, *args: Any, **options: Any) -> None:
        make: Any = core
        super(OwnOptimizer, self).__init__(params, make([np.empty((0, 0))], *args, **options).defaults)

    return lambda _: __init__  # type: ignore[return-value]


Row = tuple[Any, list[Tensor], Tensor]  # the numbers of the rule; parameter and state; the gradient


class OwnOptimizer(KernelStepMixin, torch.optim.Optimizer):
    """Base of the classes that torch lacks: what the kernels do not cover takes `formula`, tensor by tensor."""

    formula: ClassVar[Formula]

    @torch.no_grad()
    def _step_by_torch(self, left: list[tuple[int, Tensor]], factor: float) -> None:
        refuse(self, left)
        self._apply(rows_of(self, left, factor))

    def _apply(self, rows: Iterator[Row]) -> None:
        apply(type(self).formula, rows)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that it rounds the numbers of a state to the dtype of the parameter."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for p, index in zip(params, saved, strict=True):
            for name in self._core.number_states:
                if name in self.state.get(p, {}):
                    self.state[p][name] = torch.tensor(float(state_dict["state"][index][name]), dtype=torch.float64)


class ScaledSteps(KernelStepMixin):
    """`update_clip` and `cautious` of pyopt.Adam, which torch's has not, in groups or for all as keywords.

    What the kernels leave takes the same formula in torch's operations, where such a group is concerned.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        of_torch = signature_of(cls)
        own = [p for p in inspect.signature(ScaledSteps.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
        *parameters, storage = of_torch.parameters.values()
        cls.__signature__ = of_torch.replace(parameters=[*parameters, *own, storage])  # type: ignore[attr-defined]

    def __init__(self, *args: Any, update_clip: bool = False, cautious: bool = False, **kwargs: Any) -> None:
        options = {"update_clip": update_clip, "cautious": cautious}
        check_options(options, {})
        super().__init__(*args, **kwargs)
        if update_clip or cautious:  # else the groups are those of torch
            for group in (self.defaults, *self.param_groups):
                group.update({**options, **group})

    def _step_by_torch(self, left: list[tuple[int, Tensor]], factor: float) -> None:
        ours = [(index, p) for index, p in left if self._is_scaled(index)]
        refuse(self, ours)
        if len(ours) < len(left):
            super()._step_by_torch([(index, p) for index, p in left if not self._is_scaled(index)], factor)
        with torch.no_grad():
            apply(adam_scaled, rows_of(self, ours, factor))

    def _is_scaled(self, index: int) -> bool:
        group = self.param_groups[index]
        return bool(group.get("update_clip") or group.get("cautious"))


def refuse(optimizer: Any, left: list[tuple[int, Tensor]]) -> None:
    """Raise for parameters that the formulas cannot step."""
    name = type(optimizer).__name__
    for index, p in left:
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError(f"{name} does not support sparse gradients")
        group = optimizer.param_groups[index]
        rule = optimizer._side.rule_of(optimizer._side, {**optimizer._side.later, **group})
        if rule.has_sums or rule.by_row:
            if hasattr(p, "placements"):
                raise RuntimeError(
                    f"{name} needs sums over whole parameters, and one is a DTensor: a part of it is here"
                )
            if reason := optimizer._side.reason(group):
                raise RuntimeError(f"{name} has no formula for {reason}")


def rows_of(optimizer: Any, left: list[tuple[int, Tensor]], factor: float) -> Iterator[Row]:
    """What the formula needs of each parameter, its numbers and step count gone on; complex tensors as pairs."""
    side = optimizer._side(optimizer)
    for index, p in left:
        assert p.grad is not None
        group = {**side.later, **plain(optimizer.param_groups[index])}
        state = optimizer.state[p]
        names = [name for name in side.core.state_streams(side, group) if name is not None]
        fresh = (names or [None])[0] not in state
        if fresh:
            state.update(side.new_state(p, group))
        step = 1 if fresh else 2
        if side.counts_steps:
            state["step"] += 1
            step = int(state["step"])
        if side.number_states:
            numbers = side.next_numbers(group, step, {name: float(state[name]) for name in side.number_states})
            for name in side.number_states:
                state[name].fill_(numbers[name])
            group.update(numbers)
        h = {**group, **side.scalars(group, step)}
        g = wide(_real(p.grad)) * (h["gradient_factor"] * factor)
        yield h, [_real(p), *(_real(state[name]) for name in names)], g


def apply(formula: Formula, rows: Iterator[Row]) -> None:
    """Take the step of each row, computed in float32 at least."""
    for h, arrays, g in rows:
        for array, value in zip(arrays, formula(h, wide(arrays[0]), g, *map(wide, arrays[1:])), strict=True):
            array.copy_(value)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def wide(tensor: Tensor) -> Tensor:
    """Half precision is computed in float32, and rounded once."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# --- pieces of the formulas, in the words of pyopt/_rules.pxd ---------------------------------------------------------


def sign(x: Tensor) -> Tensor:
    """torch's sign of NaN is 0."""
    return torch.where(x.isnan(), x, x.sign())


def mean_square(v: Tensor, g: Tensor, beta: float, weight: float) -> Tensor:
    return v * beta + weight * g * g


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def adam_scaled(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor, *v_max: Tensor) -> tuple[Tensor, ...]:
    g = g + h["weight_decay"] * p if h["weight_decay"] else g
    m, v = m.lerp(g, h["weight1"]), mean_square(v, g, h["beta2"], h["weight2"])
    v_max = tuple(torch.maximum(before, v) for before in v_max)
    root = (*v_max, v)[0].sqrt() * h["inverse_sqrt_bias_correction2"]
    step_size, decay_factor = h["step_size"], h["decay_factor"]
    if h["update_clip"]:
        rms = norm(g / root.clamp(min=h["eps"])) / math.sqrt(max(p.numel(), 1))
        if not rms <= 1:
            step_size, decay_factor = step_size / rms, 1 - (1 - decay_factor) / rms
    step = step_size * m / (root + h["eps"])
    if h["cautious"]:
        agrees = m * g > 0
        step = step * agrees / max(float(agrees.sum()) / max(p.numel(), 1), 1e-3)
    return p * decay_factor - step, m, v, *v_max
