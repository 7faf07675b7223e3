"""Adan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.checks import triple_of_betas
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class Adan(Optimizer):
    """Adaptive Nesterov momentum: moving means of the gradient, of its change, and of the square of both.

        c = g - (the gradient before), 0 at the first step
        m = m + (1 - betas[0]) * (g - m)
        u = u + (1 - betas[1]) * (c - u)
        n = betas[2] * n + (1 - betas[2]) * (g + betas[1] * c)**2
        d = sqrt(n) / sqrt(1 - betas[2]**t) + eps
        p = p - lr * (m / (1 - betas[0]**t) + betas[1] * u / (1 - betas[1]**t)) / d
        p = p / (1 + lr * weight_decay)

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        betas: decay of the three moving means, each >= 0 and < 1.
        eps: added to the root, >= 0.
        weight_decay: decay of the parameters after the step, >= 0.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_avg_diff" (u), "exp_avg_sq" (n), "pre_grad" per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, Adan
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> Adan([w], lr=0.5, weight_decay=0).step()
        >>> w.data.round(6)
        array([0.5, 1.5])

    Source: Xie et al., Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models (arXiv 2208.06677),
    algorithm 1; the betas count as in the authors' code (1 minus the paper's), which also corrects the bias. Without
    their restarts and clipping. Not in torch.
    """

    rule = kernels.adan
    state_names = {"exp_avg": None, "exp_avg_diff": None, "exp_avg_sq": None, "pre_grad": None}
    counts_steps = True
    checks = {"betas": triple_of_betas}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.02,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize), **storage
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        lr, (beta1, beta2, beta3) = group["lr"], group["betas"]
        return {
            "step_size": lr / (1 - beta1**step),
            "difference_step_size": lr * beta2 / (1 - beta2**step),
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "beta3": beta3,
            "weight3": 1 - beta3,
            "inverse_sqrt_bias_correction3": 1 / math.sqrt(1 - beta3**step),
            "eps": group["eps"],
            "decay_factor": 1 / (1 + lr * group["weight_decay"]),
            "gradient_factor": -1 if group["maximize"] else 1,
            "first": step == 1,
        }
