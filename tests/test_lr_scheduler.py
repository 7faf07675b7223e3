"""Schedules: values at every step, compositions, resuming, groups that come later, and what goes wrong."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyopt
from pyopt import lr_scheduler as lrs
from schedules import BASES, SCHEDULES, SINGLE, momenta_of, new_optimizer, rates_of, rising

STEPS = 120
EACH = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


def walk(scheduler, steps=STEPS):
    """The lr and momentum of every group at each step."""
    seen = [(rates_of(scheduler.optimizer), momenta_of(scheduler.optimizer))]
    for _ in range(steps):
        scheduler.step()
        seen.append((rates_of(scheduler.optimizer), momenta_of(scheduler.optimizer)))
    return seen


# --- what they have in common -----------------------------------------------------------------------------------------


@EACH
def test_steps_in_any_order(make):
    """lr is a function of the step: going to a step is the same as coming there."""
    expected = walk(make(lrs, new_optimizer()))
    scheduler = make(lrs, new_optimizer())
    for step in [7, 3, 99, 100, 0, STEPS, 41, 40]:
        scheduler.step(step)
        assert scheduler.last_epoch == step
        assert (rates_of(scheduler.optimizer), momenta_of(scheduler.optimizer)) == expected[step]
        assert scheduler.get_last_lr() == scheduler.get_lr() == expected[step][0]


@EACH
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_resumed_at_any_step(make, optimizer_first):
    """Bit for bit the uninterrupted run, whichever state is loaded first, through JSON."""
    running = make(lrs, new_optimizer())
    expected = walk(make(lrs, new_optimizer()))
    for step in range(STEPS):
        saved = json.loads(json.dumps([running.optimizer.state_dict()["param_groups"], running.state_dict()]))
        optimizer = new_optimizer()
        resumed = make(lrs, optimizer)
        loads = [
            lambda o=optimizer, g=saved[0]: o.load_state_dict({"state": {}, "param_groups": g}),
            lambda s=resumed, state=saved[1]: s.load_state_dict(state),
        ]
        for load in loads if optimizer_first else loads[::-1]:
            load()
        assert resumed.state_dict() == running.state_dict()
        for later in range(step, min(step + 3, STEPS)):
            assert (rates_of(optimizer), momenta_of(optimizer)) == expected[later]
            resumed.step()
        running.step()


@EACH
def test_built_onto_a_loaded_optimizer(make):
    """The base is the first lr of the group, which the optimizer's state has, and not the lr of the moment."""
    running = make(lrs, new_optimizer())
    expected = walk(running, 30)
    optimizer = new_optimizer()
    optimizer.load_state_dict(running.optimizer.state_dict())
    resumed = make(lrs, optimizer)
    resumed.load_state_dict(running.state_dict())
    assert (rates_of(optimizer), momenta_of(optimizer)) == expected[30]


@EACH
def test_last_epoch_is_where_to_continue(make):
    """As an argument; a chain takes it from its parts."""
    expected = walk(make(lrs, new_optimizer()))
    running = make(lrs, new_optimizer())
    running.step(30)
    optimizer = new_optimizer()
    if make in SINGLE.values():  # the parts of others have set it
        with pytest.raises(KeyError, match="group 0 has no 'initial_lr'"):
            make(lrs, optimizer, last_epoch=30)
        assert rates_of(optimizer) == BASES
    optimizer.load_state_dict(running.optimizer.state_dict())
    resumed = make(lrs, optimizer, last_epoch=30)
    assert resumed.last_epoch == 31
    assert walk(resumed, 10) == expected[31:42]


@EACH
def test_state_is_plain_and_a_snapshot(make):
    scheduler = make(lrs, new_optimizer())
    state = scheduler.state_dict()
    kept = copy.deepcopy(state)
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    walk(scheduler, 5)
    scheduler.base_lrs[0] = 7.0
    assert state == kept
    other = make(lrs, new_optimizer())
    other.load_state_dict(state)
    walk(other, 5)
    assert state == kept


@EACH
def test_group_added_later(make):
    """It joins at the step at which the schedule is, with its own lr as base."""
    from_start = make(lrs, new_optimizer([0.5, 0.1, 0.5]))
    scheduler = make(lrs, new_optimizer())
    for step in range(1, 60):
        from_start.step()
        if step == 20:
            scheduler.optimizer.add_param_group({"params": [np.zeros(1)], "lr": 0.5})
            saved = scheduler.state_dict()
            resumed = make(lrs, new_optimizer([0.5, 0.1, 0.5]))
            resumed.load_state_dict(saved)
            assert rates_of(resumed.optimizer)[:2] == rates_of(scheduler.optimizer)[:2]
            assert saved["base_lrs"] == [0.5, 0.1, 0.5]
        scheduler.step()
        expected = rates_of(from_start.optimizer)
        assert rates_of(scheduler.optimizer) == (expected if step >= 20 else expected[:2])
    assert len(scheduler.state_dict()["base_lrs"]) == 3


