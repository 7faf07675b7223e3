"""Resilient backpropagation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


class Rprop(Optimizer):
    """Steps whose size grows while the sign of the gradient stays, and shrinks when it changes.

        c = g * b
        d = d * (etas[1] if c > 0, etas[0] if c < 0, else 1), within step_sizes
        g = 0 where c < 0
        p = p - sign(g) * d
        b = g

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: the first step, >= 0.
        etas: the factor that shrinks a step, > 0 and < 1, and the one that lets it grow, > 1.
        step_sizes: the smallest step, > 0, and the largest.
        maximize: ascend instead of descend.

    State: "step", "prev" (b), "step_size" (d, at first lr) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, Rprop
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> Rprop([w], lr=0.5).step()
        >>> w.data.round(6)
        array([0.5, 1.5])

    Source: Riedmiller and Braun, A Direct Adaptive Method for Faster Backpropagation Learning (ICNN 1993); the form of
    Igel and Hüsken, Improving the Rprop Learning Algorithm (2000), called Rprop-. NaN in a gradient shows in the
    parameter; torch takes its sign for 0.
    """

    rule = kernels.rprop
    state_names = {"prev": None, "step_size": None}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, dict(lr=lr, etas=etas, step_sizes=step_sizes, maximize=maximize), **storage)

    def initial_value(self, name: str, group: Group) -> float:
        return float(group["lr"]) if name == "step_size" else 0.0

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        eta_minus, eta_plus = group["etas"]
        smallest, largest = group["step_sizes"]
        return {
            "eta_minus": eta_minus,
            "eta_plus": eta_plus,
            "smallest": smallest,
            "largest": largest,
            "gradient_factor": -1 if group["maximize"] else 1,
        }
