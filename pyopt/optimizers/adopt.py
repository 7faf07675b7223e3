"""ADOPT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers._decay import decay
from pyopt.storage import Storage


class ADOPT(Optimizer):
    """Adam that divides by the second moment before the gradient enters it: converges with any betas[1].

        g = g + weight_decay * p                         or, if decoupled_weight_decay, p = (1 - lr * weight_decay) * p
        v = g**2, and nothing else, at the first step; then
        c = g / max(sqrt(v), eps), within plus and minus (t - 1)**0.25
        m = m + (1 - betas[0]) * (c - m)
        p = p - lr * m
        v = betas[1] * v + (1 - betas[1]) * g**2

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        betas: decay of the two moving means, each >= 0 and < 1.
        eps: the least root, >= 0.
        weight_decay: factor of the L2 penalty, >= 0; see decoupled_weight_decay.
        decoupled_weight_decay: shrink the parameters by lr * weight_decay instead of adding the penalty's gradient.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_avg_sq" (v) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import ADOPT, Parameter
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> optimizer = ADOPT([w], lr=0.5)
        >>> optimizer.step()
        >>> w.data
        array([1., 1.])
        >>> optimizer.step()
        >>> w.data
        array([0.95, 1.05])

    Source: Taniguchi et al., ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate (arXiv 2411.02853),
    algorithm 2, with its clipping. Later code of the authors raises eps at first instead. Not in torch.
    """

    rule = kernels.adopt
    state_names = {"exp_avg": None, "exp_avg_sq": None}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
                decoupled_weight_decay=decoupled_weight_decay,
            ),
            **storage,
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "eps": group["eps"],
            "clip": (step - 1) ** 0.25,
            "first": step == 1,
            **decay(group),
        }
