"""Adam."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._engine import Rule
from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class Adam(Optimizer):
    """Adaptive moments: a moving mean of the gradient over the root of one of its square, both bias-corrected.

        g = g + weight_decay * p                         or, if decoupled_weight_decay, p = (1 - lr * weight_decay) * p
        m = m + (1 - betas[0]) * (g - m)
        v = betas[1] * v + (1 - betas[1]) * g**2
        u = v, or max(u, v) with amsgrad
        p = p - lr / (1 - betas[0]**t) * m / (sqrt(u) / sqrt(1 - betas[1]**t) + eps)

    Two options need numbers of the whole tensor, summed in double. With `update_clip`, lr is divided by
    max(1, sqrt(mean(r**2))), r = g / max(sqrt(u) / sqrt(1 - betas[1]**t), eps): a tensor whose gradient is much larger
    than its second moment knows yet moves less. With `cautious`, what is taken from p is multiplied by
    [m * g > 0] / max(mean([m * g > 0]), 1e-3): elements do not move against their gradient, the others further.

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        betas: decay of the two moving means, each >= 0 and < 1.
        eps: added to the root, >= 0.
        weight_decay: factor of the L2 penalty, >= 0; see decoupled_weight_decay.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend instead of descend.
        update_clip: clip the update of each tensor by its root mean square; the decoupled decay with it.
        cautious: move only the elements whose update agrees with the gradient; the decoupled decay moves all.
        decoupled_weight_decay: shrink the parameters instead of adding the penalty's gradient: AdamW.

    State: "step" (t), "exp_avg" (m), "exp_avg_sq" (v), with amsgrad "max_exp_avg_sq" (u) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Adam, Parameter
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> Adam([w], lr=0.5).step()
        >>> w.data.round(6)
        array([0.5, 1.5])

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization (arXiv 1412.6980), algorithm 1; amsgrad: Reddi,
    Kale and Kumar, On the Convergence of Adam and Beyond (ICLR 2018), algorithm 2. As in torch, amsgrad takes the
    maximum before the bias correction. update_clip: Wortsman et al., Stable and low-precision training for large-scale
    vision-language models (arXiv 2304.13013), algorithm 2, StableAdamW. cautious: Liang et al., Cautious Optimizers
    (arXiv 2411.16085), algorithm 1, with the scale of timm (others: the number of elements / (of those + 1)).
    """

    rule = kernels.adam
    state_names = {"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"}
    unsigned_states = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
    counts_steps = True
    later = {**Optimizer.later, "update_clip": False, "cautious": False}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        update_clip: bool = False,
        cautious: bool = False,
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
                amsgrad=amsgrad,
                maximize=maximize,
                update_clip=update_clip,
                cautious=cautious,
                decoupled_weight_decay=decoupled_weight_decay,
            ),
            **storage,
        )

    def rule_of(self, group: Group) -> Rule:
        return self.rule.summing if group["update_clip"] or group["cautious"] else self.rule  # type: ignore

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        lr, weight_decay, decoupled = group["lr"], group["weight_decay"], group["decoupled_weight_decay"]
        return {
            "step_size": lr / (1 - beta1**step),
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "inverse_sqrt_bias_correction2": 1 / math.sqrt(1 - beta2**step),
            "eps": group["eps"],
            "weight_decay": 0 if decoupled else weight_decay,
            "decay_factor": 1 - lr * weight_decay if decoupled else 1,
            "gradient_factor": -1 if group["maximize"] else 1,
            "amsgrad": group["amsgrad"],
        }
