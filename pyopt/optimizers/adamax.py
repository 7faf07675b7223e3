"""Adamax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers._decay import decay
from pyopt.storage import Storage


class Adamax(Optimizer):
    """Adam with the largest gradient so far, slowly forgotten, in the place of the second moment.

        g = g + weight_decay * p
        m = m + (1 - betas[0]) * (g - m)
        u = max(betas[1] * u, abs(g) + eps)
        p = p - lr / (1 - betas[0]**t) * m / u

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        betas: decay of the moving mean and of the maximum, each >= 0 and < 1.
        eps: added to the size of the gradient, >= 0.
        weight_decay: factor of the L2 penalty, >= 0.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_inf" (u) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, Adamax
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> Adamax([w], lr=0.5).step()
        >>> w.data.round(6)
        array([0.5, 1.5])

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization (arXiv 1412.6980), algorithm 2. As in torch, eps
    keeps u from 0. NaN in a gradient stays in u.
    """

    rule = kernels.adamax
    state_names = {"exp_avg": None, "exp_inf": None}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize), **storage
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "step_size": group["lr"] / (1 - beta1**step),
            "weight1": 1 - beta1,
            "beta2": beta2,
            "eps": group["eps"],
            **decay(group),
        }
