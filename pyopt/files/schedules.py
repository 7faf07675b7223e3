"""Schedulers, loaded aside: on twins whose optimizer is a stand-in with the groups that will be."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import Any

from pyopt.files.sides import Call


def staged(what: str, scheduler: Any, optimizer: Any, groups: list[dict[str, Any]]) -> Any:
    """A twin of the scheduler, and of its parts, for `load_state_dict`; it sets lr in the groups."""
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(f"{what} is a {type(scheduler).__name__} of another optimizer")
    twin = copy(scheduler)
    for name, value in vars(scheduler).items():
        if value is optimizer:
            vars(twin)[name] = SimpleNamespace(param_groups=groups)
        elif _is_scheduler(value):
            vars(twin)[name] = staged(what, value, optimizer, groups)
        elif type(value) in (list, dict):
            vars(twin)[name] = copy(value)
            if _are_schedulers(value):
                vars(twin)[name] = [staged(what, each, optimizer, groups) for each in value]
    return twin


def committed(scheduler: Any, twin: Any, optimizer: Any) -> list[Call]:
    """The calls that make the scheduler, and its parts, what the twin is."""
    calls: list[Call] = []
    update = {}
    for name, value in vars(twin).items():
        before = vars(scheduler).get(name)
        if _is_scheduler(before):
            calls += committed(before, value, optimizer)
        elif _are_schedulers(before):
            for part, its_twin in zip(before, value, strict=True):
                calls += committed(part, its_twin, optimizer)
        elif before is not optimizer:
            update[name] = value
    return [*calls, (vars(scheduler).update, update)]


def _is_scheduler(value: Any) -> bool:
    return hasattr(value, "load_state_dict") and hasattr(value, "optimizer")


def _are_schedulers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_scheduler, value))
