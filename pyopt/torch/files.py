"""pyopt.save and pyopt.load for optimizers of tensors: the file is that of the pyopt optimizer on arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import setitem
from typing import Any

import numpy as np
import torch

import pyopt
from pyopt import _state_dict
from pyopt.files.container import BFLOAT16, Array
from pyopt.files.sides import Call, Loaded, Side, Stay
from pyopt.parameter import Parameter
from pyopt.torch._tensors import raise_versions
from pyopt.torch.convert import SWITCHES, as_count
from pyopt.torch.step import KernelStepMixin, workspace_of


class TensorSide(Side):
    """An optimizer of pyopt.torch, or one of torch.optim that pyopt has too."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.core = core_of(optimizer)
        # The core may be a variant for tensors of one of pyopt's.
        self.kind: str = next(base.__name__ for base in self.core.__mro__ if base in vars(pyopt).values())
        self.numbers = {"step", *self.core.number_states}

    def lock(self) -> AbstractContextManager[Any]:
        return workspace_of(self.optimizer) if isinstance(self.optimizer, KernelStepMixin) else nullcontext()

    # --- save -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        packed = self.optimizer.state_dict()
        state = {key: self._entry(value) for key, value in packed["state"].items()}
        groups = [_numbers(group) for group in packed["param_groups"]]
        return {"state": {key: entry for key, entry in state.items() if entry is not None}, "param_groups": groups}

    def _entry(self, entry: Any) -> Any:
        """The state of a parameter with its numbers as Python's; None where there is nothing in it."""
        if not isinstance(entry, dict):
            return entry
        entry = {name: value for name, value in entry.items() if value is not None}
        numbers = {name: _number(entry[name]) for name in self.numbers & entry.keys()}
        if "step" in numbers:
            numbers["step"] = as_count(numbers["step"], "state 'step'")
        return {**entry, **numbers} or None

    def parameters(self) -> list[Array]:
        return [as_array(what, p) for what, p in zip(self._labels(), self._params(), strict=True)]

    def as_array(self, where: str, value: Any) -> Array | None:
        return as_array(where, value) if isinstance(value, torch.Tensor) else None

    # --- load -----------------------------------------------------------------------------------------------------

    def native(self, array: Array) -> Array:
        return array

    def parameter_writes(self, values: Sequence[Array | None]) -> list[Call]:
        written = [p for p, value in zip(self._params(), values, strict=True) if value is not None]
        return [*super().parameter_writes(values), (raise_versions, written)]

    def options(self, index: int) -> dict[str, Any]:
        return _numbers(super().options(index))

    def _checking_class(self) -> Any:
        return self.core

    def _checking(self) -> Any:
        return self._twin()[0]

    def writable(self) -> list[Array]:
        return [_live(what, p) for what, p in zip(self._labels(), self._params(), strict=True)]

    def loaded(self, state_dict: dict[str, Any], stay: Stay) -> Loaded:
        if hooks := getattr(self.optimizer, "_optimizer_load_state_dict_pre_hooks", None):
            state_dict = _within(state_dict, np.ndarray, self.borrowed)
            for hook in hooks.values():
                changed = hook(self.optimizer, state_dict)
                state_dict = state_dict if changed is None else changed
            entries = {key: self._entry(value) or {} for key, value in state_dict["state"].items()}
            state_dict = _within({**state_dict, "state": entries}, torch.Tensor, lambda t: as_array("state", t))
        twin, tensors = self._twin()
        loaded = _state_dict.prepare(twin, state_dict)
        calls: list[Call] = [(setitem, *write) for write in loaded.writes]
        groups = [self._group(*pair) for pair in zip(self.optimizer.param_groups, loaded.groups, strict=True)]
        state: defaultdict[Any, Any] = defaultdict(dict)
        params = dict(zip((p for group in twin.param_groups for p in group["params"]), self._params(), strict=True))
        for key, entry in loaded.state.items():
            if key in params:
                state[params[key]] = {name: self._state(name, value, tensors) for name, value in entry.items()}
            else:
                state[key] = _within(entry, np.ndarray, as_tensor)
        self._leave(stay, groups, state)
        calls.append((raise_versions, list(tensors.values())))
        calls += [(setitem, *write) for write in _state_dict.replacements(self.optimizer, groups, state)]
        return Loaded(groups, calls)

    def _twin(self) -> tuple[Any, dict[int, torch.Tensor]]:
        """The optimizer as one of arrays in the same memory, for its checks; the tensors of its state by array."""
        twin: Any = self.core([np.empty((0, 0))])
        known = {**twin.defaults, **_numbers(self.optimizer.defaults)}
        twin.defaults = {key: known[key] for key in twin.defaults}
        twin.param_groups, twin.state = [], {}
        tensors = {}
        labels = iter(self._labels())
        for live in self.optimizer.param_groups:
            stand_ins = []
            for p in live["params"]:
                what = next(labels)
                stand_in = Parameter.__new__(Parameter)  # whose own checks ask for the dtypes of the kernels
                stand_in._data, stand_in.grad, stand_in.name = _live(what, p), None, None
                stand_ins.append(stand_in)
                entry = twin.state[stand_in] = {}
                for name, value in self.optimizer.state.get(p, {}).items():
                    if isinstance(value, torch.Tensor) and name not in self.numbers and is_plain(value):
                        entry[name] = _live(what, value)
                        tensors[id(entry[name])] = value
            twin.param_groups.append({**twin.later, **_numbers(live), "params": stand_ins})
        return twin, tensors

    def _group(self, live: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
        """A loaded group in the form of torch's: with its switches, without options that both have turned off."""
        later = self.core.later
        group = {k: v for k, v in loaded.items() if k in live or k not in later or v != later[k]}
        return {**{k: live[k] for k in SWITCHES if k in live}, **group, "params": live["params"]}

    def _state(self, name: str, value: Any, tensors: dict[int, torch.Tensor]) -> Any:
        """A loaded entry of the state: the live tensor that was written to, or a new one."""
        if isinstance(value, np.ndarray):
            return tensors[id(value)] if id(value) in tensors else as_tensor(value)
        if name not in self.numbers:
            return _within(value, np.ndarray, as_tensor)
        if self.core is pyopt.SparseAdam:  # torch's counts in ints
            return int(value)
        double = torch.get_default_dtype() == torch.float64
        dtype = torch.float64 if double or not hasattr(torch.optim, self.kind) else torch.float32
        number = torch.tensor(float(value), dtype=torch.float64)
        if name == "step":
            dtype = torch.float64 if double else torch.float32
            return number.to(dtype) if number.to(dtype) == number else number
        return number.to(dtype)

    def last(self, groups: list[dict[str, Any]]) -> list[Call]:
        """Options that are tensors, such as lr, stay so, and are written to."""
        calls: list[Call] = []
        for i, (live, group) in enumerate(zip(self.optimizer.param_groups, groups, strict=True)):
            for key, tensor in live.items():
                if isinstance(tensor, torch.Tensor) and isinstance(group.get(key), (int, float)):
                    calls.append((setitem, _live(f"param group {i}: {key!r}", tensor), ..., group[key]))
                    group[key] = tensor
        return calls

    def after(self) -> None:
        for hook in getattr(self.optimizer, "_optimizer_load_state_dict_post_hooks", {}).values():
            hook(self.optimizer)

    def typed(self, name: str, array: Array) -> Array:
        return array  # as_tensor knows the type

    def own(self, name: str, array: Array, is_tensor: bool) -> Any:
        return as_tensor(np.array(array)) if is_tensor else super().own(name, array, is_tensor)

    def borrowed(self, array: Array) -> Any:
        return as_tensor(array)


def core_of(optimizer: Any) -> Any:
    """The optimizer on arrays behind one of tensors."""
    cls = type(optimizer)
    core = getattr(cls, "_core", None)
    if core is None and cls.__module__.startswith("torch.optim"):
        core = vars(pyopt).get(cls.__name__)
    if core is None:
        raise TypeError(f"optimizer is a {cls.__module__}.{cls.__name__}, must be one of pyopt or pyopt.torch")
    return core


def as_array(what: str, tensor: torch.Tensor) -> Array:
    """The elements of a tensor as an array, in the same memory where they lie there as they are."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or hasattr(tensor, "placements"):
        raise TypeError(f"{what} is a {tensor.layout} tensor on {tensor.device}, must be a dense one on the CPU")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    try:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(BFLOAT16)
        return tensor.numpy()
    except TypeError:
        raise TypeError(f"{what} has dtype {tensor.dtype}, which NumPy has not") from None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the elements lie in the memory of the CPU as they are."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_conj() or tensor.is_neg() or hasattr(tensor, "placements"))
    )


def _live(what: str, tensor: torch.Tensor) -> Array:
    """The memory of a tensor, to be written to."""
    if not is_plain(tensor):
        raise TypeError(f"{what} is a {tensor.layout} tensor on {tensor.device}, must be a plain one on the CPU")
    return as_array(what, tensor)


def as_tensor(array: Array) -> torch.Tensor:
    """The tensor in the memory of an array."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """A group without the switches between torch's implementations, tensors in it as numbers."""
    return {key: _within(value, torch.Tensor, _number) for key, value in group.items() if key not in SWITCHES}


def _number(value: Any) -> Any:
    """A tensor of one element as a number."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _within(value: Any, kind: type, convert: Any) -> Any:
    """The value with all of a type converted, also within lists, tuples and dicts."""
    if isinstance(value, kind):
        return convert(value)
    if type(value) is dict:
        return {key: _within(item, kind, convert) for key, item in value.items()}
    return type(value)(_within(item, kind, convert) for item in value) if type(value) in (list, tuple) else value
