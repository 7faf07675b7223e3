"""Adadelta."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers._decay import decay
from pyopt.storage import Storage


class Adadelta(Optimizer):
    """Steps scaled by the root mean square of earlier steps over that of the gradients: no unit of its own.

        g = g + weight_decay * p
        s = rho * s + (1 - rho) * g**2
        d = sqrt(a + eps) / sqrt(s + eps) * g
        a = rho * a + (1 - rho) * d**2
        p = p - lr * d

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: factor of the step, >= 0.
        rho: decay of the two moving means, 0 to 1.
        eps: added inside the roots, >= 0: the first steps have about the size of its root.
        weight_decay: factor of the L2 penalty, >= 0.
        maximize: ascend instead of descend.

    State: "step", "square_avg" (s), "acc_delta" (a) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, Adadelta
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> Adadelta([w], rho=0.75, eps=0.25).step()
        >>> w.data.round(6)
        array([0.029857, 1.242536])

    Source: Zeiler, ADADELTA: An Adaptive Learning Rate Method (arXiv 1212.5701), algorithm 1. As in torch, lr
    multiplies the step.
    """

    rule = kernels.adadelta
    state_names = {"square_avg": None, "acc_delta": None}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, dict(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize), **storage)

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {
            "lr": group["lr"],
            "rho": group["rho"],
            "weight": 1 - group["rho"],
            "eps": group["eps"],
            **decay(group),
        }
