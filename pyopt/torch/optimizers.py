"""The catalogue: torch's classes with pyopt's step, in the order of pyopt.optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pyopt
from pyopt.optimizers.prodigy import OneDistance
from pyopt.optimizers.schedule_free import Move, TrainEval
from pyopt.torch.own import OwnOptimizer, Row, ScaledSteps, constructor_of, mean_square, norm, sign, wide
from pyopt.torch.step import KernelStepMixin

__all__ = [
    "ADOPT",
    "ASGD",
    "FTRL",
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdaBelief",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "Adamax",
    "Adan",
    "Lion",
    "NAdam",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "RowwiseAdagrad",
    "Rprop",
    "SGDScheduleFree",
    "SparseAdam",
]


class SGD(KernelStepMixin, torch.optim.SGD, core=pyopt.SGD):
    """torch.optim.SGD, its arguments, state and errors, with the step of pyopt.SGD."""


class Lion(OwnOptimizer, core=pyopt.Lion):
    """pyopt.Lion for tensors. torch has none: what the kernels do not cover takes the same formula in torch's words.

    Args:
        params: as for every torch optimizer.
        lr, betas, weight_decay, maximize: as for pyopt.Lion.

    Raises:
        ValueError, TypeError: a hyper-parameter out of its bounds.
        RuntimeError: at the step, for a sparse gradient.

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> w.grad = torch.tensor([0.1, -20.0])
        >>> optim.Lion([w], lr=0.5).step()
        >>> w.data
        tensor([0.5000, 1.5000])
    """

    @constructor_of(pyopt.Lion)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        direction = sign(h["beta1"] * m + h["weight1"] * g)
        return p * h["decay_factor"] - h["lr"] * direction, h["beta2"] * m + h["weight2"] * g


class Adagrad(KernelStepMixin, torch.optim.Adagrad, core=pyopt.Adagrad):
    """torch.optim.Adagrad, its arguments, state and errors, with the step of pyopt.Adagrad."""


class SparseAdam(KernelStepMixin, torch.optim.SparseAdam, core=pyopt.SparseAdam):
    """torch.optim.SparseAdam, its arguments, state and errors, with the step of pyopt.SparseAdam."""


class RMSprop(KernelStepMixin, torch.optim.RMSprop, core=pyopt.RMSprop):
    """torch.optim.RMSprop, its arguments, state and errors, with the step of pyopt.RMSprop."""


class Adam(ScaledSteps, torch.optim.Adam, core=pyopt.Adam):
    """torch.optim.Adam, its arguments, state and errors, with the step of pyopt.Adam.

    Beside them it has that one's keywords update_clip and cautious, also as keys of groups. As every option they are
    those of a checkpoint that is loaded: one without them, such as torch's, turns them off.

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> w.grad = torch.tensor([4.0, -0.25])
        >>> optim.Adam([w], lr=0.5, update_clip=True, cautious=True).step()
        >>> w.data
        tensor([0.5000, 1.5000])
    """


class AdamW(ScaledSteps, torch.optim.AdamW, core=pyopt.AdamW):
    """torch.optim.AdamW, its arguments, state and errors, with the step of pyopt.AdamW; see Adam."""


class Adadelta(KernelStepMixin, torch.optim.Adadelta, core=pyopt.Adadelta):
    """torch.optim.Adadelta, its arguments, state and errors, with the step of pyopt.Adadelta."""


class Adamax(KernelStepMixin, torch.optim.Adamax, core=pyopt.Adamax):
    """torch.optim.Adamax, its arguments, state and errors, with the step of pyopt.Adamax."""


class NAdam(KernelStepMixin, torch.optim.NAdam, core=pyopt.NAdam):
    """torch.optim.NAdam, its arguments, state and errors, with the step of pyopt.NAdam."""


class RAdam(KernelStepMixin, torch.optim.RAdam, core=pyopt.RAdam):
    """torch.optim.RAdam, its arguments, state and errors, with the step of pyopt.RAdam."""


class ASGD(KernelStepMixin, torch.optim.ASGD, core=pyopt.ASGD):
    """torch.optim.ASGD, its arguments, state and errors, with the step of pyopt.ASGD."""


class Rprop(KernelStepMixin, torch.optim.Rprop, core=pyopt.Rprop):
    """torch.optim.Rprop, its arguments, state and errors, with the step of pyopt.Rprop."""


# --- what torch has not: pyopt's optimizers for tensors, with the same arguments --------------------------------------


class AdaBelief(OwnOptimizer, core=pyopt.AdaBelief):
    """pyopt.AdaBelief for tensors: arguments, state and errors are its; no sparse gradients."""

    @constructor_of(pyopt.AdaBelief)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        g = g + h["weight_decay"] * p if h["weight_decay"] else g
        m = m.lerp(g, h["weight1"])
        s = mean_square(s, g - m, h["beta2"], h["weight2"]) + h["eps"]
        d = s.sqrt() * h["inverse_sqrt_bias_correction2"] + h["eps"]
        return p * h["decay_factor"] - h["step_size"] * m / d, m, s


class ADOPT(OwnOptimizer, core=pyopt.ADOPT):
    """pyopt.ADOPT for tensors: arguments, state and errors are its; no sparse gradients."""

    @constructor_of(pyopt.ADOPT)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        g = g + h["weight_decay"] * p if h["weight_decay"] else g
        if h["first"]:
            return p, m, g * g
        m = m.lerp((g / v.sqrt().clamp(min=h["eps"])).clamp(-h["clip"], h["clip"]), h["weight1"])
        return p * h["decay_factor"] - h["lr"] * m, m, mean_square(v, g, h["beta2"], h["weight2"])


class AdEMAMix(OwnOptimizer, core=pyopt.AdEMAMix):
    """pyopt.AdEMAMix for tensors: arguments, state and errors are its; no sparse gradients."""

    @constructor_of(pyopt.AdEMAMix)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, m1: Tensor, m2: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        m1, m2 = m1.lerp(g, h["weight1"]), m2.lerp(g, h["weight3"])
        v = mean_square(v, g, h["beta2"], h["weight2"])
        d = v.sqrt() * h["inverse_sqrt_bias_correction2"] + h["eps"]
        return p * h["decay_factor"] - (h["step_size"] * m1 + h["slow_step_size"] * m2) / d, m1, m2, v


class Adan(OwnOptimizer, core=pyopt.Adan):
    """pyopt.Adan for tensors: arguments, state and errors are its; no sparse gradients."""

    @constructor_of(pyopt.Adan)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, m: Tensor, u: Tensor, n: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        change = torch.zeros_like(g) if h["first"] else g - previous
        m, u = m.lerp(g, h["weight1"]), u.lerp(change, h["weight2"])
        n = mean_square(n, g + h["beta2"] * change, h["beta3"], h["weight3"])
        d = n.sqrt() * h["inverse_sqrt_bias_correction3"] + h["eps"]
        p = (p - (h["step_size"] * m + h["difference_step_size"] * u) / d) * h["decay_factor"]
        return p, m, u, n, g


class FTRL(OwnOptimizer, core=pyopt.FTRL):
    """pyopt.FTRL for tensors: arguments, state and errors are its; no sparse gradients."""

    @constructor_of(pyopt.FTRL)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, z: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        root = (n + g * g).sqrt()
        z = z + (g - (root - n.sqrt()) * h["inverse_lr"] * p)
        w = (sign(z) * h["l1"] - z) / (root * h["inverse_lr"] + h["ridge"])
        return torch.where(z.abs() <= h["l1"], 0, w), z, n + g * g


class RowwiseAdagrad(OwnOptimizer, core=pyopt.RowwiseAdagrad):
    """pyopt.RowwiseAdagrad for tensors: arguments, state and errors are its; sparse gradients of rows are taken."""

    @constructor_of(pyopt.RowwiseAdagrad)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        g = g + h["weight_decay"] * p if h["weight_decay"] else g
        s = s + g.double().square().unsqueeze(-1).flatten(s.dim()).mean(-1).to(s.dtype)
        lr = (h["lr"] / (s.double().sqrt() + h["eps"])).to(g.dtype)
        return p * h["decay_factor"] - lr.reshape(s.shape + (1,) * (p.dim() - s.dim())) * g, s


class LARS(OwnOptimizer, core=pyopt.LARS):
    """pyopt.LARS for tensors: arguments, state and errors are its; no sparse gradients."""

    @constructor_of(pyopt.LARS)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, *b: Tensor) -> tuple[Tensor, ...]:
        lr, of_p, of_g = h["lr"], norm(p), norm(g)
        if h["trust_ratio"] and of_p and of_g:
            lr *= h["trust_coefficient"] * of_p / (of_g + h["weight_decay"] * of_p)
        g = lr * (g + h["weight_decay"] * p if h["weight_decay"] else g)
        b = tuple(before * h["momentum"] + g for before in b)
        for buffer in b:
            g = g + h["momentum"] * buffer if h["nesterov"] else buffer
        return p - g, *b


class LAMB(OwnOptimizer, core=pyopt.LAMB):
    """pyopt.LAMB for tensors: arguments, state and errors are its; no sparse gradients."""

    @constructor_of(pyopt.LAMB)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        m, v = m.lerp(g, h["weight1"]), mean_square(v, g, h["beta2"], h["weight2"])
        u = h["inverse_bias_correction1"] * m / (v.sqrt() * h["inverse_sqrt_bias_correction2"] + h["eps"])
        u = u + h["weight_decay"] * p if h["weight_decay"] else u
        of_p, of_u = norm(p), norm(u)
        return p - h["lr"] * (of_p / of_u if h["trust_ratio"] and of_p and of_u else 1) * u, m, v


class Prodigy(OneDistance, OwnOptimizer, core=pyopt.Prodigy):
    """pyopt.Prodigy for tensors: arguments, state and errors are its; no sparse gradients.

    Where the kernels do not cover one parameter, all take the formula, since d is one for all.
    """

    @constructor_of(pyopt.Prodigy)
    def __init__(self) -> None: ...

    @staticmethod
    def _sums(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Tensor, p0: Tensor) -> tuple[Any, ...]:
        """What Prodigy's d follows from, <g, p0 - p> weighted and |s|, and the new state."""
        g = g + h["weight_decay"] * p if h["weight_decay"] else g
        p0 = p if h["first"] else p0
        m, v = m * h["beta1"] + h["weight1"] * g, mean_square(v, g, h["beta2"], h["weight2"])
        s = s * h["beta3"] + h["weight3"] * g
        along = h["numerator_weight"] * float((g.double() * (p0.double() - p.double())).sum())
        return along, float(s.abs().sum(dtype=torch.float64)), m, v, s, p0

    @staticmethod
    def _moved(h: Any, d: float, p: Tensor, m: Tensor, v: Tensor) -> Any:
        return p * h["decay_factor"] - h["step_size"] * m / (v.sqrt() + h["eps"] * d)

    def _apply(self, rows: Iterator[Row]) -> None:
        moved = []
        numerator = denominator = 0.0
        for h, (p, *state), g in rows:
            along, distance, *after = self._sums(h, wide(p), g, *map(wide, state))
            numerator, denominator = numerator + along, denominator + distance
            for before, value in zip(state, after, strict=True):
                before.copy_(value)
            moved.append((h, p, *state[:2]))
        first = moved[0][0]
        d, d_numerator = first["d"], first["beta3"] * first["d_numerator"] + numerator
        if denominator and not first["d_coef"] * d_numerator / denominator <= d:  # NaN shows
            d = first["d_coef"] * d_numerator / denominator
        for h, p, m, v in moved:
            p.copy_(self._moved(h, d, wide(p), wide(m), wide(v)))
        for group in self.param_groups:
            group.update(d=d, d_numerator=d_numerator)


