"""Prodigy: Adam that finds its own rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.checks import Check, flag, number, positive
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage


def _common(group: Group) -> dict[str, float]:
    """What d, which is one for all parameters, is made with."""
    beta3 = math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]
    return {"beta3": beta3, **{name: group[name] for name in ("d0", "d_coef", "d", "d_numerator")}}


def _beta3(name: str, value: Any) -> None:
    """A number >= 0 and < 1, or None."""
    if value is not None:
        number(name, value, 0, below=1)


CHECKS: Mapping[str, Check] = {
    "beta3": _beta3,
    "bias_correction": flag,
    "safeguard_warmup": flag,
    "d0": positive,
    "d_coef": positive,
    "d": positive,
    "d_numerator": number,
}


class OneDistance:
    """Groups that share d, wherever they come from."""

    param_groups: list[Group]

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, Mapping):
            if self.param_groups:
                common = {name: self.param_groups[0][name] for name in ("d", "d_numerator")}
            else:
                common = {"d": param_group["d0"]} if "d0" in param_group else {}
            param_group = {**common, **param_group}
        super().add_param_group(param_group)  # type: ignore[misc]


class Prodigy(OneDistance, Optimizer):
    """Adam whose rate grows to the distance of the solution, estimated as it goes: lr stays 1.

        with d of the step before, and k = d * lr, with bias_correction times sqrt(1 - betas[1]**t) / (1 - betas[0]**t):
        m = betas[0] * m + (1 - betas[0]) * d * g
        v = betas[1] * v + (1 - betas[1]) * d**2 * g**2
        s = beta3 * s + d / d0 * k * g                   or, with safeguard_warmup, s = beta3 * s + d / d0 * d * g
        a = beta3 * a + d / d0 * k * <g, p0 - p>
        d = max(d, d_coef * a / |s|)                     the new one
        p = (1 - k * weight_decay) * p                   or before all else, unless decoupled, g = g + weight_decay * p
        p = p - k * m / (sqrt(v) + d * eps)

    <g, p0 - p>, with the first values p0 of the parameters, and |s|, the sum of magnitudes, go over all parameters with
    a gradient together, in double; so there is one d.

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: factor of the rate, >= 0: 1, or a schedule that begins or ends there.
        betas: decay of the two moving means, each >= 0 and < 1.
        beta3: decay of the sums behind d, >= 0 and < 1; None is sqrt(betas[1]).
        eps: added to the root, times d, >= 0.
        weight_decay: decay of the parameters, >= 0; see decoupled_weight_decay.
        decoupled_weight_decay: False adds the gradient of an L2 penalty instead.
        bias_correction: correct the rate for the means that begin at 0.
        safeguard_warmup: keep the rate out of |s|, so that a warm-up of lr does not let d grow too far.
        d0: the first d, > 0; too small does no harm.
        d_coef: factor of the estimate, > 0: the knob to turn for a larger or smaller rate.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_avg_sq" (v), "s", "p0" per parameter; d and "d_numerator" (a) are kept in the
    groups, the same in all of them.

    Raises:
        TypeError, ValueError: see Optimizer; a step in which d0, d_coef or beta3 differs between groups.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, Prodigy
        >>> w = Parameter(np.array([2.0, -1.0]))
        >>> optimizer = Prodigy([w])
        >>> for _ in range(200):
        ...     w.grad = w.data.copy()
        ...     optimizer.step()
        >>> bool(abs(w.data).max() < 0.1), optimizer.param_groups[0]["d"] > 0.1
        (True, True)

    Source: Mishchenko and Defazio, Prodigy: An Expeditiously Adaptive Parameter-Free Learner (arXiv 2306.06101),
    algorithm 4, in the form of the authors' package (d / d0 in the sums). Not in torch. The package also limits how
    fast d grows, refuses rates that differ between groups, and goes on with the old d after a NaN.
    """

    rule = kernels.prodigy
    state_names = {"exp_avg": None, "exp_avg_sq": None, "s": None, "p0": None}
    shared_numbers = ("d", "d_numerator")
    counts_steps = True
    checks = CHECKS

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        decoupled_weight_decay: bool = True,
        bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                beta3=beta3,
                eps=eps,
                weight_decay=weight_decay,
                decoupled_weight_decay=decoupled_weight_decay,
                bias_correction=bias_correction,
                safeguard_warmup=safeguard_warmup,
                d0=d0,
                d_coef=d_coef,
                d=d0,
                d_numerator=0.0,
                maximize=maximize,
            ),
            **storage,
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        common = _common(group)
        for name, first in _common(self.param_groups[0]).items():
            if common[name] != first and common[name] == common[name]:  # NaN shows by itself
                raise ValueError(f"{name} == {common[name]!r} in a group, must be {first!r}, as in the first one")
        d, d0, lr, weight_decay = group["d"], group["d0"], group["lr"], group["weight_decay"]
        decoupled = group["decoupled_weight_decay"]
        k = d * lr
        if group["bias_correction"]:
            k *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return {
            "beta3": common["beta3"],
            "step_size": k,
            "beta1": beta1,
            "weight1": (1 - beta1) * d,
            "beta2": beta2,
            "weight2": (1 - beta2) * d * d,
            "weight3": d / d0 * (d if group["safeguard_warmup"] else k),
            "numerator_weight": d / d0 * k,
            "weight_decay": 0 if decoupled else weight_decay,
            "decay_factor": 1 - k * weight_decay if decoupled else 1,
            "gradient_factor": -1 if group["maximize"] else 1,
            "first": step == 1,
        }
