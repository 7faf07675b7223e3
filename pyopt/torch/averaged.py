"""Averages of pyopt.averaging as torch's AveragedModel, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyopt.averaging import EMA, Averaging
from pyopt.parameter import label


def to_averaged_model(average: Averaging, model: torch.nn.Module) -> AveragedModel:
    """See Averaging.to_averaged_model."""
    check(average, "model", model, torch.nn.Module)
    average.require_all()
    function: Any = get_ema_multi_avg_fn  # without types
    result = AveragedModel(model, multi_avg_fn=function(average.decay) if isinstance(average, EMA) else None)
    with torch.no_grad():
        for i, (p, averaged) in enumerate(zip(model.parameters(), result.module.parameters(), strict=True)):
            averaged.copy_(average.arrays[known(average, i, p)])
        result.n_averaged.fill_(average.n_averaged)
    return result


def load_averaged_model(average: Averaging, averaged_model: AveragedModel, model: torch.nn.Module) -> None:
    """See Averaging.load_averaged_model."""
    check(average, "model", model, torch.nn.Module)
    check(average, "averaged_model", averaged_model, AveragedModel)
    state = average.state_dict()
    params = [p for group in average.optimizer.param_groups for p in group["params"]]
    places = {p: i for i, p in enumerate(params)}
    pairs = list(zip(model.parameters(), averaged_model.module.parameters(), strict=True))
    for i, (p, averaged) in enumerate(pairs):
        place = places[known(average, i, p)]
        state["averages"][place] = averaged.detach().to(state["averages"][place].dtype)
    count = int(averaged_model.n_averaged)
    average.load_state_dict({**state, "n_averaged": count, "steps": max(count, state["steps"])})


def check(average: Averaging, name: str, value: Any, kind: type) -> None:
    """Raise unless the average is of tensors and the value of a kind."""
    if not isinstance(average.optimizer, torch.optim.Optimizer):
        raise TypeError(f"the average is one of {type(average.optimizer).__name__} on arrays, must be of torch tensors")
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}, must be a {kind.__name__}")


def known(average: Averaging, index: int, p: Any) -> Any:
    """A parameter of a model, which must be one of the optimizer's."""
    if p not in average.arrays:
        raise ValueError(f"{label(index, p)} of the model, of shape {tuple(p.shape)}, is none of the optimizer's")
    return p