@EACH
def test_copies(make):
    """A deep copy has an optimizer of its own and goes on alike."""
    scheduler = make(lrs, new_optimizer())
    walk(scheduler, 10)
    twin = copy.deepcopy(scheduler)
    assert twin.optimizer is not scheduler.optimizer
    assert walk(twin, 20) == walk(scheduler, 20)


@EACH
def test_damaged_states_change_nothing(make):
    scheduler = make(lrs, new_optimizer())
    walk(scheduler, 10)
    state = scheduler.state_dict()

    def paths(tree, path=()):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*path, key)
            if isinstance(value, (dict, list)):
                yield from paths(value, (*path, key))

    before = (state, rates_of(scheduler.optimizer), momenta_of(scheduler.optimizer))
    damages = 0
    for path in paths(state):
        for damage in (object(), math.nan, -1, "?", [], {}, None):
            broken = copy.deepcopy(state)
            place = broken
            for key in path[:-1]:
                place = place[key]
            if damage == [] and isinstance(place[path[-1]], list) and not place[path[-1]]:
                continue
            place[path[-1]] = damage
            other = make(lrs, new_optimizer())
            untouched = (other.state_dict(), rates_of(other.optimizer), momenta_of(other.optimizer))
            try:
                other.load_state_dict(broken)
            except (TypeError, ValueError, KeyError) as error:
                damages += 1
                assert len(str(error)) > 15
                assert (other.state_dict(), rates_of(other.optimizer), momenta_of(other.optimizer)) == untouched
        broken = copy.deepcopy(state)
        place = broken
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        if isinstance(place, dict):
            with pytest.raises(KeyError, match=path[-1]):
                scheduler.load_state_dict(broken)
            place["wieght"] = place[path[-1]] = 1
            with pytest.raises((ValueError, TypeError)):
                scheduler.load_state_dict(broken)
    assert damages > 10
    assert (scheduler.state_dict(), rates_of(scheduler.optimizer), momenta_of(scheduler.optimizer)) == before


def test_state_of_another():
    a = lrs.StepLR(new_optimizer(), 3)
    b = lrs.ExponentialLR(new_optimizer(), 0.5)
    with pytest.raises(ValueError, match="of another scheduler: it has 'step_size', ExponentialLR has not"):
        b.load_state_dict(a.state_dict())
    with pytest.raises(KeyError, match="no 'step_size', which StepLR needs"):
        a.load_state_dict(b.state_dict())
    with pytest.raises(TypeError, match="state_dict is a list"):
        a.load_state_dict([])
    one = lrs.StepLR(new_optimizer([0.5]), 3)
    with pytest.raises(ValueError, match=r"base_lrs has 2 values, must have 1: one per param group"):
        one.load_state_dict(a.state_dict())
    two = lrs.SequentialLR(b.optimizer, [lrs.ExponentialLR(b.optimizer, 0.5)], [])
    three = lrs.SequentialLR(b.optimizer, [lrs.ExponentialLR(b.optimizer, 0.5)] * 2, [5])
    with pytest.raises(ValueError, match="schedulers has 1 items, must have 2"):
        three.load_state_dict(two.state_dict())
    state = three.state_dict()
    state["schedulers"][1]["gamma"] = -1
    with pytest.raises(ValueError, match=r"schedulers\[1\] of ExponentialLR: gamma == -1, must be finite and >= 0"):
        three.load_state_dict(state)


def test_arguments_are_those_saved():
    saved = lrs.CosineAnnealingLR(new_optimizer(), 100, eta_min=0.01).state_dict()
    scheduler = lrs.CosineAnnealingLR(new_optimizer(), 50)
    scheduler.load_state_dict(saved)
    assert (scheduler.T_max, scheduler.eta_min) == (100, 0.01)


# --- who owns lr ------------------------------------------------------------------------------------------------------


def test_lr_changed_by_hand_is_an_error():
    optimizer = new_optimizer()
    scheduler = lrs.ExponentialLR(optimizer, 0.5)
    optimizer.param_groups[1]["lr"] = 0.07
    with pytest.raises(
        RuntimeError, match=r"lr of param group 1 is 0.07, but ExponentialLR has set 0.1: it was changed"
    ):
        scheduler.step()
    assert scheduler.last_epoch == 0 and rates_of(optimizer) == [0.5, 0.07]
    optimizer.param_groups[1]["lr"] = 0.1  # an equal number, if not the same object
    scheduler.step()
    scheduler.base_lrs[1] = 0.8
    scheduler.step()
    assert rates_of(optimizer) == [0.125, 0.2]


def test_two_schedules_on_their_own_are_an_error():
    """In torch they would multiply, or one overwrite the other, as the case may be."""
    optimizer = new_optimizer()
    first, second = lrs.ExponentialLR(optimizer, 0.5), lrs.StepLR(optimizer, 1)
    first.step()
    with pytest.raises(RuntimeError, match="by another scheduler"):
        second.step()


