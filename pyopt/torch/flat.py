"""Parameters that lie in one block of memory: a step looks at one address each, and goes over the block."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

from pyopt.storage import MASTERS
from pyopt.torch._flat import Flat, flat_parameters, fold_by, member_of, members_of
from pyopt.torch._tensor_views import FLOATS, is_ordinary
from pyopt.torch._tensors import TensorWorkspace, unrecorded

Entry = dict[str, Any]

WORDS = "float32, float64, bfloat16 or float16"


def flatten(params: Iterable[Any]) -> None:
    """Move parameters into one block of memory per type, and their gradients into another: for thousands of small ones.

    Every parameter stays the object that it is, with a part of the block for its memory; its gradient is from now on a
    view of another, zeros where it had none. `backward()` adds to it in place, `zero_grad()` of an optimizer of
    pyopt.torch fills those of its own parameters with zeros. Such an optimizer then steps the block as one tensor where
    the parameters stand in one group, side by side and in this order, by a rule of elements (not LAMB, LARS, Prodigy,
    Muon and the like), without an average attached, state in 8 bits or rounding by chance; the bits are those of the
    steps one by one. What comes in between is noticed and right, and that step slower: a gradient that was replaced or
    is None (until the next zero_grad()), a parameter that was moved or frozen. Parameters that require no gradient and
    have none stay where they are: give optimizers the others alone.

    Args:
        params: parameters, or (name, parameter) pairs as named_parameters() gives them: dense ones of float32, float64,
            bfloat16 or float16 on the CPU that no other parameter shares memory with.

    Raises:
        TypeError: what is no torch.nn.Parameter.
        ValueError: one that lies elsewhere, is of another type or twice in the list; nothing has changed then.

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(50)])
        >>> optim.flatten(model.parameters())
        >>> optimizer = optim.Adam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()

    A parameter without a gradient counts as one with zeros: momentum and weight decay go on. The state of the optimizer
    lies in blocks too; `optimizer.state` and `state_dict()` show it by parameter, as views. While somebody keeps these,
    steps go tensor by tensor. DDP takes part as usual, but with gradient_as_bucket_view=True, which puts the gradients
    elsewhere. `unflatten` undoes it.
    """
    by_type: dict[torch.dtype, list[torch.nn.Parameter]] = {}
    seen: set[int] = set()
    for i, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if type(p) is not torch.nn.Parameter:
            raise TypeError(f"params[{i}] is a {type(p).__name__}, must be a torch.nn.Parameter")
        if not is_ordinary(p) or p.is_inference() or p.is_neg():
            raise ValueError(f"params[{i}] is {p.dtype} on {p.device}, must be dense and on the CPU, of {WORDS}")
        if id(p) in seen:
            raise ValueError(f"params[{i}] stands in the list twice")
        if p.grad is not None and (type(p.grad) is not torch.Tensor or not is_ordinary(p.grad)):
            raise ValueError(f"the gradient of params[{i}] is no dense tensor on the CPU")
        if p.grad is not None and p.grad.dtype != p.dtype:
            raise ValueError(f"the gradient of params[{i}] is {p.grad.dtype}, must be {p.dtype} as the parameter")
        seen.add(id(p))
        if p.requires_grad or p.grad is not None:
            by_type.setdefault(p.dtype, []).append(p)
    ranges = sorted((p.data_ptr(), p.data_ptr() + _reach(p)) for each in by_type.values() for p in each if p.numel())
    for (_, end), (begin, _) in pairwise(ranges):
        if begin < end:
            raise ValueError("two of the parameters share memory, must be apart")
    for each in by_type.values():
        _flatten(each)


def _reach(p: torch.Tensor) -> int:
    last = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
    return (last + 1) * p.element_size()


@torch.inference_mode(False)
@torch.no_grad()
def _flatten(params: list[torch.nn.Parameter]) -> None:
    size = sum(p.numel() for p in params)
    block = torch.nn.Parameter(params[0].new_empty(size), requires_grad=False)
    block.grad = torch.zeros_like(block)
    # A storage for each: who saves a model takes parameters of one storage for tied ones, and leaves out all but one.
    memory = block.data.view(torch.uint8).numpy()
    places, gradients, start = [], [], 0
    for p in params:
        # In the memory order that the parameter has, if its elements lie side by side.
        like = torch.empty_like(p, memory_format=torch.preserve_format)
        place = like
        if p.numel():
            place = torch.frombuffer(memory, dtype=p.dtype, count=p.numel(), offset=start * p.element_size())
            place = place.as_strided(like.shape, like.stride())
        places.append(place.copy_(p))
        gradients.append(block.grad.as_strided(like.shape, like.stride(), start))
        if p.grad is not None:
            gradients[-1].copy_(p.grad)
        start += p.numel()
    flat = Flat(block, params, gradients)
    for p, place, gradient in zip(params, places, flat.gradients, strict=True):
        p.data = place
        p.grad = gradient


@torch.inference_mode(False)
@torch.no_grad()
def unflatten(params: Iterable[Any]) -> None:
    """Give parameters, and their gradients, memory of their own again.

    Args:
        params: as for `flatten`; those that are not flattened stay as they are. What was flattened together with one of
            them is no longer stepped as one.

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        >>> optim.flatten(weights)
        >>> weights[1].data_ptr() - weights[0].data_ptr()
        12
        >>> optim.unflatten(weights)
    """
    given = [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in params]
    for p, found in [(p, member_of(p)) for p in given]:
        if found is not None:
            flat, i = found
            flat.forget()
            p.data = p.data.clone(memory_format=torch.preserve_format)
            if p.grad is flat.gradients[i]:
                p.grad = p.grad.clone(memory_format=torch.preserve_format)


# --- the state of an optimizer whose parameters are flattened ---------------------------------------------------------


class FlatState(defaultdict[Any, Any]):
    """`optimizer.state` with an entry per block. Whoever looks at it finds one per parameter, with views of the blocks.

    While a block has its entry, those of its parameters say nothing: so that the one that counts comes and goes in a
    single store, whatever interrupts it.
    """

    def __init__(self, lock: TensorWorkspace) -> None:
        super().__init__(dict)
        self.lock = lock  # of the steps: an entry is not taken away in the middle of one
        self.flats: list[Flat] = []

    def release(self, flat: Flat) -> None:
        """Put the state of a block into entries of its parameters."""
        entry = self.of(flat.block)
        for i, p in enumerate(flat.parameters() if entry is not None else ()):
            if p is not None:
                dict.__setitem__(self, p, unrecorded(_parts, flat, entry, i))
        dict.pop(self, flat.block, None)

    def release_all(self) -> None:
        """Put the state of all blocks into entries of their parameters, between two steps."""
        if any(self.of(flat.block) is not None for flat in self.flats):
            with self.lock:
                if self.lock.is_walking():
                    raise RuntimeError("optimizer.state of flattened parameters is read inside a step, which uses it")
                for flat in self.flats:
                    self.release(flat)

    def of(self, key: Any) -> Any:
        """The entry that is there, or None."""
        return dict.get(self, key)

    def __getitem__(self, key: Any) -> Any:
        if any(id(key) in flat.index and self.of(flat.block) is not None for flat in self.flats):
            self.release_all()
        return super().__getitem__(key)

    def __reduce__(self) -> Any:
        return defaultdict, (dict,), None, None, iter(self.items())  # a copy has entries by parameter alone

    def copy(self) -> Any:
        """A plain dict of the same entries."""
        return defaultdict(dict, self.items())

    __copy__ = copy


def _opened(name: str) -> Callable[..., Any]:
    method = getattr(defaultdict, name)

    def looked_at(self: FlatState, *args: Any, **kwargs: Any) -> Any:
        self.release_all()
        return method(self, *args, **kwargs)

    looked_at.__name__ = name
    return looked_at


for _name in (
    *("__setitem__", "__delitem__", "__contains__", "__iter__", "__len__", "__reversed__", "__repr__", "__eq__"),
    *("__or__", "__ror__", "__ior__", "keys", "values", "items", "get", "pop", "popitem", "setdefault", "update"),
    "clear",
):
    setattr(FlatState, _name, _opened(_name))


def _parts(flat: Flat, entry: Entry, i: int) -> Entry:
    """The state of parameter i, as views of that of its block."""
    shape = flat.block.shape
    return {name: flat.part(value, i) if value.shape == shape else value.clone() for name, value in entry.items()}


# --- what a step does with them ---------------------------------------------------------------------------------------


class Folding:
    """What one step takes as one parameter: per group (its parameters, what stands for them), or (None, None)."""

    def __init__(self, groups: list[tuple[Any, Any]], flats: list[Flat]) -> None:
        self.groups = groups
        self.flats = {id(flat.block): flat for flat in flats}

    def flat_of(self, param: Any) -> Flat | None:
        """The Flat that a parameter is the block of, if it is one."""
        return self.flats.get(id(param))


def fold(workspace: TensorWorkspace, side: Any, may_be: bool) -> Folding | None:
    """Put blocks in the place of their parameters where these are whole, and their state into blocks."""
    groups: list[tuple[Any, Any]] = []
    for g, group in enumerate(list(side.param_groups) if may_be else []):
        params = group.get("params") if isinstance(group, dict) else None
        given = list(params) if isinstance(params, (list, tuple)) else []
        units = flat_parameters(given)
        foldable = units is not None and workspace.can_fold(side, g, group)
        groups.append((given, units) if foldable else (None, None))
    whole = [unit for _, units in groups for unit in units or () if isinstance(unit, Flat)]
    for flat in side.state.flats if isinstance(side.state, FlatState) else ():
        if flat not in whole:
            side.state.release(flat)
    found = [flat for flat in whole if absorb(side, workspace, flat)]
    if isinstance(side.state, FlatState):
        side.state.flats = found
    if not found:
        return None
    return Folding([(given, units and _stepped(units, found)) for given, units in groups], found)


def _stepped(units: list[Any], found: list[Flat]) -> list[Any]:
    """What is stepped as one parameter each: blocks, and parameters by themselves."""
    stepped: list[Any] = []
    for unit in units:
        if not isinstance(unit, Flat):
            stepped.append(unit)
        elif unit in found:
            stepped.append(unit.block)
        else:
            stepped += unit.parameters()
    return stepped


def absorb(side: Any, workspace: TensorWorkspace, flat: Flat) -> bool:
    """Have the state of flattened parameters in blocks; False where it is not alike, or somebody else holds it."""
    if isinstance(side.state, FlatState):
        if flat in side.state.flats and side.state.of(flat.block) is not None:
            return True
    elif _holders(side) > HOLDERS:
        return False
    get = dict.get if isinstance(side.state, FlatState) else type(side.state).get
    entries = [get(side.state, p) for p in flat.parameters()]
    if any(entries) and not _are_alike(flat, entries):
        return False
    entry = unrecorded(_joined, flat, [each for each in entries if each]) if any(entries) else None
    if not isinstance(side.state, FlatState):
        state = FlatState(workspace)
        for p, other in list(side.state.items()):
            if id(p) not in flat.index:
                dict.__setitem__(state, p, other)
        state.flats.append(flat)
        if entry is not None:
            dict.__setitem__(state, flat.block, entry)
        side.optimizer.state = side.state = state
        return True
    side.state.flats = [*side.state.flats, flat]
    if entry is not None:
        dict.__setitem__(side.state, flat.block, entry)
    for p in flat.parameters():
        dict.pop(side.state, p, None)
    return True


def _are_alike(flat: Flat, entries: list[Any]) -> bool:
    """Whether entries have the same names, tensors like the parameters', one step count, and no other holder."""
    if not all(type(entry) is dict for entry in entries):
        return False
    for i, entry in enumerate(entries):
        # Held by the state and by this list.
        if sys.getrefcount(entry) > ENTRY_HOLDERS or entry.keys() != entries[0].keys():
            return False
        for name in entry:
            if sys.getrefcount(entry[name]) > VALUE_HOLDERS or type(entry[name]) is not torch.Tensor:
                return False
            dtype, like = entry[name].dtype, flat.gradients[i]
            if not _goes_with(like.dtype, dtype, name) or dtype != entries[0][name].dtype:
                return False
            if entry[name].layout is not torch.strided or entry[name].device.type != "cpu":
                return False
            if entry[name].is_neg() or entry[name].requires_grad:
                return False
            if name == "step":
                if float(entry[name]) != float(entries[0][name]):
                    return False
            elif entry[name].shape != like.shape:
                return False
    return not _are_aliased([value for entry in entries for value in entry.values()])


