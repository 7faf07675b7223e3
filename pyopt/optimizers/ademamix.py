"""AdEMAMix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.checks import non_negative, triple_of_betas, warmup
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class AdEMAMix(Optimizer):
    """AdamW with a second, much slower moving mean of the gradient: old gradients stay useful for long.

        m = m + (1 - betas[0]) * (g - m)
        n = n + (1 - b) * (g - n)
        v = betas[1] * v + (1 - betas[1]) * g**2
        d = sqrt(v) / sqrt(1 - betas[1]**t) + eps
        p = (1 - lr * weight_decay) * p - lr * (m / (1 - betas[0]**t) + a * n) / d

    a = alpha and b = betas[2], or on the way there, with s = t / warm-up:

        a = s * alpha
        1 / log(b) = (1 - s) / log(betas[0]) + s / log(betas[2])

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        betas: decay of the fast mean, of the squares and of the slow mean, each >= 0 and < 1.
        alpha: share of the slow mean, >= 0.
        beta3_warmup, alpha_warmup: steps in which b and a reach their values, or None: at once. About as many as the
            training has; without them large values diverge at first.
        eps: added to the root, >= 0.
        weight_decay: decoupled decay of the parameters, >= 0.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg_fast" (m), "exp_avg_slow" (n), "exp_avg_sq" (v) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, AdEMAMix
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> AdEMAMix([w], lr=0.5).step()
        >>> w.data.round(6)
        array([0.4999, 1.5001])

    Source: Pagliardini, Ablin and Grangier, The AdEMAMix Optimizer: Better, Faster, Older (arXiv 2409.03137), algorithm
    1 and appendix A.1; defaults of the authors' code. Not in torch.
    """

    rule = kernels.ademamix
    state_names = {"exp_avg_fast": None, "exp_avg_slow": None, "exp_avg_sq": None}
    unsigned_states = frozenset({"exp_avg_sq"})
    counts_steps = True
    checks = {"betas": triple_of_betas, "alpha": non_negative, "beta3_warmup": warmup, "alpha_warmup": warmup}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
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
                alpha=alpha,
                beta3_warmup=beta3_warmup,
                alpha_warmup=alpha_warmup,
                weight_decay=weight_decay,
                maximize=maximize,
            ),
            **storage,
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        lr, alpha, (beta1, beta2, beta3) = group["lr"], group["alpha"], group["betas"]
        if group["alpha_warmup"] is not None:
            alpha *= min(1, step / group["alpha_warmup"])
        if group["beta3_warmup"] is not None and step < group["beta3_warmup"]:
            share = step / group["beta3_warmup"]
            inverse_log = (1 - share) * _inverse_log(beta1) + share * _inverse_log(beta3)
            beta3 = math.exp(1 / inverse_log) if inverse_log else 0
        return {
            "step_size": lr / (1 - beta1**step),
            "slow_step_size": lr * alpha,
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "weight3": 1 - beta3,
            "inverse_sqrt_bias_correction2": 1 / math.sqrt(1 - beta2**step),
            "eps": group["eps"],
            "decay_factor": 1 - lr * group["weight_decay"],
            "gradient_factor": -1 if group["maximize"] else 1,
        }


def _inverse_log(beta: float) -> float:
    return 1 / math.log(beta) if beta else 0