def test_fewer_groups_are_an_error():
    optimizer = new_optimizer()
    scheduler = lrs.ExponentialLR(optimizer, 0.5)
    del optimizer.param_groups[1]
    with pytest.raises(RuntimeError, match="has 1 param groups, had 2"):
        scheduler.step()


def test_list_for_the_groups_that_were():
    optimizer = new_optimizer()
    scheduler = lrs.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])
    optimizer.add_param_group({"params": [np.zeros(1)], "lr": 0.5})
    with pytest.raises(ValueError, match="lr_lambda has 2 values, must have 3"):
        scheduler.step()
    scheduler.lr_lambda.append(lambda step: 0.25)
    scheduler.step()
    assert rates_of(optimizer) == [0.5, 0.05, 0.125]


def test_base_is_from_before_any_schedule():
    """Others are built first, and leave another lr in the groups."""
    optimizer = new_optimizer()
    for make in SCHEDULES.values():
        make(lrs, optimizer)
    assert lrs.ExponentialLR(optimizer, 0.5).base_lrs == BASES
    assert [group["initial_lr"] for group in optimizer.param_groups] == BASES


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("make", [lrs.LambdaLR, lrs.MultiplicativeLR])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "fast", None, 1j])
def test_a_bad_value_changes_nothing(make, value, many):
    optimizer = new_optimizer()

    def bad(step):
        return value if step == 2 else 1.0

    scheduler = make(optimizer, [bad, bad] if many else bad)
    scheduler.step()
    state, rates = scheduler.state_dict(), rates_of(optimizer)
    message = r"at step 2, must be finite and >= 0|lr_lambda\(2\) returned .*, must be a number"
    with pytest.raises((TypeError, ValueError), match=message):
        scheduler.step()
    assert (scheduler.state_dict(), rates_of(optimizer)) == (state, rates)


def test_overflow_is_named():
    scheduler = lrs.ExponentialLR(new_optimizer(), 10)
    with pytest.raises(ValueError, match="ExponentialLR: lr at step 400 is too large"):
        scheduler.step(400)


def test_functions_may_return_what_counts_as_a_number():
    scheduler = lrs.LambdaLR(new_optimizer(), lambda step: np.float32(0.5))
    scheduler.step()
    assert rates_of(scheduler.optimizer) == [0.25, 0.05]
    assert {type(lr) for lr in rates_of(scheduler.optimizer)} == {float}


def test_arguments_become_plain():
    """What is computed before a checkpoint and after is the same: NumPy's short numbers would round otherwise."""
    scheduler = lrs.ExponentialLR(new_optimizer(), np.float32(0.9))
    scheduler.step(3)
    assert rates_of(scheduler.optimizer)[0] == 0.5 * float(np.float32(0.9)) ** 3
    assert lrs.MultiStepLR(new_optimizer(), np.array([3, 1])).state_dict()["milestones"] == [1, 3]


def test_numbers_of_numpy_are_saved_as_pythons():
    scheduler = lrs.ExponentialLR(new_optimizer(), 0.9)
    scheduler.step(np.int64(3))
    scheduler.base_lrs[0] = np.float64(0.25)
    assert json.loads(json.dumps(scheduler.state_dict()))["base_lrs"] == [0.25, 0.1]
    scheduler.step()
    assert {type(lr) for lr in rates_of(scheduler.optimizer)} == {float}


def test_changed_arguments():
    scheduler = lrs.CyclicLR(new_optimizer(), 0.0, 1.0, 10)
    scheduler.max_lr = 2.0
    scheduler.check_arguments()
    scheduler.step(10)
    assert rates_of(scheduler.optimizer) == [2.0, 2.0]
    scheduler.max_lr = -1
    with pytest.raises(ValueError, match="max_lr == -1"):
        scheduler.check_arguments()


def test_own_schedule_needs_a_function():
    class Nothing(lrs.LRScheduler):
        def get_lr(self):  # how torch's are written
            return [1.0]

    with pytest.raises(TypeError, match=r"Nothing must override factor_at\(step\), or values_at"):
        Nothing(new_optimizer())


class Table(lrs.LRScheduler):
    def __init__(self, optimizer, table):
        self.table = table
        super().__init__(optimizer)

    def factor_at(self, step):
        return np.array(self.table)[step]


def test_own_schedule():
    """Its public attributes are its state, and lr a float whatever it returns."""
    scheduler = Table(new_optimizer(), [1.0, 0.5, 0.25])
    scheduler.step()
    assert rates_of(scheduler.optimizer) == [0.25, 0.05]
    assert {type(group["lr"]) for group in scheduler.optimizer.param_groups} == {float}
    saved = scheduler.state_dict()
    assert saved == {"table": [1.0, 0.5, 0.25], "base_lrs": BASES, "last_epoch": 1}
    resumed = Table(new_optimizer(), [1.0])
    resumed.load_state_dict(saved)
    resumed.table[2] = 0.0
    assert saved["table"] == scheduler.table == [1.0, 0.5, 0.25]


