"""Adagrad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class Adagrad(Optimizer):
    """Steps divided by the root of the sum of all squared gradients so far: rare features learn faster.

        g = g + weight_decay * p
        s = s + g**2
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        lr_decay: decay of the learning rate with the step count t, >= 0.
        weight_decay: factor of the L2 penalty, >= 0.
        initial_accumulator_value: what the sum s starts with, >= 0.
        eps: added to the root, >= 0.
        maximize: ascend instead of descend.

    Gradients are arrays, or row-sparse (see RowSparse): then it steps the touched rows alone, weight_decay included.

    State: "step" (t) and "sum" (s) per parameter, for the constructor's parameters from the start.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Adagrad, Parameter
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> Adagrad([w], lr=0.5).step()
        >>> w.data.round(6)
        array([0.5, 1.5])

    Source: Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
    (JMLR 12, 2011), figure 1, diagonal case.
    """

    rule = kernels.adagrad
    state_names = {"sum": None}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                lr_decay=lr_decay,
                eps=eps,
                weight_decay=weight_decay,
                initial_accumulator_value=initial_accumulator_value,
                maximize=maximize,
            ),
            **storage,
        )
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self.new_state(p, group)

    def initial_value(self, name: str, group: Group) -> float:
        return float(group["initial_accumulator_value"])

    def takes_rows(self, group: Group) -> bool:
        return True

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {
            "lr": group["lr"] / (1 + (step - 1) * group["lr_decay"]),
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "gradient_factor": -1 if group["maximize"] else 1,
        }
