"""Averaged stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers._decay import decay
from pyopt.storage import Storage


class ASGD(Optimizer):
    """Gradient descent that also keeps the average of the parameters, from step t0 on.

        g = g + weight_decay * p
        p = (1 - lambd * eta) * p - eta * g
        ax = p if mu is 1, else ax + mu * (p - ax)
        eta = lr / (1 + lambd * lr * t)**alpha
        mu = 1 / max(1, t - t0)

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        lambd: decay of the parameters and of the learning rate, >= 0. It works without a gradient, too.
        alpha: power of the decay of the learning rate, 0 to 1.
        t0: the step after which the average begins, >= 0.
        weight_decay: factor of the L2 penalty, >= 0.
        maximize: ascend instead of descend.

    State: "step" (t), the numbers "eta" (at first lr) and "mu" (at first 1) of the next step, and "ax", the average,
    per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, ASGD
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> ASGD([w], lr=0.5, lambd=0.5).step()
        >>> w.data.round(6)
        array([-1.25 ,  0.875])

    Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging (SIAM J. Control Optim. 30,
    1992); the schedule: Bottou, Stochastic Gradient Descent Tricks (2012), section 5.
    """

    rule = kernels.asgd
    state_names = {"ax": None}
    number_states = ("eta", "mu")
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay, maximize=maximize),
            **storage,
        )

    def initial_value(self, name: str, group: Group) -> float:
        return {"eta": float(group["lr"]), "mu": 1.0}.get(name, 0.0)

    def next_numbers(self, group: Group, step: int, numbers: dict[str, float]) -> dict[str, float]:
        lr = group["lr"]
        return {
            "eta": lr / (1 + group["lambd"] * lr * step) ** group["alpha"],
            "mu": 1 / max(1, step - group["t0"]),
            "step_size": numbers["eta"],
            "weight": numbers["mu"],
        }

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {
            **decay(group),
            "step_size": group["step_size"],
            "weight": group["weight"],
            "averages": group["weight"] != 1,
            "decay_factor": 1 - group["lambd"] * group["step_size"],
        }
