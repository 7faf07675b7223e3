"""Which parameters weight decay is for."""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pyopt._groups import Group, check_unique, leaves
from pyopt.checks import count
from pyopt.parameter import Parameter


def no_decay(named: Any, patterns: Sequence[str] = ("bias", "norm"), *, min_ndim: int = 2) -> list[Group]:
    """Two param groups for an optimizer: what is decayed, and what is not (biases, norms), with "weight_decay" 0.

    A parameter is not decayed if it has fewer than min_ndim axes, or if a pattern occurs in its name at the end of a
    word: no letter follows. Upper and lower case are the same. So "norm" is in "layers.0.LayerNorm.weight" and in
    "norm1.scale", not in "normal.weight". The default is what nanoGPT does by axes and transformers' Trainer by names,
    together; embeddings are decayed.

    Args:
        named: a model by name: a mapping of names to arrays, nested in dicts and lists as an optimizer takes it; an
            iterable of (name, array) pairs, or of Parameters with names; or a torch module, or its named_parameters().
        patterns: what is not decayed, by name; () leaves it to the number of axes.
        min_ndim: arrays with fewer axes are not decayed; 0 leaves it to the names.

    Returns:
        [{"params": ...}, {"params": ..., "weight_decay": 0.0}] with the names kept, in the order given; a group that
        would be empty is left out. The decay of the first is that of the optimizer.

    Raises:
        TypeError, ValueError: no names, a name that stands for two, or what is no array.

    Example:
        >>> import pyopt
        >>> model = {"dense": {"w": np.zeros((3, 2)), "b": np.zeros(2)}, "norm": {"scale": np.ones(2)}}
        >>> optimizer = pyopt.AdamW(no_decay(model), weight_decay=0.1)
        >>> [(group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
        [(['dense.w'], 0.1), (['dense.b', 'norm.scale'], 0.0)]
    """
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(word, str) and word for word in patterns):
        raise TypeError(f"patterns == {patterns!r}, must be a list of str, none empty")
    count("min_ndim", min_ndim)
    items = list(_pairs(named))
    if not items:
        raise ValueError("named is empty, must hold at least one parameter")
    check_unique([name for name, _ in items], "parameters")
    # Without patterns (?!), which matches nothing.
    mark = re.compile(f"(?:{'|'.join(map(re.escape, patterns)) or '(?!)'})(?![^\\W\\d_])", re.IGNORECASE)
    split: tuple[list[Any], list[Any]] = ([], [])
    for name, array in items:
        split[array.ndim < min_ndim or mark.search(name) is not None].append((name, array))
    groups: list[Group] = [{"params": split[0]}, {"params": split[1], "weight_decay": 0.0}]
    return [_with_names(group) for group in groups if group["params"]]


def _pairs(named: Any) -> Iterator[tuple[str, Any]]:
    """The parameters with their names."""
    if callable(getattr(named, "named_parameters", None)):
        named = named.named_parameters()
    if isinstance(named, (Mapping, ItemsView)):
        named = leaves(dict(named))
    elif isinstance(named, (str, np.ndarray, Parameter)) or not isinstance(named, Iterable):
        raise TypeError(
            f"named is a {type(named).__name__}, must be a mapping or pairs of names and arrays, or a module"
        )
    for i, item in enumerate(named):
        if isinstance(item, Parameter) and item.name is not None:
            item = (item.name, item)
        if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str):
            raise TypeError(f"parameter {i} is a {type(item).__name__} without a name, must be a pair (name, array)")
        if not isinstance(getattr(item[1], "ndim", None), int):
            raise TypeError(f"parameter {item[0]!r} is a {type(item[1]).__name__}, must be an array")
        yield item


def _with_names(group: Group) -> Group:
    """The group as its optimizer takes names: pairs; beside the tensors for torch, which knows pairs as of 2.6."""
    if all(isinstance(array, (np.ndarray, Parameter)) for _, array in group["params"]):
        return group
    names, tensors = map(list, zip(*group["params"], strict=True))
    return {**group, "params": tensors, "param_names": names}
