"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class SGD(Optimizer):
    """Gradient descent, with (Nesterov) momentum if asked for.

        g = g + weight_decay * p
        b = g at the first step, then momentum * b + (1 - dampening) * g
        p = p - lr * (b, or g + momentum * b with nesterov; g without momentum)

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0.
        momentum: share of the last update that is kept, >= 0.
        dampening: share of the gradient that is withheld from the momentum.
        weight_decay: factor of the L2 penalty, >= 0.
        nesterov: look ahead along the momentum; needs momentum > 0 and dampening 0.
        maximize: ascend instead of descend.

    Gradients are arrays, or row-sparse (see RowSparse): then it steps the touched rows alone, momentum and decay
    included, and the momentum of each row begins at 0.

    State: "momentum_buffer" per parameter if momentum is not 0, else none.

    Raises:
        TypeError, ValueError: see Optimizer; nesterov without momentum or with dampening.

    Example:
        >>> import numpy as np
        >>> from pyopt import SGD, Parameter
        >>> w = Parameter(np.ones(2), grad=np.array([1.0, -2.0]))
        >>> SGD([w], lr=0.25).step()
        >>> w.data
        array([0.75, 1.5 ])

    Source: Sutskever, Martens, Dahl and Hinton, On the importance of initialization and momentum in deep learning
    (ICML 2013), section 2. As in torch, lr multiplies the whole momentum instead of being part of it.
    """

    rule = kernels.sgd
    state_names = {"momentum_buffer": "momentum"}
    unsigned_states = frozenset()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
            ),
            **storage,
        )

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov == True with momentum == {group['momentum']!r} and dampening == {group['dampening']!r}, "
                "must have momentum > 0 and dampening == 0"
            )

    def takes_rows(self, group: Group) -> bool:
        return True

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {
            "lr": group["lr"],
            "momentum": group["momentum"],
            "one_minus_dampening": 1 - group["dampening"],
            "weight_decay": group["weight_decay"],
            "gradient_factor": -1 if group["maximize"] else 1,
            "nesterov": group["nesterov"],
            "first": step == 1,
        }
