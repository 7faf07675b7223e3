"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt.optimizer import Group
from pyopt.optimizers.adam import Adam
from pyopt.storage import Storage


class AdamW(Adam):
    """Adam with `decoupled_weight_decay=True`, which is part of its name and cannot be turned off.

    Args:
        params, lr, betas, eps, amsgrad, maximize, update_clip, cautious: as for Adam.
        weight_decay: decay of the parameters, >= 0: each step takes away the share lr * weight_decay.

    State: as for Adam.

    Raises:
        TypeError, ValueError: see Optimizer; a group or state_dict in which the decay is not decoupled (torch turns it
            on silently).

    Example:
        >>> import numpy as np
        >>> from pyopt import AdamW, Parameter
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> AdamW([w], lr=0.5, weight_decay=0.5).step()
        >>> w.data.round(6)
        array([0.25, 1.25])

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2. As in torch,
    lr multiplies the decay.
    """

    later = {**Adam.later, "decoupled_weight_decay": True}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        update_clip: bool = False,
        cautious: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            update_clip=update_clip,
            cautious=cautious,
            decoupled_weight_decay=True,
            **storage,
        )

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if not group["decoupled_weight_decay"]:
            raise ValueError("decoupled_weight_decay == False, must be True for AdamW; use Adam")
