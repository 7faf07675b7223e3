"""Checkpoints: the state of an optimizer as plain dicts, and back, all of it or nothing."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import starmap
from operator import setitem
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyopt import storage
from pyopt._groups import Group
from pyopt._options import CHECKS
from pyopt.checks import count, number
from pyopt.parameter import (
    Parameter,
    apart_from,
    check_codes,
    check_master_values,
    check_state_is_dict,
    check_state_values,
    label,
    memory_ranges,
    overlapping,
    same_order,
)

if TYPE_CHECKING:
    from pyopt.optimizer import Optimizer

StateDict = dict[str, Any]
State = dict[str, Any]


# --- from an optimizer ------------------------------------------------------------------------------------------------


def make(optimizer: Optimizer, copy: bool) -> StateDict:
    """The state of the optimizer, a snapshot or with the live arrays."""
    # As they are now: another thread may go on changing them.
    live = [{**group, "params": list(group["params"])} for group in list(optimizer.param_groups)]
    indices = {p: i for i, p in enumerate(p for group in live for p in group["params"])}
    groups = []
    for group in live:
        packed = {key: plain(value) for key, value in group.items() if key != "params"}
        groups.append({**packed, "params": [indices[p] for p in group["params"]]})
    state = {}
    for key, entry in list(optimizer.state.items()):
        if key in indices and entry:
            check_state_is_dict(label(indices[key], key), entry)
            state[indices[key]] = plain(dict(entry))
        elif not isinstance(key, Parameter):  # the user's own, of the optimizer as a whole
            if as_index(key) is not None:
                raise ValueError(f"state has the key {key!r}, which a checkpoint would take for a parameter's number")
            state[key] = plain(entry)
    result = {"state": state, "param_groups": groups}
    return deepcopy(result) if copy else result


def plain(value: Any) -> Any:
    """The value with Python's numbers instead of NumPy's, inside lists, tuples and dicts too."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    return value


# --- into an optimizer ------------------------------------------------------------------------------------------------


Write = tuple[Any, Any, Any]  # the arguments of setitem


class Loaded(NamedTuple):
    """What a checkpoint makes of an optimizer, aside; the arrays get their numbers by the writes."""

    groups: list[Group]
    state: defaultdict[Any, Any]
    writes: list[Write]


def load(optimizer: Optimizer, state_dict: StateDict) -> None:
    """Make the optimizer what the checkpoint says: all checks first, then new dicts aside, then one commit."""
    loaded = prepare(optimizer, state_dict)
    writes = [*loaded.writes, *replacements(optimizer, loaded.groups, loaded.state)]
    deque(starmap(setitem, writes), maxlen=0)  # a single call, in C: no signal can come between two of the writes


def prepare(optimizer: Optimizer, state_dict: StateDict) -> Loaded:
    """What the checkpoint makes of the optimizer, all checks made; nothing has changed yet."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"state_dict has no {key!r}, only {sorted(map(str, state_dict))}")
    groups = _checked_groups(optimizer, state_dict["param_groups"])
    entries, own = _checked_states(optimizer, state_dict["state"], groups)
    live = optimizer.state if isinstance(optimizer.state, dict) else {}
    reusable = _reusable([p for group in groups for p in group["params"]], entries, live)
    written = memory_ranges(array for array, _ in reusable.values())
    state: defaultdict[Any, Any] = defaultdict(dict, deepcopy(own))
    writes: list[Write] = []
    for p, entry in entries.items():
        new = state[p] = {}
        for name, value in entry.items():
            if (p, name) in reusable:
                new[name], _ = reusable[p, name]
            elif _is_like(value, p.data):
                new[name] = np.empty_like(p.data, dtype=value.dtype)
            else:
                new[name] = deepcopy(value)
                continue
            writes.append((new[name], ..., apart_from(written, value)))
    return Loaded(groups, state, writes)


def replacements(optimizer: Any, groups: list[Group], state: Any) -> list[Write]:
    """The writes that put groups and state in the place of the optimizer's."""
    holder = vars(optimizer)
    if isinstance(optimizer.param_groups, list):
        return [(optimizer.param_groups, slice(None), groups), (holder, "state", state)]
    return [(holder, "param_groups", groups), (holder, "state", state)]


