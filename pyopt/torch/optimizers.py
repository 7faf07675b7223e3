"""The catalogue: torch's classes with pyopt's step, in the order of pyopt.optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import pyopt
from pyopt._options import check_options
from pyopt.checks import plain
from pyopt.torch.step import KernelStepMixin


class SGD(KernelStepMixin, torch.optim.SGD, core=pyopt.SGD):
    """torch.optim.SGD, its arguments, state and errors, with the step of pyopt.SGD."""


class Lion(KernelStepMixin, torch.optim.Optimizer, core=pyopt.Lion):
    """pyopt.Lion for tensors. torch has none: what the kernels do not cover takes the loop below.

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
        check_options(defaults, pyopt.Lion.checks)
        super().__init__(params, defaults)

    @torch.no_grad()
    def _step_by_torch(self, left: list[tuple[int, torch.Tensor]], factor: float) -> None:
        if any(p.grad is not None and p.grad.is_sparse for _, p in left):
            raise RuntimeError("Lion does not support sparse gradients")
        for index, p in left:
            assert p.grad is not None
            h = plain(self.param_groups[index])
            beta1, beta2 = h["betas"]
            g = p.grad * (-factor if h["maximize"] else factor)
            state = self.state[p]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            m = state["exp_avg"]
            direction = beta1 * m + (1 - beta1) * g
            direction = torch.where(direction.isnan(), direction, direction.sign())
            p.mul_(1 - h["lr"] * h["weight_decay"]).sub_(direction, alpha=h["lr"])
            m.mul_(beta2).add_(g, alpha=1 - beta2)


class Adagrad(KernelStepMixin, torch.optim.Adagrad, core=pyopt.Adagrad):
    """torch.optim.Adagrad, its arguments, state and errors, with the step of pyopt.Adagrad."""


class RMSprop(KernelStepMixin, torch.optim.RMSprop, core=pyopt.RMSprop):
    """torch.optim.RMSprop, its arguments, state and errors, with the step of pyopt.RMSprop."""


class Adam(KernelStepMixin, torch.optim.Adam, core=pyopt.Adam):
    """torch.optim.Adam, its arguments, state and errors, with the step of pyopt.Adam."""


class AdamW(KernelStepMixin, torch.optim.AdamW, core=pyopt.AdamW):
    """torch.optim.AdamW, its arguments, state and errors, with the step of pyopt.AdamW."""
