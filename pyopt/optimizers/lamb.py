"""LAMB: Adam with a rate per layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class LAMB(Optimizer):
    """Adam for large batches: each tensor moves by the share lr of its own norm.

        m = m + (1 - betas[0]) * (g - m)
        v = betas[1] * v + (1 - betas[1]) * g**2
        u = m / (1 - betas[0]**t) / (sqrt(v / (1 - betas[1]**t)) + eps) + weight_decay * p
        p = p - lr * |p| / |u| * u

    |x| is the Euclidean norm over the tensor, summed in double. The ratio of the norms is 1 where one of them is 0,
    and in groups with `trust_ratio=False`, as is usual for biases and the weights of norms.

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0: how far a step goes, as a share of the norm of the tensor.
        betas: decay of the two moving means, each >= 0 and < 1.
        eps: added to the root, >= 0.
        weight_decay: decay of the parameters, as a part of u, >= 0.
        trust_ratio: whether the ratio of the norms counts.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_avg_sq" (v) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import LAMB, Parameter
        >>> w = Parameter(np.array([3.0, 4.0]), grad=np.array([4.0, -0.25]))
        >>> b = Parameter(np.array([3.0, 4.0]), grad=np.array([4.0, -0.25]))
        >>> LAMB([{"params": [w]}, {"params": [b], "trust_ratio": False}], lr=0.5).step()
        >>> w.data.round(4), b.data.round(4)
        (array([1.2322, 5.7678]), array([2.5, 4.5]))

    Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes (arXiv 1904.00962),
    algorithm 2, with phi the identity. Not in torch. NVIDIA's also divides all gradients by their global norm;
    bitsandbytes only limits the norm of u.
    """

    rule = kernels.lamb
    state_names = {"exp_avg": None, "exp_avg_sq": None}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        *,
        trust_ratio: bool = True,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, trust_ratio=trust_ratio, maximize=maximize),
            **storage,
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "inverse_bias_correction1": 1 / (1 - beta1**step),
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "inverse_sqrt_bias_correction2": 1 / math.sqrt(1 - beta2**step),
            "gradient_factor": -1 if group["maximize"] else 1,
        }