def _are_aliased(tensors: list[torch.Tensor]) -> bool:
    """Whether somebody else has a view of one of these tensors, or an array of its memory."""
    bases = {id(base): base for base in (each._base for each in tensors) if base is not None}
    holders: dict[int, int] = {}
    for each in (*tensors, *bases.values()):
        place = each.untyped_storage()._cdata
        holders[place] = holders.get(place, 0) + 1
    return any(_uses(each) > holders[each.untyped_storage()._cdata] for each in tensors)


def _uses(tensor: torch.Tensor) -> int:
    """How many tensors have its memory; 0 where torch does not say."""
    if not hasattr(torch._C, "_storage_Use_Count"):
        return 0
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # for `storage`


def _goes_with(dtype: torch.dtype, of_state: torch.dtype, name: str) -> bool:
    """Whether a step takes state of one type with a parameter of another."""
    if name == "step":
        return of_state in FLOATS
    if torch.float64 in (dtype, of_state):
        return dtype == of_state
    return of_state in FLOATS or (of_state == torch.int16 and name == MASTERS["split"])


def _joined(flat: Flat, entries: list[Entry]) -> Entry:
    entry: Entry = {}
    for name, value in entries[0].items():
        if name == "step":
            entry[name] = value.clone()
        else:
            entry[name] = torch.empty_like(flat.block, dtype=value.dtype, requires_grad=False)
            for i, each in enumerate(entries):
                flat.part(entry[name], i).copy_(each[name])
    return entry