def natural(value: Any) -> Any:
    """What a 0-d array holds: .npz makes such arrays of numbers, strings and dicts."""
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def as_index(key: Any) -> int | None:
    """A parameter's number; JSON makes strings of them."""
    if isinstance(key, str) and key.isascii() and key.isdigit():
        return int(key)
    return int(key) if isinstance(key, (int, np.integer)) and not isinstance(key, bool) else None


def is_number(text: str) -> bool:
    """Whether a string is a number: a parameter's, and written as none is."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _mapping(what: str, value: Any) -> Mapping[Any, Any]:
    value = natural(value)
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is a {type(value).__name__}, must be a dict")
    return value


def _list(what: str, value: Any) -> list[Any]:
    value = value.tolist() if isinstance(value, np.ndarray) and value.ndim == 1 else value
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{what} is a {type(value).__name__}, must be a list")
    return list(value)


def _checked_groups(optimizer: Optimizer, param_groups: Any) -> list[Group]:
    """The saved groups, with the live parameters."""
    saved_groups = _list("state_dict: param_groups", param_groups)
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(f"state_dict has {len(saved_groups)} param groups, must have {len(optimizer.param_groups)}")
    groups = []
    first = 0
    for i, (live, saved_group) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        what = f"param group {i}"
        saved = dict(_mapping(f"state_dict: {what}", saved_group))
        for group, where in ((live, "the optimizer"), (saved, "state_dict")):
            if "params" not in group:
                raise KeyError(f"{where}: {what} has no 'params', only {sorted(map(str, group))}")
        indices = _list(f"state_dict: 'params' of {what}", saved.pop("params"))
        expected = list(range(first, first + len(live["params"])))
        if indices != expected:
            raise ValueError(f"state_dict: {what} has parameters {indices}, must have {expected}")
        first += len(expected)
        if "param_names" in saved:
            names = _list(f"state_dict: 'param_names' of {what}", saved.pop("param_names"))
            if "param_names" in live and names != live["param_names"]:
                raise ValueError(f"state_dict: {what} has param_names {names}, must have {live['param_names']}")
            saved["param_names"] = list(map(str, names))
        groups.append(_checked_group(optimizer, what, live, saved))
    return groups


def _checked_group(optimizer: Optimizer, what: str, live: Group, saved: Group) -> Group:
    """A saved group with the live parameters and their names."""
    options = optimizer.defaults
    # A key of the user's own may be called like an option of another optimizer (SAM's rho): the live group has it too.
    if foreign := sorted(map(str, (saved.keys() & CHECKS.keys()) - options.keys() - live.keys())):
        raise ValueError(
            f"state_dict of another optimizer: {what} has {foreign[0]!r}, which {type(optimizer).__name__} has not"
        )
    group = deepcopy(saved)
    for key in saved.keys() & options.keys():
        group[key] = _option(saved[key], options[key])
    group |= {k: v for k, v in optimizer.later.items() if k in options and k not in saved}
    if not storage.checked(saved):  # how state is stored is no matter of the numbers
        group |= storage.checked(live)
    group |= {k: v for k, v in storage.USUAL.items() if k in options and k not in group}
    group |= {k: live[k] for k in ("param_names",) if k in live}
    group["params"] = live["params"]
    try:
        optimizer.check_group(group)
    except (KeyError, TypeError, ValueError) as error:
        kind = next(kind for kind in (KeyError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(f"state_dict of another optimizer, or damaged: {what}: {error.args[0]}") from None
    return group


def _option(value: Any, default: Any) -> Any:
    """An option as Python's numbers; a list or array, from JSON or .npz, as the tuple that it was."""
    value = plain(natural(value))
    if isinstance(default, tuple) and isinstance(value, (list, np.ndarray)):
        return tuple(plain(list(value)))
    return deepcopy(value)


