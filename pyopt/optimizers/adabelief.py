"""AdaBelief."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers._decay import decay
from pyopt.storage import Storage


class AdaBelief(Optimizer):
    """Adam with the moving variance of the gradient in the place of its moving mean square.

        g = g + weight_decay * p                         or, if decoupled_weight_decay, p = (1 - lr * weight_decay) * p
        m = m + (1 - betas[0]) * (g - m)
        s = betas[1] * s + (1 - betas[1]) * (g - m)**2 + eps
        p = p - lr / (1 - betas[0]**t) * m / (sqrt(s) / sqrt(1 - betas[1]**t) + eps)

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        betas: decay of the two moving means, each >= 0 and < 1.
        eps: added to the variance in each step, and to its root, >= 0.
        weight_decay: factor of the L2 penalty, >= 0; see decoupled_weight_decay.
        decoupled_weight_decay: shrink the parameters by lr * weight_decay, or add the penalty's gradient.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_avg_var" (s) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, AdaBelief
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> AdaBelief([w], lr=0.05).step()
        >>> w.data.round(6)
        array([0.944444, 1.055556])

    Source: Zhuang et al., AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients (arXiv
    2010.07468), algorithm 2; without the rectification that the authors' package turns on. Not in torch.
    """

    rule = kernels.adabelief
    state_names = {"exp_avg": None, "exp_avg_var": None}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
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
            "step_size": group["lr"] / (1 - beta1**step),
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "inverse_sqrt_bias_correction2": 1 / math.sqrt(1 - beta2**step),
            "eps": group["eps"],
            **decay(group),
        }
