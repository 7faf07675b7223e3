"""Adam of the touched rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.checks import positive
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class SparseAdam(Optimizer):
    """Adam for tables of which a step touches few rows: the others stay as they are, and so do their moments.

        m = m + (1 - betas[0]) * (g - m)
        v = v + (1 - betas[1]) * (g**2 - v)
        p = p - lr * sqrt(1 - betas[1]**t) / (1 - betas[0]**t) * m / (sqrt(v) + eps)

    in the touched rows; t counts the steps of the whole table.

    Args:
        params: parameters or groups of them (see Optimizer), in C order; their gradients must be
            row-sparse (see RowSparse).
        lr: learning rate, > 0.
        betas: decay of the two moving means, each >= 0 and < 1.
        eps: added to the root, > 0.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_avg_sq" (v) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer; at the step, TypeError for a gradient that is an array: Adam takes those.
        IndexError: at the step, for an index beyond the table.

    Example:
        >>> import numpy as np
        >>> from pyopt import RowSparse, SparseAdam
        >>> table = np.ones((3, 2))
        >>> SparseAdam([table], lr=0.5).step(grads=[RowSparse([1], np.array([[4.0, -9.0]]), (3, 2))])
        >>> table.round(6).tolist()
        [[1.0, 1.0], [0.5, 1.5], [1.0, 1.0]]

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization (arXiv 1412.6980), end of section 2, on the rows
    that have a gradient, as torch.optim.SparseAdam does it: a row's moments do not decay while it rests, and eps is
    added before the bias correction, so that it counts for more than in Adam at first.
    """

    rule = kernels.sparse_adam
    state_names = {"exp_avg": None, "exp_avg_sq": None}
    counts_steps = True
    needs_rows = True
    checks = {"lr": positive, "eps": positive}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, maximize=maximize), **storage)

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "step_size": group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step),
            "weight1": 1 - beta1,
            "weight2": 1 - beta2,
            "eps": group["eps"],
            "gradient_factor": -1 if group["maximize"] else 1,
        }