def _holders(side: Any) -> int:
    return sys.getrefcount(side.state)


class _Alone:
    """An optimizer and what stands for it in a step, whose state nobody else holds."""

    def __init__(self) -> None:
        self.state = {"p": {"x": torch.zeros(1)}}
        self.optimizer = type("Optimizer", (), {})()
        self.optimizer.state = self.state


def _measured() -> tuple[int, int, int]:
    alone = _Alone()
    entries = list(alone.state.values())
    for _, entry in enumerate(entries):
        return _holders(alone), sys.getrefcount(entry), sys.getrefcount(entry["x"])
    raise AssertionError


HOLDERS, ENTRY_HOLDERS, VALUE_HOLDERS = _measured()  # of what nobody else holds, as this Python counts
fold_by(fold, FlatState)


# --- gradients --------------------------------------------------------------------------------------------------------


def zero_flattened(groups: list[dict[str, Any]], zero_others: Callable[[], Any]) -> None:
    """Give flattened parameters of these groups their gradients' places back, filled with zeros.

    zero_others is called before, where there are other parameters; it may take the gradients of all away.
    """
    params = [p for group in groups for p in group["params"]]
    found = [(flat, flat.in_place(numbers)) for flat, numbers in members_of(params).items()]
    if sum(len(places) for _, places in found) < len(params):
        zero_others()
    for flat, places in found:
        flat.zero(places)
