"""Code as users of torch write it, for mypy --strict and pyright; tests/test_typing.py also runs it."""

from __future__ import annotations

from typing import Any, assert_type

import torch
from torch import Tensor

import pyopt.torch as optim
from pyopt import averaging


def train() -> float:
    """The usual loop."""
    model = torch.nn.Linear(4, 1)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    ema = averaging.EMA(optimizer, decay=0.9)
    loss = torch.zeros(())
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(torch.ones(8, 4)) - 2).square().mean()
        loss.backward()
        optimizer.step(max_norm=1.0, nonfinite="skip", zero_grad=True)
        scheduler.step()
    with ema.swapped():
        model(torch.ones(8, 4))
    assert_type(optimizer.last_grad_norm, float | None)
    optim.explain(optimizer)
    state: dict[str, Any] = optim.from_torch(optimizer.state_dict())
    optim.to_torch(state)
    assert_type(optim.clip_grad_norm_(model.parameters(), 1.0), Tensor)
    others: list[torch.optim.Optimizer] = [
        optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        optim.Lion(model.parameters(), lr=0.1, betas=(0.9, 0.99)),
        optim.LAMB(model.parameters()),
        optim.Adam(model.parameters(), fused=True),
    ]
    optim.lr_scheduler.StepLR(others[0], 3)
    return float(loss.detach()) + len(others)


def refused(model: torch.nn.Module) -> None:
    """What a type checker must not let pass: an ignore without need is an error. Never called."""
    optim.Lion(model.parameters(), betas=0.9)  # type: ignore[arg-type]
    optim.LAMB(model.parameters(), learning_rate=0.9)  # type: ignore[call-arg]
    optim.Adam(model.parameters()).step(max_nrom=1.0)  # type: ignore[call-arg]
