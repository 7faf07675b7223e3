"""pyopt.no_decay of torch modules."""

from __future__ import annotations

import pytest

from torch_or_skip import optim, torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 2)


@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW], ids=["pyopt", "torch"])
@pytest.mark.parametrize("form", [lambda m: m, lambda m: m.named_parameters(), lambda m: dict(m.named_parameters())])
def test_modules(make, form):
    model = Model()
    optimizer = make(optim.no_decay(form(model)), weight_decay=0.1)
    groups = [(group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [(["embed.weight", "head.weight"], 0.1), (["norm.weight", "norm.bias", "head.bias"], 0.0)]
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert p is model.get_parameter(name)
    model.head(model.norm(model.embed(torch.zeros(3, dtype=torch.long)))).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "param_names": ["late"]})
