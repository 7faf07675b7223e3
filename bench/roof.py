"""The roof: a sweep over the streams of an optimizer with next to no arithmetic, by the same engine and threads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyopt import Optimizer
from pyopt._isa import kernels
from pyopt.checks import count
from pyopt.optimizer import Group


class Roof(Optimizer):
    """Reads p, g and `states` arrays, writes p and the arrays; no value changes."""

    rule = kernels.roof
    state_names = dict.fromkeys(rule.states)
    checks = {"states": count}

    def __init__(self, params: Iterable[Any], states: int) -> None:
        self.state_names = dict.fromkeys(self.rule.states[:states])
        super().__init__(params, {"states": states})

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {"gradient_factor": 0.0, "states": group["states"]}
