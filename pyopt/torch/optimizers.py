"""The catalogue: torch's classes with pyopt's step, in the order of pyopt.optimizers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import pyopt
from pyopt.optimizers.prodigy import OneDistance
from pyopt.optimizers.schedule_free import Move, TrainEval
from pyopt.torch import own
from pyopt.torch.own import OwnOptimizer, ScaledSteps, constructor_of
from pyopt.torch.step import KernelStepMixin


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

    __init__ = constructor_of(pyopt.Lion)
    formula = staticmethod(own.lion)


class Adagrad(KernelStepMixin, torch.optim.Adagrad, core=pyopt.Adagrad):
    """torch.optim.Adagrad, its arguments, state and errors, with the step of pyopt.Adagrad."""


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

    __init__ = constructor_of(pyopt.AdaBelief)
    formula = staticmethod(own.adabelief)


class ADOPT(OwnOptimizer, core=pyopt.ADOPT):
    """pyopt.ADOPT for tensors: arguments, state and errors are its; no sparse gradients."""

    __init__ = constructor_of(pyopt.ADOPT)
    formula = staticmethod(own.adopt)


class AdEMAMix(OwnOptimizer, core=pyopt.AdEMAMix):
    """pyopt.AdEMAMix for tensors: arguments, state and errors are its; no sparse gradients."""

    __init__ = constructor_of(pyopt.AdEMAMix)
    formula = staticmethod(own.ademamix)


class Adan(OwnOptimizer, core=pyopt.Adan):
    """pyopt.Adan for tensors: arguments, state and errors are its; no sparse gradients."""

    __init__ = constructor_of(pyopt.Adan)
    formula = staticmethod(own.adan)


class FTRL(OwnOptimizer, core=pyopt.FTRL):
    """pyopt.FTRL for tensors: arguments, state and errors are its; no sparse gradients."""

    __init__ = constructor_of(pyopt.FTRL)
    formula = staticmethod(own.ftrl)


class LARS(OwnOptimizer, core=pyopt.LARS):
    """pyopt.LARS for tensors: arguments, state and errors are its; no sparse gradients."""

    __init__ = constructor_of(pyopt.LARS)
    formula = staticmethod(own.lars)


class LAMB(OwnOptimizer, core=pyopt.LAMB):
    """pyopt.LAMB for tensors: arguments, state and errors are its; no sparse gradients."""

    __init__ = constructor_of(pyopt.LAMB)
    formula = staticmethod(own.lamb)


class Prodigy(OneDistance, OwnOptimizer, core=pyopt.Prodigy):
    """pyopt.Prodigy for tensors: arguments, state and errors are its; no sparse gradients.

    Where the kernels do not cover one parameter, all take the formula, since d is one for all.
    """

    __init__ = constructor_of(pyopt.Prodigy)

    def _apply(self, rows: Iterator[own.Row]) -> None:
        moved = []
        numerator = denominator = 0.0
        for h, (p, *state), g in rows:
            along, distance, *after = own.prodigy_sums(h, own.wide(p), g, *map(own.wide, state))
            numerator, denominator = numerator + along, denominator + distance
            for before, value in zip(state, after, strict=True):
                before.copy_(value)
            moved.append((h, p, *state[:2]))
        first = moved[0][0]
        d, d_numerator = first["d"], first["beta3"] * first["d_numerator"] + numerator
        if denominator and not first["d_coef"] * d_numerator / denominator <= d:  # NaN shows
            d = first["d_coef"] * d_numerator / denominator
        for h, p, m, v in moved:
            p.copy_(own.prodigy(h, d, own.wide(p), own.wide(m), own.wide(v)))
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

    __init__ = constructor_of(pyopt.SGDScheduleFree)
    formula = staticmethod(own.sgd_schedule_free)


class AdamWScheduleFree(ScheduleFree, core=pyopt.AdamWScheduleFree):
    """pyopt.AdamWScheduleFree for tensors: arguments, modes, state and errors are its; no sparse gradients."""

    __init__ = constructor_of(pyopt.AdamWScheduleFree)
    formula = staticmethod(own.adamw_schedule_free)
