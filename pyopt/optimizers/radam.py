"""RAdam."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers._decay import decay
from pyopt.storage import Storage


class RAdam(Optimizer):
    """Adam that divides by the second moment only once that is known well enough.

        g = g + weight_decay * p                         or, if decoupled_weight_decay, p = (1 - lr * weight_decay) * p
        m = m + (1 - betas[0]) * (g - m)
        v = betas[1] * v + (1 - betas[1]) * g**2
        c = 2 / (1 - betas[1]) - 1
        r = c - 2 * t * betas[1]**t / (1 - betas[1]**t)
        k = sqrt((r - 4) * (r - 2) * c / ((c - 4) * (c - 2) * r))
        p = p - lr / (1 - betas[0]**t) * m * k * sqrt(1 - betas[1]**t) / (sqrt(v) + eps)    if r > 5
        p = p - lr / (1 - betas[0]**t) * m                                                  else

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        betas: decay of the two moving means, each >= 0 and < 1.
        eps: added to the root, >= 0.
        weight_decay: factor of the L2 penalty, >= 0; see decoupled_weight_decay.
        decoupled_weight_decay: shrink the parameters by lr * weight_decay instead of adding the penalty's gradient.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_avg_sq" (v) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, RAdam
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> RAdam([w], lr=0.5).step()
        >>> w.data.round(6)
        array([-1.   ,  1.125])

    Source: Liu et al., On the Variance of the Adaptive Learning Rate and Beyond (arXiv 1908.03265), algorithm 2. As in
    torch, the threshold of r is 5, and eps is added to the root before its bias is corrected.
    """

    rule = kernels.radam
    state_names = {"exp_avg": None, "exp_avg_sq": None}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
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
        bias_correction2 = 1 - beta2**step
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * beta2**step / bias_correction2
        step_size = group["lr"] / (1 - beta1**step)
        if rectified := length > 5:
            known = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step_size *= math.sqrt(bias_correction2 * known)
        return {
            "step_size": step_size,
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "eps": group["eps"],
            "rectified": rectified,
            **decay(group),
        }
