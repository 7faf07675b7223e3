"""Parameter groups: made of what the user passes, checked, and matched with gradients."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import numpy as np

from pyopt.parameter import Parameter, check_data

Group = dict[str, Any]

# What the options are called elsewhere.
ELSEWHERE = {"learning_rate": "lr", "epsilon": "eps"}


def as_groups(params: Any) -> list[Any]:
    """What a constructor takes as a list of groups."""
    if isinstance(params, Mapping) and "params" in params:
        raise TypeError(
            f"params is a {type(params).__name__} with the key 'params': as a group it must stand in a list, "
            "[{'params': ...}]; for parameters by name pass the inner mapping, params['params']"
        )
    if isinstance(params, (Mapping, ItemsView)):
        groups = [{"params": params}] if len(params) else []
    elif isinstance(params, (np.ndarray, Parameter, str, Set)) or not isinstance(params, Iterable):
        raise TypeError(
            f"params is a {type(params).__name__}, must be an ordered iterable of arrays or of dicts, or a mapping of "
            "names to arrays"
        )
    else:
        groups = list(params)
        if groups and not isinstance(groups[0], Mapping):
            groups = [{"params": groups}]
    if not groups:
        raise ValueError("params is empty, must hold at least one parameter")
    return groups


def as_parameters(params: Any, first: int) -> tuple[list[Parameter], list[str] | None, bool]:
    """The "params" of a group: Parameters, their names where they came with names, and whether an array came bare.

    first is the number of parameters in the groups before, for messages.
    """
    if isinstance(params, (np.ndarray, Parameter)):
        params = [params]
    if isinstance(params, (Mapping, ItemsView)):
        items: list[Any] = list(leaves(dict(params)))
    elif isinstance(params, (str, Set)) or not isinstance(params, Iterable):
        raise TypeError(f"'params' is a {type(params).__name__}, must be an ordered iterable of arrays, or a mapping")
    else:
        items = list(params)
    parameters = []
    names = []
    bare = False
    for i, item in enumerate(items, first):
        name = None
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            name, item = item
            names.append(name)
        if not isinstance(item, Parameter):
            check_data(f"parameter {name!r}" if name else f"parameter {i}", item)
            item = Parameter(item, name=name)
            bare = True
        parameters.append(item)
    if names and len(names) != len(parameters):
        raise ValueError(f"{len(names)} of {len(parameters)} parameters of a group have names, must be all or none")
    check_unique(names, "parameters of a group")
    return parameters, names or None, bare


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, lists and tuples, with their names: keys and places joined by dots."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if not isinstance(key, str):
                raise TypeError(f"{'.'.join(path) or 'a mapping'} has the key {key!r}, must be a str: a name")
            yield from leaves(value, (*path, key))
    elif isinstance(tree, (list, tuple)):
        for place, value in enumerate(tree):
            yield from leaves(value, (*path, str(place)))
    else:
        yield ".".join(path), tree


def check_unique(names: Sequence[str], what: str) -> None:
    """Raise if a name stands for two."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the name {name!r} stands for two {what}, must be unique")
        seen.add(name)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_keys(group: Group, options: Iterable[str]) -> None:
    """Raise unless a group has its parameters and all options, and no key that is an option misspelt."""
    options = tuple(options)
    for key in ("params", *options):
        if key not in group:
            raise KeyError(f"a param group has no {key!r}")
    for key in group.keys() - {"params", "param_names", *options}:
        if isinstance(key, str) and (option := meant(key, options)):
            raise ValueError(f"unknown key {key!r} in a param group, is {option!r} meant?")
    params = group["params"]
    if not isinstance(params, list) or not all(isinstance(p, Parameter) for p in params):
        raise TypeError(f"'params' of a param group is {type(params).__name__}, must be a list of Parameters")
    names = group.get("param_names", ())
    if "param_names" in group and (not isinstance(names, list) or len(names) != len(params)):
        raise ValueError(f"'param_names' of a param group is {names!r}, must be a list of {len(params)} names")


@lru_cache(maxsize=1024)
def meant(key: str, options: tuple[str, ...]) -> str | None:
    """The option that a key resembles; None for a key of the user's own, such as lr_scale or max_momentum."""
    word = key.lower().replace("-", "_").strip("_ ")
    if word in ELSEWHERE and ELSEWHERE[word] in options:
        return ELSEWHERE[word]
    for option in options:
        if f"_{option}_" in f"_{word}_" and word != option:  # an option with words around it is meant so
            continue
        if sorted(word) == sorted(option) or SequenceMatcher(None, word, option).ratio() > 0.75:
            return option
    return None


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients_in_order(grads: Any, groups: Sequence[Group]) -> list[Any]:
    """The gradients of a step, one per parameter in the order of the groups."""
    if not isinstance(grads, (list, tuple)):
        if isinstance(grads, Mapping):
            return _by_name(grads, groups)
        _check_ordered(grads)
    in_order = list(grads)
    expected = 0
    for group in groups:
        expected += len(group["params"])
    if len(in_order) != expected:
        raise ValueError(f"grads has {len(in_order)} items, must have {expected}: one per parameter")
    return in_order


def _check_ordered(grads: Any) -> None:
    """Raise unless the gradients come in an order of their own."""
    if isinstance(grads, (ValuesView, Set)):
        raise TypeError(
            f"grads is a {type(grads).__name__}, whose order need not be that of the parameters: pass the mapping "
            "itself, to parameters that have names"
        )
    if isinstance(grads, (str, bytes)) or not isinstance(grads, Iterable) or getattr(grads, "ndim", 1) == 0:
        raise TypeError(
            f"grads is a {type(grads).__name__}, must be an iterable, one gradient per parameter, or a mapping by name"
        )


def _by_name(grads: Mapping[str, Any], groups: Sequence[Group]) -> list[Any]:
    names: list[str] = []
    for group in groups:
        for i, p in enumerate(group["params"]):
            name = group["param_names"][i] if "param_names" in group else p.name
            if name is None:
                raise TypeError(
                    f"grads is a {type(grads).__name__}, but parameter {len(names)} has no name: pass the parameters "
                    "as a mapping of the same form, or grads as a list in their order"
                )
            names.append(name)
    check_unique(names, "parameters")
    items = list(leaves(grads))
    check_unique([name for name, _ in items], "gradients")
    given = dict(items)
    missing = [name for name in names if name not in given]
    unknown = sorted(given.keys() - set(names))
    if missing or unknown:
        parts = [f"no gradient for {missing} (None stands for none)"] * bool(missing)
        parts += [f"gradients for {unknown}, which are no parameters"] * bool(unknown)
        raise ValueError(f"grads has {' and '.join(parts)}; the parameters are {names}")
    return [given[name] for name in names]