class ScheduleFree(TrainEval, OwnOptimizer):
    """What the two below have in common."""

    @torch.no_grad()
    def _interpolate(self, moves: list[Move]) -> None:
        for p, z, weight in moves:
            p.add_((z - p).mul_(weight))  # in three operations: the bits of the NumPy side


class SGDScheduleFree(ScheduleFree, core=pyopt.SGDScheduleFree):
    """pyopt.SGDScheduleFree for tensors: arguments, modes, state and errors are its; no sparse gradients."""

    @constructor_of(pyopt.SGDScheduleFree)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        g = g + h["weight_decay"] * p if h["weight_decay"] else g
        z = p if h["first"] else z
        return p.lerp(z, h["c"]) + h["y_step_size"] * g, z - h["lr"] * g


class AdamWScheduleFree(ScheduleFree, core=pyopt.AdamWScheduleFree):
    """pyopt.AdamWScheduleFree for tensors: arguments, modes, state and errors are its; no sparse gradients."""

    @constructor_of(pyopt.AdamWScheduleFree)
    def __init__(self) -> None: ...

    @staticmethod
    def formula(h: Any, p: Tensor, g: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        v = mean_square(v, g, h["beta2"], h["weight2"])
        g = g / ((v * h["inverse_bias_correction2"]).sqrt() + h["eps"])
        return *SGDScheduleFree.formula(h, p, g, z), v
