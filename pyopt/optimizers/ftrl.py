"""Follow the regularized leader, proximal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.checks import non_negative, positive
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class FTRL(Optimizer):
    """Adagrad whose parameters are the best for all gradients so far, with penalties that make them sparse.

        z = z + g - (sqrt(n + g**2) - sqrt(n)) / lr * p
        n = n + g**2
        p = 0                                                               where abs(z) <= l1
        p = (sign(z) * l1 - z) / ((beta + sqrt(n)) / lr + l2)               else

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, > 0.
        l1: the L1 penalty, >= 0: parameters that it outweighs are exactly 0.
        l2: the L2 penalty, >= 0.
        beta: added to the root, >= 0.
        initial_accumulator_value: what the sum n starts with, >= 0.
        maximize: ascend instead of descend.

    Gradients are arrays, or row-sparse (see RowSparse): then it steps the touched rows alone.

    State: "z" and "n" per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, FTRL
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> FTRL([w], lr=0.5, l1=2.0).step()
        >>> w.data.round(6)
        array([0.173522, 0.      ])

    Source: McMahan et al., Ad Click Prediction: a View from the Trenches (KDD 2013), algorithm 1. The l2 of Keras is
    half of it. z starts at 0, as in Keras: as if the parameters had started at 0, which they should. Not in torch.
    """

    rule = kernels.ftrl
    state_names = {"z": None, "n": None}
    checks = {"lr": positive, "l1": non_negative, "l2": non_negative, "beta": non_negative}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        l1: float = 0,
        l2: float = 0,
        beta: float = 0,
        initial_accumulator_value: float = 0.1,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                l1=l1,
                l2=l2,
                beta=beta,
                initial_accumulator_value=initial_accumulator_value,
                maximize=maximize,
            ),
            **storage,
        )

    def initial_value(self, name: str, group: Group) -> float:
        return float(group["initial_accumulator_value"]) if name == "n" else 0.0

    def takes_rows(self, group: Group) -> bool:
        return True

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {
            "inverse_lr": 1 / group["lr"],
            "l1": group["l1"],
            "ridge": group["beta"] / group["lr"] + group["l2"],
            "gradient_factor": -1 if group["maximize"] else 1,
        }
