"""The catalogue: torch's classes with pyopt's step, in the order of pyopt.optimizers."""

from __future__ import annotations

import torch

import pyopt
from pyopt.optimizers.schedule_free import Move, TrainEval
from pyopt.torch import own
from pyopt.torch.own import OwnOptimizer, constructor_of
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


class Adam(KernelStepMixin, torch.optim.Adam, core=pyopt.Adam):
    """torch.optim.Adam, its arguments, state and errors, with the step of pyopt.Adam."""


class AdamW(KernelStepMixin, torch.optim.AdamW, core=pyopt.AdamW):
    """torch.optim.AdamW, its arguments, state and errors, with the step of pyopt.AdamW."""


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
