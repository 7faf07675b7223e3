"""Checkpoints of bitsandbytes' optimizers: their state in 8 bits, and in 32, as pyopt.torch's and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyopt.storage import dynamic_map

StateDict = dict[str, Any]
Entry = dict[str, Any]

NESTED = "__bnb_optimizer_quant_state__"  # where bitsandbytes hides tensors from FSDP
# Per class of pyopt.torch what state1 and state2 are; of AdEMAMix state1 holds two.
NAMES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "Adam": (("exp_avg",), "exp_avg_sq"),
    "AdamW": (("exp_avg",), "exp_avg_sq"),
    "AdEMAMix": (("exp_avg_fast", "exp_avg_slow"), "exp_avg_sq"),
    "Lion": (("exp_avg",), None),
    "SGD": (("momentum_buffer",), None),
}


def from_bitsandbytes(state_dict: StateDict, optimizer: Any) -> StateDict:
    """The state_dict of an optimizer of bitsandbytes (0.43 and later) as one that `optimizer` loads.

    Codes and scales are taken as they are, so that the optimizer goes on in 8 bits. Learning rate, betas, eps and
    weight decay come from the checkpoint, all else from the optimizer, whose groups must hold as many parameters.

    Args:
        state_dict: of Adam, AdamW, AdEMAMix, Lion or SGD, in 8 or 32 bits.
        optimizer: the one of pyopt.torch of the same name.

    Raises:
        TypeError: another optimizer.
        ValueError: another map than bitsandbytes' dynamic one.

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> w = torch.nn.Parameter(torch.zeros(4096))
        >>> w.grad = torch.ones(4096)
        >>> adam = optim.Adam([w], state_dtype="8bit")
        >>> adam.step()
        >>> saved = optim.to_bitsandbytes(adam)
        >>> sorted(saved["state"][0])
        ['absmax1', 'absmax2', 'qmap1', 'qmap2', 'state1', 'state2', 'step']
        >>> adam.load_state_dict(optim.from_bitsandbytes(saved, adam))
    """
    firsts, second = names_of(optimizer)
    groups, in_codes = [], False
    state: dict[Any, Entry] = {}
    for index, saved in state_dict["state"].items():
        entry = {**{k: v for k, v in saved.items() if k != NESTED}, **saved.get(NESTED, {})}
        new: Entry = {}
        if optimizer._core.counts_steps:
            new["step"] = torch.tensor(float(entry["step"]))
        pairs: list[tuple[str, str, int | None]] = [("state2", second, None)] if second else []
        pairs += [("state1", name, i if len(firsts) > 1 else None) for i, name in enumerate(firsts)]
        for key, name, place in pairs:
            values, scales = entry[key], entry.get(f"absmax{key[-1]}")
            new[name] = (values if place is None else values[place]).clone()
            if scales is not None:
                check_map(f"parameter {index}", entry[f"qmap{key[-1]}"], signed=key == "state1")
                new[f"{name}_absmax"] = (scales if place is None else scales[place]).clone()
                in_codes = True
        state[index] = new
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        known = dict(saved_group)
        if "betas" in group:
            known["betas"] = tuple(saved_group["betas"])[: len(group["betas"])]
        elif "momentum" in group:
            known["momentum"] = saved_group["betas"][0]
        groups.append(in_group(group, known, in_codes))
    return {"state": state, "param_groups": groups}


def to_bitsandbytes(optimizer: Any) -> StateDict:
    """The state_dict of an optimizer as one that bitsandbytes' of the same name loads; see `from_bitsandbytes`.

    State in 8 bits stays as it is, other state becomes float32.

    Raises:
        TypeError: an optimizer that bitsandbytes has not.
    """
    firsts, second = names_of(optimizer)
    result = optimizer.state_dict()
    state = {}
    for index, entry in result["state"].items():
        new: Entry = {"step": int(entry.get("step", 1))}
        for key, names in (("1", firsts), ("2", (second,) if second else ())):
            arrays = [entry[name] for name in names]
            if f"{names[0] if names else None}_absmax" in entry:
                new[f"absmax{key}"] = stacked([entry[f"{name}_absmax"] for name in names])
                new[f"qmap{key}"] = torch.from_numpy(dynamic_map(key == "1"))
            else:
                arrays = [array.float() for array in arrays]
            if arrays:
                new[f"state{key}"] = stacked(arrays)
        state[index] = new
    groups = []
    for group in result["param_groups"]:
        betas = group.get("betas") or (group.get("momentum", 0), 0)
        common = {"alpha": group.get("alpha", 0.0), "t_alpha": None, "t_beta3": None, "eps": group.get("eps", 0)}
        kept = {key: group[key] for key in ("params", "lr", "weight_decay")}
        groups.append({**common, **kept, "betas": betas})
    return {"state": state, "param_groups": groups}


def names_of(optimizer: Any) -> tuple[tuple[str, ...], str | None]:
    """What state1 and state2 are called."""
    name = getattr(getattr(optimizer, "_core", None), "__name__", type(optimizer).__name__)
    if name not in NAMES or not hasattr(optimizer, "_core"):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, must be one of pyopt.torch: {', '.join(NAMES)}")
    return NAMES[name]


def in_group(group: Entry, saved: Entry, in_codes: bool) -> Entry:
    """A group of an optimizer for a checkpoint of it: with the options of a saved one, as far as it has them."""
    known = {key: value for key, value in saved.items() if key in group and key != "param_names"}
    return {**group, **known, "params": list(saved["params"]), **({"state_dtype": "8bit"} if in_codes else {})}


def stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0].clone() if len(tensors) == 1 else torch.stack(tensors)


def check_map(what: str, numbers: Tensor, signed: bool) -> None:
    """Raise unless codes mean what they mean here."""
    if not torch.equal(numbers.cpu().float(), torch.from_numpy(dynamic_map(signed))):
        raise ValueError(f"{what}: its map of 8 bits is not the dynamic one of bitsandbytes")
