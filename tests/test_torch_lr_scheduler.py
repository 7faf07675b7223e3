"""Schedules against torch's: the same values over 500 steps, and on torch's optimizers."""

from __future__ import annotations

import json
import warnings

import pytest

from pyopt import lr_scheduler as lrs
from schedules import BASES, COMPOSED, SINGLE, momenta_of, new_optimizer, rates_of
from torch_or_skip import optim, torch

theirs = torch.optim.lr_scheduler
STEPS = 500
# torch computes these from the previous lr; all others are formulas of the step there too.
RECURSIVE = [
    "MultiplicativeLR",
    "StepLR",
    "MultiStepLR",
    "ConstantLR",
    "LinearLR",
    "ExponentialLR",
    "PolynomialLR",
    "CosineAnnealingLR",
    *COMPOSED,
]


def torch_optimizer(make=torch.optim.SGD, bases=BASES, **options):
    options = options or {"momentum": 0.9}
    return make([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in bases], **options)


def step_both(ours, reference):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizers are not stepped
        ours.step()
        reference.step()


@pytest.mark.parametrize("name", [*SINGLE, *COMPOSED])
def test_values(name):
    make = {**SINGLE, **COMPOSED}[name]
    ours, reference = make(lrs, new_optimizer()), make(theirs, torch_optimizer())
    for step in range(STEPS):
        if name in RECURSIVE:
            assert rates_of(ours.optimizer) == pytest.approx(rates_of(reference.optimizer), rel=1e-12, abs=1e-15), step
        else:
            assert rates_of(ours.optimizer) == rates_of(reference.optimizer), step
        assert ours.get_last_lr() == rates_of(ours.optimizer)
        assert momenta_of(ours.optimizer) == momenta_of(reference.optimizer), step
        step_both(ours, reference)


@pytest.mark.parametrize("name", [name for name in SINGLE if name in RECURSIVE])
def test_closed_forms(name):
    """Where torch has the formula too, for its `step(epoch)`, and the states go to and fro."""
    ours, reference = SINGLE[name](lrs, new_optimizer()), SINGLE[name](theirs, torch_optimizer())
    if not hasattr(reference, "_get_closed_form_lr"):
        assert name == "MultiplicativeLR"
        return
    for step in (0, 1, 17, 40, 60, 90, 110, 499):
        ours.step(step)
        reference.last_epoch = step
        assert ours.get_last_lr() == pytest.approx(reference._get_closed_form_lr(), rel=1e-15)


@pytest.mark.parametrize(
    "name", ["StepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR", "CosineAnnealingLR"]
)
def test_states_go_both_ways(name):
    ours, reference = SINGLE[name](lrs, new_optimizer()), SINGLE[name](theirs, torch_optimizer())
    for _ in range(20):
        step_both(ours, reference)
    loaded = SINGLE[name](lrs, new_optimizer())
    loaded.load_state_dict(json.loads(json.dumps(reference.state_dict())))
    assert rates_of(loaded.optimizer) == rates_of(ours.optimizer)
    back = SINGLE[name](theirs, torch_optimizer())
    back.load_state_dict(ours.state_dict())
    back.optimizer.load_state_dict(reference.optimizer.state_dict())
    for _ in range(20):
        step_both(loaded, back)
    assert rates_of(loaded.optimizer) == pytest.approx(rates_of(back.optimizer), rel=1e-12)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
def test_plateau(mode, threshold_mode):
    options = {"mode": mode, "threshold_mode": threshold_mode, "factor": 0.5, "patience": 2, "threshold": 0.01}
    for more in ({}, {"cooldown": 3, "min_lr": [0.1, 0.01]}, {"eps": 0.02}):
        ours = lrs.ReduceLROnPlateau(new_optimizer(), **options, **more)
        reference = theirs.ReduceLROnPlateau(torch_optimizer(), **options, **more)
        generator = torch.Generator().manual_seed(0)
        for step in range(STEPS):
            metric = torch.randn((), generator=generator) + (100 - step) / 50
            ours.step(metric)
            reference.step(metric)
            assert rates_of(ours.optimizer) == rates_of(reference.optimizer)
            assert ours.best == reference.best
            assert (ours.num_bad_epochs, ours.cooldown_counter) == (
                reference.num_bad_epochs,
                reference.cooldown_counter,
            )