def _checked_states(
    optimizer: Optimizer, saved: Any, groups: Sequence[Group]
) -> tuple[dict[Parameter, State], dict[Any, Any]]:
    """The saved state by live parameter, and what the user keeps beside."""
    params = [(p, group) for group in groups for p in group["params"]]
    names = {name for group in groups for name in group.get("param_names", ())}
    entries: dict[Parameter, State] = {}
    own = {}
    for key, value in _mapping("state_dict: state", saved).items():
        index = as_index(key)
        if isinstance(key, str) and index is None and key not in names and not is_number(key):
            own[key] = value
            continue
        if index is None or not 0 <= index < len(params):
            raise ValueError(f"state_dict has state of parameter {key!r}, must be an int from 0 to {len(params) - 1}")
        p, group = params[index]
        if p in entries:
            raise ValueError(f"state_dict has state of parameter {index} twice")
        entry = dict(_mapping(f"state_dict: state of {label(index, p)}", value))
        optimizer._check_entry(label(index, p), entry, p, group)
        if entry:
            entries[p] = entry
    return entries, own


def check_entry(optimizer: Optimizer, what: str, entry: State, p: Parameter, group: Group) -> None:
    """Raise unless an entry is one that the optimizer could have made for the parameter, with the user's own beside."""
    numbers = (*(("step",) if optimizer.counts_steps else ()), *optimizer.number_states)
    known = {*optimizer.state_names, *numbers}
    if entry and not known & entry.keys():  # the user's own alone, from before the first step
        return
    for name in numbers:
        if name not in entry:
            raise KeyError(f"{what}: state_dict has no {name!r}, only {sorted(map(str, entry))}")
        check = saved_count if name == "step" else _float
        entry[name] = check(f"{what}: state_dict: {name}", entry[name])
    needed = set(filter(None, optimizer.state_streams(group)))
    for name in (known - set(numbers)) & (needed | entry.keys()):
        if f"{name}_absmax" in entry and name in entry:
            check_codes(what, name, entry[name], entry[f"{name}_absmax"], p.data)
        else:
            check_state_values(what, name, entry, p.data, optimizer.rule is not None and optimizer.rule.by_row)
    if (master := storage.master_of(p.data.dtype.name, storage.checked(group))) is not None:
        if master not in entry:
            raise KeyError(f"{what}: state_dict has no {master!r}, only {sorted(map(str, entry))}")
        check_master_values(what, master, entry[master], p.data)


def saved_count(what: str, value: Any) -> int:
    """A step count: .npz and JSON make arrays and floats of them."""
    step = natural(value)
    if isinstance(step, (float, np.floating)) and step.is_integer():
        step = int(step)
    try:
        count(what, step)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(repr(step), repr(value), 1)) from None
    return int(step)


def _float(what: str, value: Any) -> float:
    """A number of the state."""
    value = natural(value)
    number(what, value)
    return float(value)


def _reusable(
    params: Iterable[Parameter], entries: Mapping[Parameter, State], live: Mapping[Any, Any]
) -> dict[tuple[Parameter, str], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The live arrays that the saved numbers can be copied into: users may hold them."""
    found = {}
    for p, entry in entries.items():
        current = live.get(p)
        if not isinstance(current, dict):
            continue
        for name, value in entry.items():
            array = current.get(name)
            if isinstance(array, np.ndarray) and isinstance(value, np.ndarray) and _fits(array, value, p.data):
                found[p, name] = (array, value)
    shared = overlapping([*(p.data for p in params), *(array for array, _ in found.values())])
    return {key: pair for key, pair in found.items() if id(pair[0]) not in shared}


def _fits(array: np.ndarray[Any, Any], value: np.ndarray[Any, Any], data: np.ndarray[Any, Any]) -> bool:
    """Whether a live array can take the place of a new copy."""
    return (
        type(array).__setitem__ is np.ndarray.__setitem__  # no code of a subclass in the commit
        and array.shape == value.shape
        and array.dtype == value.dtype
        and not array.dtype.hasobject
        and array.flags.writeable
        and array.flags.aligned
        and (
            same_order(data.shape, array.strides, data.strides, array.itemsize, data.itemsize)
            if array.shape == data.shape
            else array.flags.forc
        )
    )


def _is_like(value: Any, data: np.ndarray[Any, Any]) -> bool:
    """Whether a state entry is an array in the shape of the parameter, to be laid out in memory as that is."""
    return isinstance(value, np.ndarray) and value.shape == data.shape and not value.dtype.hasobject
