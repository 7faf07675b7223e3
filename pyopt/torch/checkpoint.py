"""Checkpoints between torch's optimizers and pyopt's on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyopt.checks import plain

StateDict = dict[str, Any]

# They choose between torch's implementations; pyopt has one.
SWITCHES = ("foreach", "fused", "capturable", "differentiable")


def from_torch(state_dict: StateDict) -> StateDict:
    """The state_dict of a torch optimizer (torch.optim's or pyopt.torch's) as one of the pyopt optimizer on arrays.

    Tensors become arrays (copies), step counts ints, tensor hyper-parameters numbers; the switches between torch's
    implementations go.

    Raises:
        TypeError: a state tensor that NumPy has no dtype for (bfloat16).

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
        kept = {k: v for k, v in group.items() if k not in SWITCHES}
        names = {k: list(kept[k]) for k in ("param_names",) if k in kept}
        groups.append({**plain(kept), **names, "params": list(kept["params"])})
    state = {}
    for index, entry in state_dict["state"].items():
        arrays = {name: _to_numpy(index, name, value) for name, value in entry.items() if value is not None}
        if arrays:
            state[index] = arrays
    return {"state": state, "param_groups": groups}


def _to_numpy(index: int, name: str, value: Any) -> Any:
    if name == "step":
        return int(value)
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            raise TypeError(f"parameter {index}: state {name!r} is bfloat16, must be of a dtype that NumPy has")
        return value.detach().cpu().numpy().copy("K")
    return value


def to_torch(state_dict: StateDict) -> StateDict:
    """The state_dict of a pyopt optimizer on arrays as one that torch's optimizer, or pyopt.torch's, loads.

    Arrays become tensors (copies), step counts tensors of the default dtype as torch keeps them.

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
        state[index] = {
            name: torch.from_numpy(value.copy("K")) if isinstance(value, np.ndarray) else value
            for name, value in entry.items()
        }
        if "step" in entry:
            state[index]["step"] = torch.tensor(float(entry["step"]), dtype=dtype)
    return {"state": state, "param_groups": [dict(group) for group in state_dict["param_groups"]]}
