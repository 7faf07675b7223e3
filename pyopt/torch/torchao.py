"""Checkpoints of torchao's Adam with short state, as those of pyopt.torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyopt import storage
from pyopt.torch.bitsandbytes import StateDict, check_map, in_group


def from_torchao(state_dict: StateDict, optimizer: Any) -> StateDict:
    """The state_dict of Adam or AdamW of torchao.optim (8bit, 4bit, Fp8) as one that `optimizer` loads.

    State in 8 bits is taken as it is, codes and scales, so that the optimizer goes on in 8 bits. What pyopt does not
    store so becomes float32: that of 4 bits and of float8, of blocks of another size than 256, and of parameters that
    are not in C order. Learning rate (a number afterwards), betas, eps, weight decay and amsgrad come from the
    checkpoint, all else from the optimizer, whose groups must hold as many parameters.

    Args:
        state_dict: as it was saved; torch.load of it needs torchao to be imported.
        optimizer: Adam or AdamW of pyopt.torch, whichever it was there.

    Raises:
        TypeError: another optimizer.
        ValueError: other parameters, or another map of 8 bits than torchao's.

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> w = torch.nn.Parameter(torch.zeros(4096))
        >>> adam = optim.AdamW([w], state_dtype="8bit")
        >>> saved = {"state": {}, "param_groups": [{"lr": torch.tensor(0.5), "betas": (0.9, 0.99), "params": [0]}]}
        >>> adam.load_state_dict(optim.from_torchao(saved, adam))
        >>> adam.param_groups[0]["lr"]
        0.5

    A step here rounds differently: torchao takes the upper of two codes in the middle between them, and a scale of at
    least 1e-12.
    """
    name = getattr(getattr(optimizer, "_core", None), "__name__", type(optimizer).__name__)
    if name not in ("Adam", "AdamW") or not hasattr(optimizer, "_core"):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, must be Adam or AdamW of pyopt.torch")
    found, own = ([len(g["params"]) for g in x] for x in (state_dict["param_groups"], optimizer.param_groups))
    if found != own:
        raise ValueError(f"state_dict has groups of {found} parameters, must be of {own} as the optimizer's")
    state: dict[Any, Any] = {}
    groups = []
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        in_codes = False
        for p, index in zip(group["params"], saved["params"], strict=True):
            if index in state_dict["state"]:
                entry = {}
                for key, value in state_dict["state"][index].items():
                    entry.update(taken_apart(f"parameter {index}: {key!r}", key, value, p))
                in_codes = in_codes or any(key.endswith("_absmax") for key in entry)
                state[index] = entry
        groups.append(in_group(group, {**saved, "lr": float(saved["lr"])}, in_codes))
    return {"state": {**state_dict["state"], **state}, "param_groups": groups}


def taken_apart(what: str, name: str, value: Any, p: Tensor) -> dict[str, Any]:
    """One entry of a parameter's state as it is stored here."""
    if not hasattr(value, "dequantize") or not hasattr(value, "codes"):  # every tensor has the first
        if isinstance(value, Tensor) and type(value) is not Tensor:
            raise TypeError(f"{what} is a {type(value).__name__}, must be a tensor or a state of torchao")
        return {name: value.clone() if isinstance(value, Tensor) else value}
    codes, scale = value.codes, value.scale
    fits = storage.in_codes(p.numel(), p.is_contiguous(), str(p.dtype)[6:], {"state_dtype": "8bit"})
    if fits and codes.dtype == torch.uint8 and codes.shape == p.shape and len(scale) * storage.BLOCK == codes.numel():
        check_map(what, value.qmap, value.signed)
        return {name: codes.clone(), f"{name}_absmax": scale.clone()}
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return {name: torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(value.dequantize())}
