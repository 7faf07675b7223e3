"""LARS: SGD with a rate per layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class LARS(Optimizer):
    """Gradient descent for large batches: each tensor has a rate that goes with its own norm.

        r = trust_coefficient * |p| / (|g| + weight_decay * |p|)
        b = momentum * b + lr * r * (g + weight_decay * p)
        p = p - b                                        or, with nesterov, with the new b in place of the one before:
        p = p - (momentum * b + lr * r * (g + weight_decay * p))

    |x| is the Euclidean norm over the tensor, summed in double. r is 1 where a norm is 0, and in groups with
    `trust_ratio=False`, as is usual for biases and the weights of norms.

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        momentum: decay of the momentum, >= 0; 0 keeps none.
        weight_decay: factor of the L2 penalty, >= 0.
        trust_coefficient: how far a step goes at lr 1, as a share of the norm of the tensor, >= 0.
        nesterov: step from where the momentum leads.
        trust_ratio: whether the norms count.
        maximize: ascend instead of descend.

    State: with momentum "momentum_buffer" (b) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import LARS, Parameter
        >>> w = Parameter(np.array([3.0, 4.0]), grad=np.array([0.0, 2.0]))
        >>> b = Parameter(np.array([3.0, 4.0]), grad=np.array([0.0, 2.0]))
        >>> LARS([{"params": [w]}, {"params": [b], "trust_ratio": False}], lr=0.5, trust_coefficient=0.1).step()
        >>> w.data, b.data
        (array([3.  , 3.75]), array([3., 3.]))

    Source: You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks (arXiv 1708.03888), algorithm 1:
    the rate is a part of the momentum. Not in torch. optax divides by the norm of g + weight_decay * p instead; timm
    keeps the learning rate out of the momentum, as torch's SGD does.
    """

    rule = kernels.lars
    state_names = {"momentum_buffer": "momentum"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        *,
        trust_ratio: bool = True,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                trust_coefficient=trust_coefficient,
                nesterov=nesterov,
                trust_ratio=trust_ratio,
                maximize=maximize,
            ),
            **storage,
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {"lr": group["lr"], "gradient_factor": -1 if group["maximize"] else 1}
