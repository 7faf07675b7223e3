"""The modes of the schedule-free optimizers: what the parameters hold, what a step and a checkpoint know of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import pyopt
from cases import DTYPES, assert_same_bits, gradients, parameters

BOTH = pytest.mark.parametrize(
    "optimizer, beta", [(pyopt.SGDScheduleFree, {"momentum": 0.8}), (pyopt.AdamWScheduleFree, {"betas": (0.8, 0.99)})]
)


def trained(
    optimizer: Any, beta: Any, dtype: Any = np.float64, steps: int = 5, **options: Any
) -> tuple[Any, list[Any]]:
    params = parameters([(), (3, 4), (70_001,)], dtype)
    o = optimizer(params, lr=0.1, **beta, **options)
    rng = np.random.default_rng(1)
    for _ in range(steps):
        o.step(grads=gradients(params, rng))
    return o, params


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_modes(optimizer: Any, beta: Any, dtype: Any) -> None:
    """Evaluation holds x, of which y lies (1 - beta) of the way to z; back in training y returns to the last digits."""
    o, params = trained(optimizer, beta, dtype)
    y, z = [p.data.copy() for p in params], [o.state[p]["z"].copy() for p in params]
    o.train()
    for p, before in zip(params, y, strict=True):
        assert_same_bits(p.data, before, "train() in training mode")
    o.eval()
    assert not o.param_groups[0]["train_mode"]
    x = [p.data.copy() for p in params]
    f = np.dtype(dtype).type
    for p, a, b in zip(params, y, z, strict=True):
        assert_same_bits(p.data, a + f(1 - 1 / 0.8) * (b - a), "x")
        assert_same_bits(o.state[p]["z"], b, "z")
    o.eval()
    for p, before in zip(params, x, strict=True):
        assert_same_bits(p.data, before, "eval() in evaluation mode")
    o.train()
    assert o.param_groups[0]["train_mode"]
    for p, a, b in zip(params, y, z, strict=True):
        scale = np.maximum(np.abs(a), np.abs(b))
        assert (np.abs(p.data - a) <= 4 * np.spacing(scale)).all()


@BOTH
def test_a_step_in_evaluation_mode(optimizer: Any, beta: Any) -> None:
    o, params = trained(optimizer, beta)
    o.eval()
    before = [p.data.copy() for p in params], copy.deepcopy(list(o.state.values()))
    with pytest.raises(RuntimeError, match=r"step\(\) in evaluation mode.*call train\(\) first"):
        o.step(grads=[np.ones_like(p.data) for p in params])
    for p, data, state in zip(params, *before, strict=True):
        assert_same_bits(p.data, data, "parameter")
        assert str(o.state[p]) == str(state)
    o.train()
    o.step(grads=[np.ones_like(p.data) for p in params])


@BOTH
def test_before_the_first_step_and_of_new_groups(optimizer: Any, beta: Any) -> None:
    """Without a step x is y; a group that is added takes the mode of the others."""
    w, v = pyopt.Parameter(np.ones(2)), pyopt.Parameter(np.ones(2))
    o = optimizer([w], **beta)
    o.eval()
    assert w.data.tolist() == [1, 1]
    o.add_param_group({"params": [v]})
    assert [group["train_mode"] for group in o.param_groups] == [False, False]
    with pytest.raises(TypeError, match="param_group is a list"):
        o.add_param_group([v])
    o.train()
    o.step(grads=[np.ones(2), None])
    o.eval()
    assert v.data.tolist() == [1, 1]


@BOTH
def test_checkpoints_record_the_mode(optimizer: Any, beta: Any) -> None:
    """Saved in evaluation mode, an optimizer loads into it: the next step waits for train()."""
    o, params = trained(optimizer, beta)
    o.eval()
    others = [pyopt.Parameter(p.data.copy()) for p in params]
    other = optimizer(others, **beta)
    saved = o.state_dict()
    assert saved["param_groups"][0]["train_mode"] is False
    other.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        other.step(grads=[np.ones_like(p.data) for p in others])
    for each, ps in ((o, params), (other, others)):
        each.train()
        each.step(grads=[np.ones_like(p.data) for p in ps])
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.data, q.data, "after the same step")
    saved["param_groups"][0]["train_mode"] = "yes"
    with pytest.raises(TypeError, match="train_mode"):
        other.load_state_dict(saved)


@pytest.mark.parametrize(
    "optimizer, options",
    [
        (pyopt.SGDScheduleFree, {"momentum": 0}),
        (pyopt.SGDScheduleFree, {"momentum": 1}),
        (pyopt.AdamWScheduleFree, {"betas": (0, 0.9)}),
        (pyopt.AdamWScheduleFree, {"betas": (0.9, 1)}),
        (pyopt.SGDScheduleFree, {"warmup_steps": -1}),
        (pyopt.SGDScheduleFree, {"r": -1}),
        (pyopt.AdamWScheduleFree, {"weight_lr_power": -0.5}),
    ],
)
def test_bounds(optimizer: Any, options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        optimizer([np.ones(2)], **options)


@BOTH
def test_a_learning_rate_of_zero(optimizer: Any, beta: Any) -> None:
    """No step weighs anything: nothing moves, and nothing is divided by 0."""
    o, params = trained(optimizer, beta, steps=0)
    o.param_groups[0]["lr"] = 0
    before = [p.data.copy() for p in params]
    o.step(grads=[np.ones_like(p.data) for p in params])
    for p, data in zip(params, before, strict=True):
        assert_same_bits(p.data, data, "parameter")


@BOTH
def test_reaches_the_minimum(optimizer: Any, beta: Any) -> None:
    """The average of a noisy descent lies nearer to the minimum than where the gradients are taken."""
    p = pyopt.Parameter(np.full(200, 3.0))
    o = optimizer([p], lr=0.1, **beta)
    rng = np.random.default_rng(0)
    for _ in range(400):
        o.step(grads=[p.data - 1 + rng.standard_normal(200)])
    at_y = np.square(p.data - 1).mean()
    o.eval()
    assert np.square(p.data - 1).mean() < min(0.05, at_y)
