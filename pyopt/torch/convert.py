"""Checkpoints between torch's optimizers and pyopt's on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pyopt.storage import dtype_of

StateDict = dict[str, Any]

# They choose between torch's implementations; pyopt has one.
SWITCHES = ("foreach", "fused", "capturable", "differentiable")


def from_torch(state_dict: StateDict) -> StateDict:
    """The state_dict of a torch optimizer (torch.optim's or pyopt.torch's) as one of the pyopt optimizer on arrays.

    Tensors become arrays (copies), step counts ints, tensor hyper-parameters numbers; the switches between torch's
    implementations go. Keys and entries of the user's own are kept.

    Raises:
        ImportError: a bfloat16 tensor, without the package ml_dtypes, which has the type for arrays.
        ValueError: a step count that is no whole number.

    Example:
        >>> import numpy as np, torch
        >>> import pyopt, pyopt.torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> w.grad = torch.ones(2)
        >>> adam = torch.optim.Adam([w])
        >>> adam.step()
        >>> ours = pyopt.Adam([w.detach().numpy()])
        >>> ours.load_state_dict(pyopt.torch.from_torch(adam.state_dict()))
        >>> ours.state_dict()["state"][0]["step"]
        1
    """
    groups = []
    for group in state_dict["param_groups"]:
        kept = {k: _to_numpy(v) for k, v in group.items() if k not in SWITCHES}
        groups.append({k: _as_number(v) for k, v in kept.items()})
    state = {}
    for index, entry in state_dict["state"].items():
        arrays = {k: _to_numpy(v) for k, v in entry.items() if v is not None}
        if "step" in arrays:
            arrays["step"] = as_count(arrays["step"], f"parameter {index}: state 'step'")
        if arrays:
            state[index] = arrays
    return {"state": state, "param_groups": groups}


def _to_numpy(value: Any) -> Any:
    """Tensors as arrays, also within lists, tuples and dicts; everything in it a copy."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().resolve_neg().resolve_conj()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().copy("K").view(dtype_of("bfloat16"))
        return value.numpy().copy("K")
    return _within(value, _to_numpy)


def _within(value: Any, convert: Callable[[Any], Any]) -> Any:
    """A container with its values converted; anything else as it is."""
    if type(value) is dict:
        return {k: convert(v) for k, v in value.items()}
    return type(value)(map(convert, value)) if type(value) in (list, tuple) else value


def _as_number(value: Any) -> Any:
    """Arrays of one element and NumPy's scalars as Python numbers, also within lists, tuples and dicts."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1):
        return value.item()
    return _within(value, _as_number)


def as_count(value: Any, what: str) -> int:
    """A step count as an int."""
    number = _as_number(value)
    if number != number // 1:  # nor inf or nan
        raise ValueError(f"{what} is {number}, must be a whole number")
    return int(number)


def to_torch(state_dict: StateDict) -> StateDict:
    """The state_dict of a pyopt optimizer on arrays as one that torch's optimizer, or pyopt.torch's, loads.

    Arrays become tensors (copies), NumPy's scalars Python numbers, so that torch.load(weights_only=True) takes a file
    of it, and step counts tensors of the default dtype as torch keeps them, of float64 where that is too short. Keys
    and entries of the user's own are kept.

    Example:
        >>> import numpy as np, torch
        >>> import pyopt, pyopt.torch
        >>> ours = pyopt.Adam([np.ones(2, np.float32)])
        >>> ours.step(grads=[np.ones(2, np.float32)])
        >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
        >>> adam.load_state_dict(pyopt.torch.to_torch(ours.state_dict()))
        >>> adam.state_dict()["state"][0]["step"]
        tensor(1.)
    """
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    state = {}
    for index, entry in state_dict["state"].items():
        state[index] = {name: _to_torch(value) for name, value in entry.items()}
        if "step" in entry:
            count = torch.tensor(float(entry["step"]), dtype=torch.float64)
            state[index]["step"] = count.to(dtype) if count.to(dtype) == count else count
    groups = [{name: _as_number(value) for name, value in group.items()} for group in state_dict["param_groups"]]
    return {"state": state, "param_groups": [_to_torch(group) for group in groups]}


def _to_torch(value: Any) -> Any:
    """Arrays as tensors, NumPy's scalars as numbers, also within lists, tuples and dicts; everything in it a copy."""
    if isinstance(value, np.ndarray):
        if value.dtype.name == "bfloat16":
            return torch.from_numpy(value.view(np.int16).copy("K")).view(torch.bfloat16)
        return torch.from_numpy(value.copy("K"))
    return value.item() if isinstance(value, np.generic) else _within(value, _to_torch)