def test_warm_restarts_at_fractions():
    ours = lrs.CosineAnnealingWarmRestarts(new_optimizer(), 10, 2)
    reference = theirs.CosineAnnealingWarmRestarts(torch_optimizer(), 10, 2)
    for i in range(1, 300):
        epoch = i / 7
        ours.step(epoch)
        reference.step(epoch)
        assert rates_of(ours.optimizer) == pytest.approx(rates_of(reference.optimizer), rel=1e-12)


# --- where torch is wrong ---------------------------------------------------------------------------------------------


def test_sequence_resumed_by_last_epoch():
    """torch begins its first part anew."""

    def build(m, o, last_epoch=-1):
        return m.SequentialLR(o, [m.ConstantLR(o, 0.1, 10), m.ExponentialLR(o, 0.9)], [3], last_epoch)

    running, resumed = build(lrs, new_optimizer()), build(lrs, new_optimizer(), 4)
    running.step(5)
    assert rates_of(resumed.optimizer) == rates_of(running.optimizer)
    assert rates_of(build(theirs, torch_optimizer(), 4).optimizer) == pytest.approx([0.05, 0.01])  # still the first


def test_chain_behind_a_milestone():
    """torch has no lr for it."""

    def build(m, o):
        chain = m.ChainedScheduler([m.LinearLR(o, 0.5, 1.0, 4), m.ExponentialLR(o, 0.5)])
        return m.SequentialLR(o, [m.ConstantLR(o, 0.1, 10), chain], [2])

    ours, reference = build(lrs, new_optimizer([1.0])), build(theirs, torch_optimizer(bases=[1.0]))
    step_both(ours, reference)
    ours.step()
    assert rates_of(ours.optimizer) == [0.5]
    with pytest.raises(NotImplementedError):
        reference.step()


def test_chain_with_warm_restarts():
    """torch's restarts overwrite what the other has set, but for the step itself."""

    def build(m, o):
        return m.ChainedScheduler([m.MultiStepLR(o, [5], 0.1), m.CosineAnnealingWarmRestarts(o, 20)])

    ours, reference = build(lrs, new_optimizer([1.0])), build(theirs, torch_optimizer(bases=[1.0]))
    for _ in range(20):
        step_both(ours, reference)
    assert rates_of(ours.optimizer) == [0.1]
    assert rates_of(reference.optimizer) == [1.0]


# --- on torch's optimizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW, torch.optim.Adam], ids=["SGD", "AdamW", "torch.Adam"])
@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR", "CyclicLR"])
def test_on_torch_optimizers(make, name):
    options = {"momentum": 0.9} if make is optim.SGD else {"betas": (0.9, 0.999)}
    optimizer = torch_optimizer(make, **options)
    ours = SINGLE[name](lrs, optimizer)
    reference = SINGLE[name](theirs, torch_optimizer(make, **options))
    for _ in range(40):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(1)
        optimizer.step()
        step_both(ours, reference)
        assert rates_of(optimizer) == pytest.approx(rates_of(reference.optimizer), rel=1e-12)
        assert momenta_of(optimizer) == momenta_of(reference.optimizer)
    saved = json.loads(json.dumps(ours.state_dict()))
    again = torch_optimizer(make, **options)
    again.load_state_dict(optimizer.state_dict())
    resumed = SINGLE[name](lrs, again)
    resumed.load_state_dict(saved)
    assert rates_of(again) == rates_of(optimizer) and momenta_of(again) == momenta_of(optimizer)


def test_lr_that_is_a_tensor_is_filled():
    tensors = [torch.tensor(lr) for lr in BASES]
    optimizer = torch_optimizer(optim.Adam, tensors, betas=(0.9, 0.999))
    scheduler = lrs.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        scheduler.step()
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))
    assert rates_of(optimizer) == scheduler.get_last_lr() == [0.0625, float(torch.tensor(0.1)) / 8]
    assert {type(lr) for lr in (*scheduler.get_last_lr(), *scheduler.base_lrs)} == {float}
    assert [group["initial_lr"] for group in optimizer.param_groups] == scheduler.base_lrs
    tensors[0].fill_(0.7)
    with pytest.raises(RuntimeError, match=r"lr of param group 0 is 0\.69"):
        scheduler.step()