def test_own_schedule_with_what_cannot_be_saved():
    class Looks(lrs.LRScheduler):
        def __init__(self, optimizer):
            self.model = np.zeros(3)
            super().__init__(optimizer)

        def factor_at(self, step):
            return 1.0

    with pytest.raises(TypeError, match="model is a ndarray, must be numbers"):
        Looks(new_optimizer()).state_dict()


# --- single schedules -------------------------------------------------------------------------------------------------


def test_constant_and_linear_end_exactly_at_base():
    for make in (lrs.ConstantLR, lrs.LinearLR):
        for total in range(1, 50):
            scheduler = make(new_optimizer([0.1]), total_iters=total)
            scheduler.step(total)
            assert rates_of(scheduler.optimizer) == [0.1]


def test_factors_of_zero():
    """Where torch divides by them."""
    scheduler = lrs.ConstantLR(new_optimizer([0.5]), 0.0, 2)
    assert [lr for lr, _ in walk(scheduler, 3)] == [[0.0], [0.0], [0.5], [0.5]]
    scheduler = lrs.LinearLR(new_optimizer([0.5]), 0.0, 1.0, 2)
    assert [lr for lr, _ in walk(scheduler, 3)] == [[0.0], [0.25], [0.5], [0.5]]
    scheduler = lrs.ConstantLR(new_optimizer([0.5]), 0.1, 0)
    assert rates_of(scheduler.optimizer) == [0.5]


def test_warmup_cosine():
    scheduler = lrs.WarmupCosineLR(new_optimizer([1.0]), 4, 12, min_factor=0.1)
    seen = [lr for (lr,), _ in walk(scheduler, 14)]
    assert seen[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert seen[8] == pytest.approx(0.55, rel=1e-15)
    assert seen[12:] == [0.1, 0.1, 0.1]
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2 for step in range(4, 12)]
    assert seen[4:12] == pytest.approx(expected, rel=1e-14)


def test_warmup_linear():
    scheduler = lrs.WarmupLinearLR(new_optimizer([1.0]), 0, 4)
    assert [lr for (lr,), _ in walk(scheduler, 5)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    scheduler = lrs.WarmupLinearLR(new_optimizer([1.0]), 3, 3, min_factor=0.5)
    assert [lr for (lr,), _ in walk(scheduler, 4)] == [0.25, 0.5, 0.75, 0.5, 0.5]


def test_multiplicative_calls_its_function_once_per_step():
    calls = []
    scheduler = lrs.MultiplicativeLR(new_optimizer(), lambda step: calls.append(step) or 0.5)
    walk(scheduler, 5)
    saved = scheduler.state_dict()
    resumed = lrs.MultiplicativeLR(new_optimizer(), lambda step: calls.append(step) or 0.5)
    resumed.load_state_dict(saved)
    walk(resumed, 2)
    assert calls == [1, 2, 3, 4, 5, 6, 7]


def test_warm_restarts_take_fractions():
    scheduler = lrs.CosineAnnealingWarmRestarts(new_optimizer([1.0]), 10, 2)
    for epoch in (2.5, 12.25, 29.999, 30, 31.5):
        scheduler.step(epoch)
        current, period = (epoch, 10) if epoch < 10 else (epoch - 10, 20) if epoch < 30 else (epoch - 30, 40)
        assert rates_of(scheduler.optimizer) == [(1 + math.cos(math.pi * current / period)) / 2]
    twin = lrs.CosineAnnealingWarmRestarts(new_optimizer([1.0]), 10, 2)
    twin.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
    assert rates_of(twin.optimizer) == rates_of(scheduler.optimizer)
    assert twin.last_epoch == 31.5


def test_warm_restarts_far_out():
    """At each restart lr is base again, which a logarithm would miss."""
    scheduler = lrs.CosineAnnealingWarmRestarts(new_optimizer([1.0]), 3, 3)
    for cycles in range(1, 30):
        scheduler.step(3 * (3**cycles - 1) // 2)
        assert rates_of(scheduler.optimizer) == [1.0]


def test_one_cycle_ends():
    scheduler = lrs.OneCycleLR(new_optimizer([1.0]), 1.0, total_steps=10)
    seen = walk(scheduler, 10)
    assert seen[9] == seen[10] == ([1.0 / 25.0 / 1e4], [0.95])
    with pytest.raises(ValueError, match="step 11 of OneCycleLR, must be <= total_steps == 10"):
        scheduler.step()
    assert scheduler.last_epoch == 10


def test_one_cycle_with_its_peak_at_the_start():
    scheduler = lrs.OneCycleLR(new_optimizer([1.0]), 1.0, total_steps=10, pct_start=0.1)
    assert rates_of(scheduler.optimizer) == [1.0]


@pytest.mark.parametrize("make", [pyopt.Adam, pyopt.AdEMAMix, pyopt.RMSprop])
def test_cycled_momentum(make):
    """The first of betas, or momentum; the others stay."""
    optimizer = make([np.zeros(2)])
    old = optimizer.param_groups[0].get("betas")
    scheduler = lrs.OneCycleLR(optimizer, 0.1, total_steps=10)
    assert momenta_of(optimizer) == [0.95]
    scheduler.step(2)
    assert momenta_of(optimizer) == [0.85]
    if old:
        assert optimizer.param_groups[0]["betas"] == (0.85, *old[1:])
    optimizer.step(grads=[np.ones(2)])


def test_plateau():
    optimizer = new_optimizer()
    scheduler = lrs.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, cooldown=1, min_lr=[0.2, 0.0])
    losses = [5.0, 4.0, 4.0, math.nan, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0, *[3.0] * 20]
    states = []
    for loss in losses:
        states.append((copy.deepcopy(scheduler.state_dict()), rates_of(optimizer)))
        scheduler.step(loss)
    assert states[5][1] == [0.25, 0.05]
    assert states[6][0]["num_bad_epochs"] == 0 and states[9][1] == [0.2, 0.025]
    final = (scheduler.state_dict(), rates_of(optimizer))
    for i, (state, _) in enumerate(states):
        fresh = new_optimizer()
        resumed = lrs.ReduceLROnPlateau(fresh, factor=0.1)
        resumed.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
        assert rates_of(fresh) == states[i][1]
        for loss in losses[i:]:
            resumed.step(loss)
        assert (resumed.state_dict(), rates_of(fresh)) == final


def test_what_a_plateau_shows():
    """The cooldown, the lr, and groups that come later; a state without its lr is refused."""
    optimizer = new_optimizer()
    scheduler = lrs.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, cooldown=2)
    seen = []
    for loss in (1.0, 2.0, 2.0, 2.0, 2.0):
        scheduler.step(loss)
        seen.append((scheduler.in_cooldown, scheduler.get_last_lr()[0]))
    assert seen == [(False, 0.5), (True, 0.25), (True, 0.25), (False, 0.25), (True, 0.125)]
    optimizer.add_param_group({"params": [np.zeros(1)], "lr": 8.0})
    for _ in range(3):
        scheduler.step(2.0)
    assert scheduler.get_last_lr() == rates_of(optimizer) and scheduler.get_last_lr()[2] == 4.0
    state = scheduler.state_dict()
    del state["lrs"]
    with pytest.raises(KeyError, match="state_dict has no 'lrs', only"):
        scheduler.load_state_dict(state)


