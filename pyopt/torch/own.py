"""What a class needs that torch has not: a constructor, and a step in torch's operations for what the kernels leave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Concatenate, ParamSpec

import numpy as np
import torch

from pyopt.checks import plain
from pyopt.torch.step import KernelStepMixin

P = ParamSpec("P")
Tensor = torch.Tensor
# (numbers of the rule, parameter, gradient, *states) -> (parameter, *states), all new; complex ones as pairs.
Formula = Callable[..., tuple[Tensor, ...]]


def constructor_of(core: Callable[P, Any]) -> Callable[Concatenate[Any, P], None]:
    """The constructor of a pyopt optimizer, its options and their checks, for one of torch's kind."""

    @functools.wraps(core.__init__)
    def __init__(self: Any, params: Any, *args: Any, **options: Any) -> None:
        make: Any = core
        super(OwnOptimizer, self).__init__(params, make([np.empty((0, 0))], *args, **options).defaults)

    return __init__  # type: ignore[return-value]


class OwnOptimizer(KernelStepMixin, torch.optim.Optimizer):
    """Base of the classes that torch lacks: what the kernels do not cover takes `formula`, tensor by tensor."""

    formula: ClassVar[Formula]

    @torch.no_grad()
    def _step_by_torch(self, left: list[tuple[int, Tensor]], factor: float) -> None:
        if any(p.grad is not None and p.grad.is_sparse for _, p in left):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        side = self._side(self)
        for index, p in left:
            assert p.grad is not None
            group = plain(self.param_groups[index])
            state = self.state[p]
            names = list(side.state_names)
            fresh = names[0] not in state
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
            h = side.scalars(group, step)
            arrays = [_real(p), *(_real(state[name]) for name in names)]
            g = _wide(_real(p.grad)) * (h["gradient_factor"] * factor)
            after = type(self).formula(h, _wide(arrays[0]), g, *map(_wide, arrays[1:]))
            for array, value in zip(arrays, after, strict=True):
                array.copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that it rounds the numbers of a state to the dtype of the parameter."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for p, index in zip(params, saved, strict=True):
            for name in self._core.number_states:
                if name in self.state.get(p, {}):
                    self.state[p][name] = torch.tensor(float(state_dict["state"][index][name]), dtype=torch.float64)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _wide(tensor: Tensor) -> Tensor:
    """Half precision is computed in float32, and rounded once."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# --- the formulas, in the words of pyopt/_rules.pxd -------------------------------------------------------------------


def _sign(x: Tensor) -> Tensor:
    """torch's sign of NaN is 0."""
    return torch.where(x.isnan(), x, x.sign())


def _mean_square(v: Tensor, g: Tensor, beta: float, weight: float) -> Tensor:
    return v * beta + weight * g * g


def lion(h: Any, p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    direction = _sign(h["beta1"] * m + h["weight1"] * g)
    return p * h["decay_factor"] - h["lr"] * direction, h["beta2"] * m + h["weight2"] * g


def adabelief(h: Any, p: Tensor, g: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    g = g + h["weight_decay"] * p if h["weight_decay"] else g
    m = m.lerp(g, h["weight1"])
    s = _mean_square(s, g - m, h["beta2"], h["weight2"]) + h["eps"]
    d = s.sqrt() * h["inverse_sqrt_bias_correction2"] + h["eps"]
    return p * h["decay_factor"] - h["step_size"] * m / d, m, s


def adopt(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    g = g + h["weight_decay"] * p if h["weight_decay"] else g
    if h["first"]:
        return p, m, g * g
    m = m.lerp((g / v.sqrt().clamp(min=h["eps"])).clamp(-h["clip"], h["clip"]), h["weight1"])
    return p * h["decay_factor"] - h["lr"] * m, m, _mean_square(v, g, h["beta2"], h["weight2"])


def ademamix(h: Any, p: Tensor, g: Tensor, m1: Tensor, m2: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    m1, m2 = m1.lerp(g, h["weight1"]), m2.lerp(g, h["weight3"])
    v = _mean_square(v, g, h["beta2"], h["weight2"])
    d = v.sqrt() * h["inverse_sqrt_bias_correction2"] + h["eps"]
    return p * h["decay_factor"] - (h["step_size"] * m1 + h["slow_step_size"] * m2) / d, m1, m2, v


def adan(h: Any, p: Tensor, g: Tensor, m: Tensor, u: Tensor, n: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
    change = torch.zeros_like(g) if h["first"] else g - previous
    m, u = m.lerp(g, h["weight1"]), u.lerp(change, h["weight2"])
    n = _mean_square(n, g + h["beta2"] * change, h["beta3"], h["weight3"])
    d = n.sqrt() * h["inverse_sqrt_bias_correction3"] + h["eps"]
    p = (p - (h["step_size"] * m + h["difference_step_size"] * u) / d) * h["decay_factor"]
    return p, m, u, n, g


def ftrl(h: Any, p: Tensor, g: Tensor, z: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    root = (n + g * g).sqrt()
    z = z + (g - (root - n.sqrt()) * h["inverse_lr"] * p)
    w = (_sign(z) * h["l1"] - z) / (root * h["inverse_lr"] + h["ridge"])
    return torch.where(z.abs() <= h["l1"], 0, w), z, n + g * g


def sgd_schedule_free(h: Any, p: Tensor, g: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    g = g + h["weight_decay"] * p if h["weight_decay"] else g
    z = p if h["first"] else z
    return p.lerp(z, h["c"]) + h["y_step_size"] * g, z - h["lr"] * g


def adamw_schedule_free(h: Any, p: Tensor, g: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    v = _mean_square(v, g, h["beta2"], h["weight2"])
    g = g / ((v * h["inverse_bias_correction2"]).sqrt() + h["eps"])
    return *sgd_schedule_free(h, p, g, z), v
