"""RMSprop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class RMSprop(Optimizer):
    """Steps divided by the root of a moving mean of the squared gradient.

        g = g + weight_decay * p
        s = alpha * s + (1 - alpha) * g**2
        a = a + (1 - alpha) * (g - a)                    if centered
        d = sqrt(s) + eps, or sqrt(s - a**2) + eps       if centered
        b = momentum * b + g / d                         if momentum > 0
        p = p - lr * b, or p - lr * g / d                without momentum

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        alpha: decay of the moving means, 0 to 1.
        eps: added to the root, >= 0.
        weight_decay: factor of the L2 penalty, >= 0.
        momentum: share of the last update that is kept, >= 0.
        centered: divide by the estimated standard deviation instead of the root mean square.
        maximize: ascend instead of descend.

    State: "step", "square_avg" (s), with momentum "momentum_buffer" (b), if centered "grad_avg" (a) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import RMSprop, Parameter
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> RMSprop([w], lr=0.05, alpha=0.75).step()
        >>> w.data.round(6)
        array([0.9, 1.1])

    Source: Hinton, Neural Networks for Machine Learning (Coursera 2012), lecture 6e; centered: Graves, Generating
    Sequences With Recurrent Neural Networks (arXiv 1308.0850), equations 38 to 45. As in torch, eps stands outside the
    root, and where rounding makes s smaller than a**2 the result is NaN.
    """

    rule = kernels.rmsprop
    state_names = {"square_avg": None, "momentum_buffer": "momentum", "grad_avg": "centered"}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                alpha=alpha,
                eps=eps,
                centered=centered,
                weight_decay=weight_decay,
                maximize=maximize,
            ),
            **storage,
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {
            "lr": group["lr"],
            "alpha": group["alpha"],
            "weight": 1 - group["alpha"],
            "momentum": group["momentum"],
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "gradient_factor": -1 if group["maximize"] else 1,
            "centered": group["centered"],
        }
