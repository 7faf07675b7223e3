"""Adagrad with one accumulator per row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers._decay import decay
from pyopt.storage import Storage


class RowwiseAdagrad(Optimizer):
    """Adagrad with one sum for each row of a table, of the mean of its squared gradients: hardly any state.

        g = g + weight_decay * p                         or, if decoupled_weight_decay, p = (1 - lr * weight_decay) * p
        s = s + mean(g**2)                               over the row
        p = p - lr / (sqrt(s) + eps) * g

    A row is what lies under one index of the first axis; a vector has rows of one element, which makes it Adagrad.
    Gradients are arrays, or row-sparse (see RowSparse): then it steps the touched rows alone, decay included.

    Args:
        params: parameters or groups of them (see Optimizer), in C order.
        lr: learning rate, >= 0.
        eps: added to the root, >= 0.
        weight_decay: factor of the L2 penalty, >= 0; see decoupled_weight_decay.
        initial_accumulator_value: what the sums s start with, >= 0.
        maximize: ascend instead of descend.
        decoupled_weight_decay: shrink the parameters instead of adding the penalty's gradient.

    State: "sum" (s), one number per row, of the dtype of the parameter.

    Raises:
        TypeError, ValueError: see Optimizer; a parameter that is not in C order.
        IndexError: at the step, for an index beyond the table.

    Example:
        >>> import numpy as np
        >>> from pyopt import RowSparse, RowwiseAdagrad
        >>> table = np.ones((3, 2))
        >>> optimizer = RowwiseAdagrad([table], lr=0.5)
        >>> optimizer.step(grads=[RowSparse([1], np.array([[7.0, -1.0]]), (3, 2))])
        >>> table.round(6).tolist()
        [[1.0, 1.0], [0.3, 1.1], [1.0, 1.0]]

    Source: Mudigere et al., Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation
    Models (arXiv 2104.05158), section 4.1.4, as FBGEMM has it: lr, eps and both decays mean what they mean there. The
    mean is made in double. Not in torch.
    """

    rule = kernels.rowwise_adagrad
    state_names = {"sum": None}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                eps=eps,
                weight_decay=weight_decay,
                initial_accumulator_value=initial_accumulator_value,
                maximize=maximize,
                decoupled_weight_decay=decoupled_weight_decay,
            ),
            **storage,
        )

    def takes_rows(self, group: Group) -> bool:
        return True

    def initial_value(self, name: str, group: Group) -> float:
        return float(group["initial_accumulator_value"])

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {"lr": group["lr"], "eps": group["eps"], **decay(group)}
