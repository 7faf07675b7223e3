"""Lion: evolved sign momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class Lion(Optimizer):
    """Steps of one size, in the direction of the sign of an interpolated momentum; decoupled weight decay.

        c = betas[0] * m + (1 - betas[0]) * g
        m = betas[1] * m + (1 - betas[1]) * g
        p = (1 - lr * weight_decay) * p - lr * sign(c)

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0; a third to a tenth of what suits AdamW.
        betas: decay of the momentum as the update sees it, and as it is kept; each >= 0 and < 1.
        weight_decay: decoupled decay of the parameters, >= 0; three to ten times of what suits AdamW.
        maximize: ascend instead of descend.

    State: "exp_avg" (m) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Lion, Parameter
        >>> w = Parameter(np.ones(3), grad=np.array([0.1, -20.0, 0.0]))
        >>> Lion([w], lr=0.5).step()
        >>> w.data
        array([0.5, 1.5, 1. ])

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms (arXiv 2302.06675), algorithm 2. Not in torch.
    """

    rule = kernels.lion
    state_names = {"exp_avg": None}
    unsigned_states = frozenset()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize), **storage)

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "beta1": beta1,
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "decay_factor": 1 - group["lr"] * group["weight_decay"],
            "gradient_factor": -1 if group["maximize"] else 1,
        }