def test_an_own_schedule_with_a_dict_and_one_that_returns_too_few():
    class Table(lrs.LRScheduler):
        def __init__(self, optimizer, table):
            self.table = table
            super().__init__(optimizer)

        def values_at(self, step, base_lrs):
            return [base * self.table.get(step, 1) for base in base_lrs][: self.table.get("most")]

    optimizer = new_optimizer()
    scheduler = Table(optimizer, {1: 0.5, "most": 2})
    scheduler.step()
    assert scheduler.state_dict()["table"] == {"1": 0.5, "most": 2} and rates_of(optimizer) == [0.25, 0.05]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="Table: 1 values of lr at step 0, must be 2"):
        Table(optimizer, {"most": 1})
    assert optimizer.state_dict() == before


def test_parts_of_a_composition_are_shown():
    optimizer = new_optimizer()
    parts = [lrs.StepLR(optimizer, 3), lrs.ExponentialLR(optimizer, 0.5)]
    chain = lrs.ChainedScheduler(parts)
    assert chain.schedulers == parts and chain.schedulers is not chain.schedulers


def test_plateau_errors():
    scheduler = lrs.ReduceLROnPlateau(new_optimizer(), min_lr=[0.0, 0.0])
    for bad in (None, "low", np.zeros(3)):
        with pytest.raises(TypeError, match=r"metrics == .*, must be a number"):
            scheduler.step(bad)
    state = scheduler.state_dict()
    for key, value, message in [
        ("lrs", [1.0], "lrs has 1 values, must have 2"),
        ("lrs", [1.0, -1.0], r"lrs\[1\] == -1.0"),
        ("best", math.nan, "best == nan"),
        ("num_bad_epochs", 0.5, "num_bad_epochs == 0.5"),
        ("last_epoch", -1, "last_epoch == -1"),
        ("mode", "up", "mode == 'up', must be one of 'min', 'max'"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            scheduler.load_state_dict({**state, key: value})
    assert scheduler.state_dict() == state
    scheduler.optimizer.add_param_group({"params": [np.zeros(1)]})
    with pytest.raises(ValueError, match="min_lr has 2 values, must have 3"):
        scheduler.step(1.0)
    assert scheduler.last_epoch == 0


# --- compositions -----------------------------------------------------------------------------------------------------


def test_sequence_of_anything():
    """Each part has its values from its milestone on, as if it began there."""
    kinds = list(SCHEDULES.items())
    for (_, first), (_, second) in zip(kinds, kinds[5:] + kinds[:5], strict=True):
        optimizer = new_optimizer()
        whole = lrs.SequentialLR(optimizer, [first(lrs, optimizer), second(lrs, optimizer)], [17])
        seen = [lr for lr, _ in walk(whole, 50)]
        expected = [lr for lr, _ in walk(first(lrs, new_optimizer()), 16)]
        expected += [lr for lr, _ in walk(second(lrs, new_optimizer()), 50 - 17)]
        assert seen == expected


def test_chain_is_a_product():
    def parts(optimizer):
        return [
            lrs.LinearLR(optimizer, 0.25, 1.0, 8),
            lrs.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            lrs.CosineAnnealingWarmRestarts(optimizer, 5, 2),
            lrs.MultiStepLR(optimizer, [3, 9], 0.5),
        ]

    optimizer = new_optimizer([1.0])
    seen = [lr for (lr,), _ in walk(lrs.ChainedScheduler(parts(optimizer)), 60)]
    singles = []
    for i in range(4):
        optimizer = new_optimizer([1.0])
        scheduler = parts(optimizer)[i]
        values = []
        for step in range(61):
            values += scheduler.values_at(step, [1.0])
        singles.append(values)
    assert seen == pytest.approx([math.prod(values) for values in zip(*singles, strict=True)], rel=1e-14)


def test_chain_on_top_of_an_lr_of_its_own():
    optimizer = new_optimizer([1.0])
    cycle = lrs.CyclicLR(optimizer, 0.1, 1.0, 10)
    chain = lrs.ChainedScheduler([cycle, lrs.StepLR(optimizer, 20, 0.5)])
    chain.step(30)
    assert rates_of(optimizer) == [0.5]
    with pytest.raises(ValueError, match=r"schedulers\[1\], CyclicLR, has an lr of its own: it must be first"):
        lrs.ChainedScheduler([lrs.StepLR(optimizer, 20), cycle])
    inner = lrs.SequentialLR(optimizer, [cycle, lrs.StepLR(optimizer, 20)], [5])
    with pytest.raises(ValueError, match=r"schedulers\[1\], SequentialLR, has an lr of its own"):
        lrs.ChainedScheduler([lrs.StepLR(optimizer, 20), inner])


def test_momentum_in_a_sequence():
    """Before the part that cycles it, it is where that begins; behind, where it has ended."""
    optimizer = new_optimizer([1.0])
    warmup = lrs.LinearLR(optimizer, 0.1, 1.0, 5)
    cycle = lrs.OneCycleLR(optimizer, 1.0, total_steps=40, base_momentum=0.5)
    rest = lrs.ExponentialLR(optimizer, 0.9)
    seen = [m for _, (m,) in walk(lrs.SequentialLR(optimizer, [warmup, cycle, rest], [5, 20]), 30)]
    alone = [m for _, (m,) in walk(lrs.OneCycleLR(new_optimizer([1.0]), 1.0, total_steps=40, base_momentum=0.5), 14)]
    assert seen == [0.95] * 5 + alone + [alone[-1]] * 11


def test_composition_errors():
    optimizer, other = new_optimizer(), new_optimizer()
    step = lrs.StepLR(optimizer, 3)
    before = rates_of(optimizer)
    for call, message in [
        (lambda: lrs.SequentialLR(optimizer, [step], [3]), "milestones has 1 items, must have 0"),
        (lambda: lrs.SequentialLR(optimizer, [], []), "schedulers is empty"),
        (lambda: lrs.ChainedScheduler([]), "schedulers is empty"),
        (lambda: lrs.SequentialLR(optimizer, [step] * 3, [3, 1]), r"milestones == \[3, 1\], must not decrease"),
        (lambda: lrs.SequentialLR(optimizer, [step] * 2, [-1]), r"milestones\[0\] == -1, must be >= 0"),
        (lambda: lrs.SequentialLR(optimizer, [step] * 2, 3), "milestones is a int, must be a list"),
        (lambda: lrs.SequentialLR(optimizer, step, []), "schedulers is a StepLR, must be a list"),
        (lambda: lrs.ChainedScheduler([step, "x"]), r"schedulers\[1\] is a str, must be a pyopt.lr_scheduler"),
        (lambda: lrs.ChainedScheduler(["x"]), r"schedulers\[0\] is a str, must be a pyopt.lr_scheduler"),
        (lambda: lrs.ChainedScheduler([step], other), r"schedulers\[0\], StepLR, belongs to another optimizer"),
        (
            lambda: lrs.SequentialLR(optimizer, [step, lrs.StepLR(other, 3)], [3]),
            r"schedulers\[1\], StepLR, belongs to another optimizer",
        ),
        (
            lambda: lrs.ChainedScheduler([step, lrs.ReduceLROnPlateau(optimizer)]),
            r"schedulers\[1\] is a ReduceLROnPlateau, whose lr is no function of the step",
        ),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert rates_of(optimizer) == before
    moved = lrs.StepLR(optimizer, 3)
    moved.step()
    with pytest.raises(ValueError, match=r"schedulers\[1\] is at step 1, must be at 0 like the first"):
        lrs.ChainedScheduler([step, moved])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_nesting_resumes(data):
    """Sequences of chains of sequences: at a random step the resumed run is the uninterrupted one."""
    plan = data.draw(
        st.recursive(
            st.sampled_from(sorted(rising)),
            lambda inner: st.tuples(st.sampled_from(["sequence", "chain"]), st.lists(inner, min_size=1, max_size=3)),
            max_leaves=8,
        )
    )

    def build(plan, optimizer):
        if isinstance(plan, str):
            return rising[plan](lrs, optimizer)
        parts = [build(part, optimizer) for part in plan[1]]
        if plan[0] == "chain":
            return lrs.ChainedScheduler(parts)
        return lrs.SequentialLR(optimizer, parts, [6 * (i + 1) for i in range(len(parts) - 1)])

    whole = build(plan, new_optimizer())
    stop = data.draw(st.integers(0, 30))
    seen = walk(whole, stop)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = build(plan, new_optimizer())
    resumed.load_state_dict(state)
    assert walk(resumed, 10) == walk(whole, 10)
    whole.step(stop)
    assert (rates_of(whole.optimizer), momenta_of(whole.optimizer)) == seen[-1]


# --- arguments --------------------------------------------------------------------------------------------------------

BAD = [
    (lrs.StepLR, {"step_size": 0}, "step_size == 0, must be >= 1"),
    (lrs.StepLR, {"step_size": 2.5}, "step_size == 2.5, must be an int, not float"),
    (lrs.StepLR, {"step_size": 3, "gamma": -1}, "gamma == -1, must be finite and >= 0"),
    (lrs.StepLR, {"step_size": 3, "last_epoch": -2}, "last_epoch == -2, must be >= -1"),
    (lrs.ExponentialLR, {"gamma": math.nan}, "gamma == nan, must be finite"),
    (lrs.ExponentialLR, {"gamma": "0.9"}, "gamma == '0.9', must be a number, not str"),
    (lrs.MultiStepLR, {"milestones": 3}, "milestones is a int, must be a list"),
    (lrs.MultiStepLR, {"milestones": "30"}, "milestones is a str, must be a list"),
    (lrs.MultiStepLR, {"milestones": [3, -1]}, r"milestones\[1\] == -1, must be >= 0"),
    (lrs.ConstantLR, {"factor": 1.5}, "factor == 1.5, must be finite and >= 0 and <= 1"),
    (lrs.LinearLR, {"start_factor": -0.1}, "start_factor == -0.1, must be finite and >= 0 and <= 1"),
    (lrs.LinearLR, {"total_iters": -1}, "total_iters == -1, must be >= 0"),
    (lrs.PolynomialLR, {"total_iters": 0}, "total_iters == 0, must be >= 1"),
    (lrs.LambdaLR, {"lr_lambda": 0.5}, "lr_lambda is a float, must be callable"),
    (lrs.LambdaLR, {"lr_lambda": [abs]}, "lr_lambda has 1 values, must have 2: one per param group"),
    (lrs.MultiplicativeLR, {"lr_lambda": [abs, 3]}, r"lr_lambda\[1\] is a int, must be callable"),
    (lrs.CosineAnnealingLR, {"T_max": True}, "T_max == True, must be an int, not bool"),
    (lrs.CosineAnnealingLR, {"T_max": 5, "eta_min": -1}, "eta_min == -1, must be finite and >= 0"),
    (lrs.CosineAnnealingWarmRestarts, {"T_0": 5, "T_mult": 0}, "T_mult == 0, must be >= 1"),
    (lrs.CyclicLR, {"base_lr": [0.1], "max_lr": 1.0}, "base_lr has 1 values, must have 2"),
    (lrs.CyclicLR, {"base_lr": 0.1, "max_lr": -1.0}, "max_lr == -1.0, must be finite and >= 0"),
    (lrs.CyclicLR, {"base_lr": 0.1, "max_lr": 1.0, "mode": "square"}, "mode == 'square', must be one of 'triangular'"),
    (lrs.CyclicLR, {"base_lr": 0.1, "max_lr": 1.0, "scale_fn": 3}, "scale_fn is a int, must be callable"),
    (lrs.CyclicLR, {"base_lr": 0.1, "max_lr": 1.0, "max_momentum": [0.9]}, "max_momentum has 1 values, must have 2"),
    (lrs.OneCycleLR, {"max_lr": 1.0}, "OneCycleLR needs total_steps, or epochs and steps_per_epoch"),
    (lrs.OneCycleLR, {"max_lr": 1.0, "total_steps": 9, "pct_start": 30}, "pct_start == 30, must be finite and >= 0"),
    (lrs.OneCycleLR, {"max_lr": 1.0, "total_steps": 9, "div_factor": 0}, "div_factor == 0, must be finite and > 0"),
    (lrs.ReduceLROnPlateau, {"factor": 1.0}, "factor == 1.0, must be finite and >= 0 and < 1"),
    (lrs.ReduceLROnPlateau, {"min_lr": [0.1]}, "min_lr has 1 values, must have 2"),
    (lrs.WarmupCosineLR, {"warmup_steps": 9, "total_steps": 5}, "warmup_steps == 9, must be <= total_steps == 5"),
    (lrs.WarmupLinearLR, {"warmup_steps": 1, "total_steps": 5, "min_factor": 2}, "min_factor == 2, must be finite"),
]


@pytest.mark.parametrize("make, arguments, message", BAD)
def test_bad_arguments_change_nothing(make, arguments, message):
    optimizer = new_optimizer()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        make(optimizer, **arguments)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("epoch", [-1, 1.5, True, "3", math.nan])
def test_bad_positions(epoch):
    scheduler = lrs.StepLR(new_optimizer(), 3)
    with pytest.raises((TypeError, ValueError), match="epoch == "):
        scheduler.step(epoch)


def test_no_optimizer():
    class Without:
        pass

    for bad in (None, Without(), [np.zeros(3)]):
        with pytest.raises(TypeError, match="must have param_groups"):
            lrs.StepLR(bad, 3)
        with pytest.raises(TypeError, match="must have param_groups"):
            lrs.ReduceLROnPlateau(bad)
    odd = Without()
    odd.param_groups = [{"params": []}]
    with pytest.raises(KeyError, match="param group 0 has no 'lr'"):
        lrs.StepLR(odd, 3)
    odd.param_groups = [{"params": [], "lr": 0.5}]
    with pytest.raises(
        ValueError, match="cycle_momentum == True, but param group 0 has neither 'momentum' nor 'betas'"
    ):
        lrs.CyclicLR(odd, 0.1, 1.0)
    lrs.CyclicLR(odd, 0.1, 1.0, cycle_momentum=False)


positive_ints = st.integers(1, 10**6)
fractions = st.floats(0, 1)
ANY = {
    lrs.StepLR: {"step_size": positive_ints, "gamma": fractions},
    lrs.MultiStepLR: {"milestones": st.lists(st.integers(0, 10**6)), "gamma": fractions},
    lrs.ConstantLR: {"factor": fractions, "total_iters": st.integers(0, 10**6)},
    lrs.LinearLR: {"start_factor": fractions, "end_factor": fractions, "total_iters": st.integers(0, 10**6)},
    lrs.ExponentialLR: {"gamma": fractions},
    lrs.PolynomialLR: {"total_iters": positive_ints, "power": st.floats(0, 10)},
    lrs.CosineAnnealingLR: {"T_max": positive_ints, "eta_min": st.floats(0, 0.1)},
    lrs.CosineAnnealingWarmRestarts: {"T_0": positive_ints, "T_mult": st.integers(1, 5), "eta_min": st.floats(0, 0.1)},
    lrs.CyclicLR: {
        "base_lr": fractions,
        "max_lr": fractions,
        "step_size_up": st.floats(0.5, 1e6),
        "step_size_down": st.none() | st.floats(0.5, 1e6),
        "mode": st.sampled_from(["triangular", "triangular2", "exp_range"]),
        "gamma": st.floats(0.5, 1),
    },
    lrs.OneCycleLR: {
        "max_lr": fractions,
        "total_steps": st.integers(10**6, 10**7),
        "pct_start": fractions,
        "anneal_strategy": st.sampled_from(["cos", "linear"]),
        "three_phase": st.booleans(),
    },
    lrs.WarmupCosineLR: {
        "warmup_steps": st.integers(0, 10**3),
        "total_steps": st.integers(10**3, 10**6),
        "min_factor": fractions,
    },
    lrs.WarmupLinearLR: {
        "warmup_steps": st.integers(0, 10**3),
        "total_steps": st.integers(10**3, 10**6),
        "min_factor": fractions,
    },
}


@pytest.mark.parametrize("make", ANY, ids=lambda make: make.__name__)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_arguments(make, data):
    """With any valid arguments lr stays between 0 and the largest, at any step, and the state brings all of it back."""
    arguments = data.draw(st.fixed_dictionaries(ANY[make]))
    step = data.draw(st.integers(0, 10**6))
    scheduler = make(new_optimizer(), **arguments)
    scheduler.step(step)
    assert all(0 <= lr <= 1.0 + 1e-12 for lr in scheduler.get_last_lr())
    other = make(new_optimizer(), **data.draw(st.fixed_dictionaries(ANY[make])))
    other.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
    assert other.state_dict() == scheduler.state_dict()
    assert rates_of(other.optimizer) == rates_of(scheduler.optimizer)
    if step < 10**6:
        scheduler.step()
        other.step()
        assert rates_of(other.optimizer) == rates_of(scheduler.optimizer)
