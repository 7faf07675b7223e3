"""What saving and loading ask of an optimizer: of one of arrays here, of one of tensors in pyopt/torch/files.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from operator import setitem
from typing import Any, NamedTuple

import numpy as np

from pyopt import _state_dict
from pyopt.files.container import BFLOAT16, Array
from pyopt.optimizer import Optimizer
from pyopt.parameter import check_data, label
from pyopt.storage import dtype_of

Call = tuple[Any, ...]  # a function and its arguments


class Loaded(NamedTuple):
    """What a file makes of an optimizer: its groups, aside, and the calls that commit."""

    groups: list[dict[str, Any]]
    calls: list[Call]


class Stay(NamedTuple):
    """What a file leaves as it is: groups and states of parameters by their places, and the user's own state."""

    groups: list[int]
    state: list[int]
    own: bool


class Side:
    """An optimizer of arrays."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.kind = kind_of(optimizer)

    def lock(self) -> AbstractContextManager[Any]:
        """Held against steps of other threads."""
        return self.optimizer._workspace  # type: ignore[no-any-return]

    # --- save -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with the live arrays; step counts and other numbers of the state are Python's."""
        return self.optimizer.state_dict(copy=False)  # type: ignore[no-any-return]

    def parameters(self) -> list[Array]:
        """The live arrays."""
        return [p.data for p in self._params()]

    def names(self) -> list[str]:
        """How the file calls the parameters: by their names, or numbers."""
        names = self.given_names()
        return [str(i) for i in range(len(self._params()))] if names is None else names

    def given_names(self) -> list[str] | None:
        """The names of the parameters, where there are any and they are unique."""
        groups = self.optimizer.param_groups
        names = [name for group in groups for name in group.get("param_names", ())]
        names = names or [getattr(p, "name", None) for p in self._params()]
        usable = len(set(names)) == len(names) == len(self._params()) and all(isinstance(n, str) for n in names)
        return names if usable else None

    def as_array(self, where: str, value: Any) -> Array | None:
        """A tensor, which may stand in `extra`, as an array."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(value, torch.Tensor):
            return None
        from pyopt.torch.files import as_array

        return as_array(where, value)

    # --- load -----------------------------------------------------------------------------------------------------

    def native(self, array: Array) -> Array:
        """An array of the file as the side has such: of bfloat16 as that of ml_dtypes, where there is that package."""
        if array.dtype == BFLOAT16:
            with suppress(ImportError):
                return array.view(dtype_of("bfloat16"))
        return array

    def parameter_writes(self, values: Sequence[Array | None]) -> list[Call]:
        """The calls that write the parameters, all checked; those without a value stay as they are."""
        arrays = self.writable()
        for what, array, value in zip(self._labels(), arrays, values, strict=True):
            if value is not None and (error := self.unlike(array, value)):
                raise type(error)(f"{what} {error}")
        return [(setitem, array, ..., value) for array, value in zip(arrays, values, strict=True) if value is not None]

    def unlike(self, array: Array, value: Array) -> TypeError | ValueError | None:
        """What keeps a value from being written to a parameter."""
        if value.dtype != array.dtype:
            return TypeError(f"has dtype {called(value.dtype)} in the file, must be {called(array.dtype)}")
        if value.shape != array.shape:
            return ValueError(f"has shape {value.shape} in the file, must be {array.shape}")
        return None

    def refused(self, entries: dict[int, dict[str, Any]]) -> dict[int, str]:
        """Which entries cannot be the state of a parameter with the options of its group, and why."""
        optimizer, labels, found = self._checking(), self._labels(), {}
        params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        for i, entry in entries.items():
            try:
                optimizer._check_entry(labels[i], dict(entry), *params[i])
            except (KeyError, TypeError, ValueError) as error:
                found[i] = str(error.args[0])
        return found

    def options(self, index: int) -> dict[str, Any]:
        """The options of a group as they are."""
        return {key: value for key, value in self.optimizer.param_groups[index].items() if key != "params"}

    def _checking_class(self) -> Any:
        return type(self.optimizer)

    def _checking(self) -> Any:
        """The optimizer of arrays that checks."""
        return self.optimizer

    def writable(self) -> list[Array]:
        """The live arrays, if they can be written to."""
        return [check_data(what, p.data) for what, p in zip(self._labels(), self._params(), strict=True)]

    def loaded(self, state_dict: dict[str, Any], stay: Stay) -> Loaded:
        """All checks of `load_state_dict`, and what it would do; but some things stay as they are."""
        for hook in self.optimizer._load_state_dict_pre_hooks.in_order():
            changed = hook(self.optimizer, state_dict)
            state_dict = state_dict if changed is None else changed
        loaded = _state_dict.prepare(self.optimizer, state_dict)
        self._leave(stay, loaded.groups, loaded.state)
        writes = [*loaded.writes, *_state_dict.replacements(self.optimizer, loaded.groups, loaded.state)]
        return Loaded(loaded.groups, [(setitem, *write) for write in writes])

    def _leave(self, stay: Stay, groups: list[dict[str, Any]], state: Any) -> None:
        """Put into the new groups and state what stays as it is."""
        # Numbers of the whole optimizer, which are the same in each group, are those of the file in all of them.
        taken = next((group for i, group in enumerate(groups) if i not in stay.groups), {})
        shared = {name: taken[name] for name in self._checking_class().shared_numbers if name in taken}
        for i in stay.groups:
            live = self.optimizer.param_groups[i]
            groups[i] = {**live, **shared} if shared else live
        state_now, params = self.optimizer.state, self._params()
        keys = [params[i] for i in stay.state]
        if stay.own:
            known = set(params)
            keys += [key for key in state_now if key not in state and key not in known]
        for key in keys:
            if key in state_now:
                state[key] = state_now[key]

    def last(self, groups: list[dict[str, Any]]) -> list[Call]:
        """What remains to be done when the schedulers have set lr in the groups."""
        return []

    def after(self) -> None:
        """What follows when all is done."""
        for hook in self.optimizer._load_state_dict_post_hooks.in_order():
            hook(self.optimizer)

    def typed(self, name: str, array: Array) -> Array:
        """An array of the file in the type that the optimizer's arrays have."""
        return with_ml_dtypes(name, array)

    def own(self, name: str, array: Array, is_tensor: bool) -> Any:
        """A copy for the user."""
        return with_ml_dtypes(name, np.array(array))

    def borrowed(self, array: Array) -> Any:
        """An array in the mapped file, for something that copies it."""
        return array

    def _params(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _labels(self) -> list[str]:
        names = [name for group in self.optimizer.param_groups for name in group.get("param_names", ())]
        return [f"parameter {n!r}" for n in names] or [label(i, p) for i, p in enumerate(self._params())]


def with_ml_dtypes(name: str, array: Array) -> Array:
    """An array of the file with bfloat16 as the type of ml_dtypes."""
    if array.dtype != BFLOAT16:
        return array
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(f"{name!r} is bfloat16, which NumPy has not: pip install ml_dtypes") from None
    return array.view(ml_dtypes.bfloat16)


def side_of(optimizer: Any) -> Side:
    """The side of an optimizer."""
    if isinstance(optimizer, Optimizer):
        return Side(optimizer)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(optimizer, torch.optim.Optimizer):
        from pyopt.torch.files import TensorSide

        return TensorSide(optimizer)
    raise TypeError(f"optimizer is a {type(optimizer).__name__}, must be one of pyopt or pyopt.torch")


def kind_of(instance: Any) -> str:
    """How the file calls the class of an optimizer, scheduler or average: by that of pyopt or torch behind it."""
    for cls in type(instance).__mro__:
        if cls.__module__.partition(".")[0] in ("pyopt", "torch"):
            if cls.__name__ in ("Optimizer", "LRScheduler"):  # a class of the user's own
                break
            return cls.__name__
    return type(instance).__name__


def called(dtype: np.dtype[Any]) -> str:
    """The name of a dtype."""
    return "bfloat16" if dtype == BFLOAT16 else str(dtype)
