"""NAdam."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers._decay import decay
from pyopt.storage import Storage


class NAdam(Optimizer):
    """Adam with Nesterov's momentum, whose share grows with the steps.

        g = g + weight_decay * p                         or, if decoupled_weight_decay, p = (1 - lr * weight_decay) * p
        mu = betas[0] * (1 - 0.96**(t * momentum_decay) / 2), and mu_next the same with t + 1
        M = M * mu
        m = m + (1 - betas[0]) * (g - m)
        v = betas[1] * v + (1 - betas[1]) * g**2
        d = sqrt(v / (1 - betas[1]**t)) + eps
        p = p - (lr * (1 - mu) / (1 - M) * g + lr * mu_next / (1 - M * mu_next) * m) / d

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        betas: decay of the two moving means, each >= 0 and < 1.
        eps: added to the root, >= 0.
        weight_decay: factor of the L2 penalty, >= 0; see decoupled_weight_decay.
        momentum_decay: how fast the momentum grows to betas[0], >= 0.
        decoupled_weight_decay: shrink the parameters by lr * weight_decay instead of adding the penalty's gradient.
        maximize: ascend instead of descend.

    State: "step" (t), "mu_product" (M, a number), "exp_avg" (m), "exp_avg_sq" (v) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, NAdam
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> NAdam([w], lr=0.5).step()
        >>> w.data.round(6)
        array([0.471774, 1.528226])

    Source: Dozat, Incorporating Nesterov Momentum into Adam (ICLR workshop 2016), algorithm 2 and the schedule of mu in
    section 3.
    """

    rule = kernels.nadam
    state_names = {"exp_avg": None, "exp_avg_sq": None}
    number_states = ("mu_product",)
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
                momentum_decay=momentum_decay,
                decoupled_weight_decay=decoupled_weight_decay,
                maximize=maximize,
            ),
            **storage,
        )

    def initial_value(self, name: str, group: Group) -> float:
        return 1.0 if name == "mu_product" else 0.0

    def next_numbers(self, group: Group, step: int, numbers: dict[str, float]) -> dict[str, float]:
        mu, mu_next = (group["betas"][0] * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in (step, step + 1))
        return {"mu_product": numbers["mu_product"] * mu, "mu": mu, "mu_next": mu_next}

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        mu, mu_next, mu_product = group["mu"], group["mu_next"], group["mu_product"]
        return {
            "gradient_step_size": lr * (1 - mu) / (1 - mu_product),
            "step_size": lr * mu_next / (1 - mu_product * mu_next),
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "inverse_bias_correction2": 1 / (1 - beta2**step),
            "eps": group["eps"],
            **decay(group),
        }
