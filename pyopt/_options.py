"""Options of the optimizers by their usual names: what each may be, and what it means where a checkpoint lacks it.

An option means the same in every optimizer that has it, so its check stands here, once. A class declares in `checks`
only what it has alone, or what it means otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pyopt.checks import Check, betas, etas, flag, fraction, non_negative, number, step_sizes

CHECKS: Mapping[str, Check] = {
    "lr": non_negative,
    "betas": betas,
    "eps": non_negative,
    "weight_decay": non_negative,
    "momentum": non_negative,
    "dampening": number,
    "alpha": fraction,
    "rho": fraction,
    "lr_decay": non_negative,
    "initial_accumulator_value": non_negative,
    "momentum_decay": non_negative,
    "lambd": non_negative,
    "t0": non_negative,
    "etas": etas,
    "step_sizes": step_sizes,
    "maximize": flag,
    "nesterov": flag,
    "centered": flag,
    "amsgrad": flag,
    "update_clip": flag,
    "cautious": flag,
    "trust_ratio": flag,
    "trust_coefficient": non_negative,
    "decoupled_weight_decay": flag,
}

# What checkpoints of older torch lack, and what it means there.
LATER: Mapping[str, Any] = {"maximize": False, "decoupled_weight_decay": False}


def check_options(options: Mapping[str, Any], own: Mapping[str, Check], usual: Mapping[str, Check] = CHECKS) -> None:
    """Raise unless every option passes its check: the class's own, else the usual one of its name, if there is any."""
    for name, value in options.items():
        check = own.get(name) or usual.get(name)
        if check is not None:
            check(name, value)


def check_declaration(cls: type, own: Mapping[str, Check]) -> None:
    """Raise unless each option in the signature of an optimizer with a compiled rule has a check."""
    parameters = [*inspect.signature(cls.__init__).parameters.values()][2:]  # type: ignore[misc]
    options = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if unchecked := [name for name in options if name not in own and name not in CHECKS]:
        raise TypeError(f"{cls.__name__}: no check for the option {unchecked[0]!r}, must be in `checks` of the class")
