"""The catalogue: torch's classes with pyopt's step, in the order of pyopt.optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import pyopt
from pyopt.torch.stepper import Stepper


class SGD(Stepper, torch.optim.SGD, core=pyopt.SGD):
    __doc__ = torch.optim.SGD.__doc__


class Lion(Stepper, torch.optim.Optimizer, core=pyopt.Lion):
    """pyopt.Lion for tensors; torch has none, so what the kernels do not cover is an error here.

    Args:
        params: as for every torch optimizer.
        lr, betas, weight_decay, maximize: as for pyopt.Lion.

    Raises:
        ValueError, TypeError: a hyper-parameter out of its bounds.
        NotImplementedError: at the step, for a parameter that pyopt does not cover (see explain).

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> w.grad = torch.tensor([0.1, -20.0])
        >>> optim.Lion([w], lr=0.5).step()
        >>> w.data
        tensor([0.5000, 1.5000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        for name, check in pyopt.Lion.checks.items():
            check(name, defaults[name])
        super().__init__(params, defaults)

    def _step_by_torch(self, left: list[tuple[int, torch.Tensor]], factor: float) -> None:
        raise NotImplementedError(f"Lion does not cover {len(left)} of the parameters: see pyopt.torch.explain")


class Adagrad(Stepper, torch.optim.Adagrad, core=pyopt.Adagrad):
    __doc__ = torch.optim.Adagrad.__doc__


class RMSprop(Stepper, torch.optim.RMSprop, core=pyopt.RMSprop):
    __doc__ = torch.optim.RMSprop.__doc__


class Adam(Stepper, torch.optim.Adam, core=pyopt.Adam):
    __doc__ = torch.optim.Adam.__doc__


class AdamW(Stepper, torch.optim.AdamW, core=pyopt.AdamW):
    __doc__ = torch.optim.AdamW.__doc__
