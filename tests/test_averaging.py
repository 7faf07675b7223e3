"""pyopt.averaging on arrays: averages in the step are those after it, in bits; swapped, saved, copied, interrupted."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyopt
from all_optimizers import TYPES, Own, bits, params_of, random
from extras import (
    Beside,
    alike,
    average_numbers,
    every,
    few,
    gradients,
    numbers,
    raises_and_changes_nothing,
    set_gradients,
)
from test_engine import everything_shared
from test_interruption import Stop, by_profile
from whole_steps import isolated

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("EMA", {}),
    ("EMA", {"decay": 0.9}),
    ("EMA", {"decay": 0.3}),
    ("EMA", {"decay": 0.0}),
    ("EMA", {"decay": 1.0}),
    ("EMA", {"decay": 0.9, "every": 3}),
    ("EMA", {"decay": 0.99, "warmup": 10}),
    ("EMA", {"decay": 0.5, "warmup": 1, "every": 2}),
    ("SWA", {}),
    ("SWA", {"every": 3}),
    ("SWA", {"start": 4}),
    ("SWA", {"start": 4, "every": 2}),
]
KIND_IDS = ["-".join([kind, *(f"{k}={v}" for k, v in options.items())]) for kind, options in KINDS]
kinds = pytest.mark.parametrize("kind, settings", KINDS, ids=KIND_IDS)
brief_kinds = pytest.mark.parametrize("kind, settings", [KINDS[1], KINDS[8]], ids=["EMA", "SWA"])


def attach(opt: Any, kind: str, settings: Any) -> Any:
    return getattr(pyopt.averaging, kind)(opt, **settings)


def data(opt: Any) -> list[Any]:
    return [p.data for p in params_of(opt)]


def all_bits(arrays: Any) -> list[Any]:
    return [bits(np.asarray(a)) for a in arrays]


def run(opt: Any, steps: int, *beside: Beside, seed: int = 0, **extras: Any) -> None:
    for step in range(steps):
        set_gradients(opt, seed=seed + step)
        opt.step(**extras)
        for each in beside:
            each.follow(data(opt))
            each.check()


# --- what they are ----------------------------------------------------------------------------------------------------


@every
@TYPES
def test_averages_in_the_step_are_those_after_it(cls: Any, options: Any, dtype: str) -> None:
    """Of every optimizer, three at once on it; it does not notice them."""
    ours, plain = alike(cls, options, dtype=dtype)
    beside = [
        Beside(attach(ours, kind, settings), kind, **settings) for kind, settings in (KINDS[1], KINDS[6], KINDS[8])
    ]
    run(ours, 5, *beside)
    run(plain, 5)
    assert numbers(ours) == numbers(plain)
    assert repr(ours) == repr(plain)


@kinds
@few
def test_every_kind_of_average(cls: Any, options: Any, kind: str, settings: Any) -> None:
    (opt,) = alike(cls, options, 1)
    average = attach(opt, kind, settings)
    assert isinstance(average.n_averaged, int)
    run(opt, 13, Beside(average, kind, **settings))


@pytest.mark.parametrize("start", [0, 3])
def test_a_plain_mean_is_a_mean(start: int) -> None:
    (opt,) = alike(pyopt.Adam, {"lr": 0.1}, 1, "float64")
    swa = pyopt.averaging.SWA(opt, start=start)
    seen = []
    for step in range(1, 41):
        run(opt, 1, seed=step)
        if step >= start:
            seen.append([d.copy() for d in data(opt)])
    assert swa.n_averaged == len(seen)
    for average, values in zip(swa.averages, zip(*seen, strict=True), strict=True):
        np.testing.assert_allclose(average, np.mean(values, axis=0), rtol=1e-12, atol=1e-14)


def test_a_moving_average_in_closed_form() -> None:
    """decay**n of the first, and (1 - decay) * decay**(n - i) of each further one."""
    (opt,) = alike(pyopt.Adam, {"lr": 0.1}, 1, "float64")
    ema = pyopt.averaging.EMA(opt, decay=0.8)
    seen = []
    for step in range(20):
        run(opt, 1, seed=step)
        seen.append([d.copy() for d in data(opt)])
    weights = [0.8**19] + [0.2 * 0.8 ** (19 - i) for i in range(1, 20)]
    for average, values in zip(ema.averages, zip(*seen, strict=True), strict=True):
        np.testing.assert_allclose(average, np.tensordot(weights, np.array(values), 1), rtol=1e-11, atol=1e-13)


def test_the_warmup_of_the_decay() -> None:
    """Early averages forget fast, and no decay is above the one asked for."""
    p = pyopt.Parameter(np.zeros(1))
    opt = pyopt.SGD([p], lr=1.0)
    ema = pyopt.averaging.EMA(opt, decay=0.9, warmup=10)
    expected = 0.0
    for step in range(200):
        p.grad = -np.ones(1)
        opt.step()
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * p.data[0]
        assert ema.averages[0][0] == pytest.approx(expected, rel=1e-12)


@brief_kinds
def test_before_the_first_update(kind: str, settings: Any) -> None:
    """Copies of the parameters, of their shapes, dtypes and memory orders; none of them shared."""
    arrays = [np.asfortranarray(random((3, 4))), random((), "float64"), random((0, 2))]
    opt = pyopt.SGD([pyopt.Parameter(a) for a in arrays])
    average = attach(opt, kind, {**settings, "every": 2})
    for _ in range(2):
        assert average.n_averaged == 0
        for a, d in zip(average.averages, data(opt), strict=True):
            assert isinstance(a, np.ndarray) and bits(a) == bits(d) and not np.may_share_memory(a, d)
        opt.step(grads=[np.ones_like(a) for a in arrays])
    assert average.n_averaged == 1


@brief_kinds
def test_parameters_without_gradient_are_averaged_as_well(kind: str, settings: Any) -> None:
    """Those that somebody else moves, too."""
    (opt,) = alike(pyopt.Adam, {}, 1)
    beside = Beside(attach(opt, kind, settings), kind, **settings)
    for step in range(4):
        set_gradients(opt, seed=step)
        params_of(opt)[0].grad = None
        params_of(opt)[0].data += step
        opt.step()
        beside.follow(data(opt))
        beside.check()


@few
@brief_kinds
def test_parameters_in_other_memory_orders(cls: Any, options: Any, kind: str, settings: Any) -> None:
    if cls is pyopt.RowwiseAdagrad:
        pytest.skip("its tables lie in C order")

    def made() -> Any:
        return cls(
            [pyopt.Parameter(np.asfortranarray(random((30, 40), seed=1))), pyopt.Parameter(random((7,)))], **options
        )

    opt, plain = made(), made()
    beside = Beside(attach(opt, kind, settings), kind, **settings)
    for step in range(4):
        for each in (opt, plain):
            set_gradients(each, seed=step)
            each.step()
        beside.follow(data(opt))
        beside.check()
    assert numbers(opt) == numbers(plain)


@brief_kinds
def test_parameters_whose_array_is_replaced(kind: str, settings: Any) -> None:
    (opt,) = alike(pyopt.Adam, {}, 1)
    beside = Beside(attach(opt, kind, settings), kind, **settings)
    run(opt, 2, beside)
    p = params_of(opt)[0]
    p.data = p.data * np.float32(2)
    run(opt, 3, beside, seed=5)


def test_of_an_lbfgs() -> None:
    """Whatever takes steps can be averaged."""
    w = pyopt.Parameter(np.array([-1.5, 1.0]))

    def closure() -> float:
        x, y = w.data.tolist()
        w.grad = np.array([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)])
        return 100 * (y - x**2) ** 2 + (1 - x) ** 2

    opt = pyopt.LBFGS([w], lr=0.1, max_iter=3)
    beside = Beside(pyopt.averaging.EMA(opt, decay=0.9), "EMA", decay=0.9)
    for _ in range(4):
        opt.step(closure)
        beside.follow([w.data])
        beside.check()


@few
@TYPES
def test_bits_on_any_number_of_threads(cls: Any, options: Any, dtype: str) -> None:
    found = []
    with everything_shared():
        for threads in (1, 2, 5):
            with pyopt.num_threads(threads):
                (opt,) = alike(cls, options, 1, dtype)
                averages = [attach(opt, *KINDS[i]) for i in (1, 8)]
                run(opt, 3, max_norm=0.5)
                found.append((numbers(opt), average_numbers(*averages)))
    assert found[0] == found[1] == found[2]


def test_what_is_not_finite_shows() -> None:
    """In those elements alone."""
    (opt,) = alike(pyopt.SGD, {"lr": 0.1}, 1, steps=0)
    ema = pyopt.averaging.EMA(opt, decay=0.5)
    run(opt, 2)
    set_gradients(opt)
    params_of(opt)[0].grad[1, 2] = math.nan
    opt.step()
    assert np.argwhere(np.isnan(ema.averages[0])).tolist() == [[1, 2]]
    assert all(np.isfinite(a).all() for a in ema.averages[1:])


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_the_first_update_copies_infinities_too(kind: str) -> None:
    """inf - 0 * (inf - a) would be NaN."""
    p = pyopt.Parameter(np.array([1.0, math.inf, -math.inf, math.nan], np.float32), grad=np.ones(4, np.float32))
    opt = pyopt.SGD([p], lr=0.5)
    average = getattr(pyopt.averaging, kind)(opt)
    opt.step()
    assert np.array_equal(average.averages[0], p.data, equal_nan=True)


# --- beside the other extras ------------------------------------------------------------------------------------------


@every
def test_a_skipped_step_moves_no_average(cls: Any, options: Any) -> None:
    """Nor counts for `every`: raised or skipped, averages go on as if it had not been."""
    ours, never = alike(cls, options)
    settings = [KINDS[i] for i in (1, 5, 9)]
    averages, others = ([attach(opt, *each) for each in settings] for opt in (ours, never))
    for step in range(6):
        set_gradients(ours, seed=9)
        params_of(ours)[-1].grad.flat[0] = math.inf
        before = average_numbers(*averages)
        ours.step(nonfinite="skip")
        with pytest.raises(ValueError, match="gradient"):
            ours.step(nonfinite="raise")
        assert average_numbers(*averages) == before
        set_gradients(ours, never, seed=step)
        ours.step(nonfinite="skip", max_norm=0.7, zero_grad=True)
        never.step(max_norm=0.7)
        assert average_numbers(*averages) == average_numbers(*others)
    assert ours.skipped_steps == 6


@brief_kinds
def test_a_step_that_is_refused_moves_no_average(kind: str, settings: Any) -> None:
    (opt,) = alike(pyopt.Adam, {}, 1)
    average = attach(opt, kind, settings)
    run(opt, 2)
    params_of(opt)[-1].grad = np.ones(3, np.float32)
    raises_and_changes_nothing(opt.step, lambda: (numbers(opt), average_numbers(average)), ValueError, "parameter 4")


@few
@brief_kinds
def test_closures_and_given_gradients(cls: Any, options: Any, kind: str, settings: Any) -> None:
    (opt,) = alike(cls, options, 1)
    beside = Beside(attach(opt, kind, settings), kind, **settings)
    for step in range(3):
        given = [random(p.shape, p.dtype, 10 * step + i) for i, p in enumerate(params_of(opt))]
        opt.step(grads=given)
        beside.follow(data(opt))
        beside.check()
        assert opt.step(lambda: set_gradients(opt, seed=step) or 3.0) == 3.0  # noqa: B023  # called at once
        beside.follow(data(opt))
        beside.check()


def test_hooks_find_the_average_moved() -> None:
    """A post-hook sees the average of the new parameters."""
    (opt,) = alike(pyopt.SGD, {}, 1)
    ema = pyopt.averaging.EMA(opt)
    seen: list[bool] = []
    with opt.register_step_post_hook(lambda o, *_: seen.append(all_bits(ema.averages) == all_bits(data(o)))):
        opt.step()
    assert seen == [True]


# --- groups, detach ---------------------------------------------------------------------------------------------------


@few
@pytest.mark.parametrize("settings", [{"decay": 0.9}, {"decay": 0.4, "every": 2}], ids=str)
def test_a_group_that_comes_later(cls: Any, options: Any, settings: Any) -> None:
    """Its averages begin as copies at the next update; the others go on."""
    (opt,) = alike(cls, options, 1)
    beside = Beside(pyopt.averaging.EMA(opt, **settings), "EMA", **settings)
    run(opt, 3, beside)
    opt.add_param_group({"params": [pyopt.Parameter(random((6, 2), seed=70)), pyopt.Parameter(random((9,), seed=71))]})
    assert len(beside.average.averages) == 7
    assert all_bits(beside.average.averages[5:]) == all_bits(data(opt)[5:])
    run(opt, 5, beside, seed=20)


def test_the_mean_of_a_group_that_comes_later() -> None:
    """The plain mean over the steps that it was there."""
    (opt,) = alike(pyopt.Adam, {}, 1, "float64")
    swa = pyopt.averaging.SWA(opt)
    run(opt, 3)
    opt.add_param_group({"params": [pyopt.Parameter(random((6, 2), "float64", 70))]})
    seen = []
    for step in range(4):
        run(opt, 1, seed=20 + step)
        seen.append(data(opt)[-1].copy())
    np.testing.assert_allclose(swa.averages[-1], np.mean(seen, axis=0), rtol=1e-12)


@brief_kinds
def test_groups_that_change_places_or_go(kind: str, settings: Any) -> None:
    """An average belongs to its parameter, wherever that stands."""
    (opt,) = alike(pyopt.Adam, {}, 1)
    average = attach(opt, kind, settings)
    run(opt, 2)
    before = all_bits(average.averages)
    opt.param_groups.reverse()
    assert all_bits(average.averages) == before[2:] + before[:2]
    run(opt, 1)
    after = all_bits(average.averages)
    del opt.param_groups[0]
    assert all_bits(average.averages) == after[3:]
    run(opt, 1)
    assert len(average.averages) == 2 and all_bits(average.averages) != after[3:]


def test_detach() -> None:
    """It stays what it was, and others go on."""
    ours, plain = alike(pyopt.Adam, {})
    first, second = pyopt.averaging.EMA(ours, decay=0.9), pyopt.averaging.SWA(ours)
    other = pyopt.averaging.SWA(plain)
    run(ours, 3)
    first.detach()
    before = average_numbers(first)
    run(ours, 3, seed=9)
    run(plain, 3)
    run(plain, 3, seed=9)
    assert average_numbers(first) == before and average_numbers(second) == average_numbers(other)
    first.detach()
    now = all_bits(data(ours))
    with first.swapped():
        assert all_bits(data(ours)) == [bits(a) for a in np_averages(before)]
    assert all_bits(data(ours)) == now


def np_averages(shot: Any) -> list[Any]:
    """The arrays of what average_numbers has noted."""
    return [np.frombuffer(raw, dtype).reshape(shape) for dtype, shape, raw in shot[0]["averages"]]


# --- swapped ----------------------------------------------------------------------------------------------------------


@few
@brief_kinds
def test_swapped(cls: Any, options: Any, kind: str, settings: Any) -> None:
    """In place and back, in bits: the arrays are the same objects, and the next steps those of a twin."""
    ours, plain = alike(cls, options)
    average, other = attach(ours, kind, settings), attach(plain, kind, settings)
    run(ours, 3)
    run(plain, 3)
    params, averages = all_bits(data(ours)), all_bits(average.averages)
    arrays, state = data(ours), numbers(ours)
    assert params != averages
    for _ in range(2):
        with average.swapped():
            assert all_bits(data(ours)) == averages
            assert all(d is a for d, a in zip(data(ours), arrays, strict=True))
        assert numbers(ours) == state and all_bits(average.averages) == averages
    run(ours, 2, seed=5)
    run(plain, 2, seed=5)
    assert numbers(ours) == numbers(plain) and average_numbers(average) == average_numbers(other)


def test_swapped_before_the_first_update() -> None:
    (opt,) = alike(pyopt.Adam, {}, 1)
    ema = pyopt.averaging.EMA(opt)
    params = all_bits(data(opt))
    with ema.swapped():
        assert all_bits(data(opt)) == params
    assert all_bits(data(opt)) == params and ema.n_averaged == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
@brief_kinds
def test_swapped_and_an_error_inside(error: Any, kind: str, settings: Any) -> None:
    """All is back, and the error is the caller's."""
    (opt,) = alike(pyopt.Adam, {}, 1)
    average = attach(opt, kind, settings)
    run(opt, 2)
    before = numbers(opt), average_numbers(average)
    raised = error("inside")
    try:
        with average.swapped():
            raise raised
    except BaseException as found:
        assert found is raised
    else:
        raise AssertionError("the error is lost")
    assert (numbers(opt), average_numbers(average)) == before
    run(opt, 1)


@pytest.mark.parametrize("extras", [{}, {"max_norm": 1.0}, {"nonfinite": "skip", "zero_grad": True}], ids=str)
@few
def test_a_step_inside_swapped_is_an_error(cls: Any, options: Any, extras: Any) -> None:
    """It would train the average. Nothing has changed then, and behind the block it steps."""
    (opt,) = alike(cls, options, 1)
    ema, swa = pyopt.averaging.EMA(opt, decay=0.9), pyopt.averaging.SWA(opt)
    run(opt, 2)
    before = numbers(opt), average_numbers(ema, swa)
    for average in (ema, swa):
        with average.swapped():
            grads = all_bits(gradients(opt))
            raises_and_changes_nothing(lambda: opt.step(**extras), lambda: numbers(opt), RuntimeError, "swapped")
            assert all_bits(gradients(opt)) == grads
        assert (numbers(opt), average_numbers(ema, swa)) == before
    run(opt, 1, seed=4)
    assert ema.n_averaged == swa.n_averaged == 3


def test_swapped_inside_swapped() -> None:
    """Whether it is refused or exchanges once more, at the end all is where it was."""
    (opt,) = alike(pyopt.Adam, {}, 1)
    ema, swa = pyopt.averaging.EMA(opt, decay=0.9), pyopt.averaging.SWA(opt)
    run(opt, 3)
    before = numbers(opt), average_numbers(ema, swa)
    for first, second in itertools.product((ema, swa), repeat=2):
        try:
            with first.swapped():
                outer = all_bits(data(opt))
                with second.swapped():
                    pass
                assert all_bits(data(opt)) == outer
        except RuntimeError as error:
            assert "swapped" in str(error)
        assert (numbers(opt), average_numbers(ema, swa)) == before
        with first.swapped():
            assert all_bits(data(opt)) == all_bits(first_averages(before, first is swa))
        assert (numbers(opt), average_numbers(ema, swa)) == before


def first_averages(shot: Any, second: bool) -> list[Any]:
    return np_averages(shot[1][1:] if second else shot[1])


def test_what_is_saved_inside_swapped(tmp_path: Any) -> None:
    """An average's state_dict, and a file, are those of outside, or refused: never parameters and average exchanged."""

    def of_file() -> Any:
        others = alike(pyopt.Adam, {}, 1)[0]
        into = pyopt.averaging.EMA(others, decay=0.9)
        pyopt.save(tmp_path / "file", opt, averages=[ema])
        pyopt.load(tmp_path / "file", others, averages=[into])
        return numbers(others), average_numbers(into)

    (opt,) = alike(pyopt.Adam, {}, 1)
    ema = pyopt.averaging.EMA(opt, decay=0.9)
    run(opt, 3)
    for save in (of_file, lambda: average_numbers(ema), lambda: repr(opt.state_dict())):
        expected = save()
        with ema.swapped():
            try:
                found = save()
            except RuntimeError as error:
                assert "swapped" in str(error)
            else:
                assert found == expected
        assert save() == expected


# --- state_dict -------------------------------------------------------------------------------------------------------


@kinds
@few
def test_states_go_on_elsewhere(cls: Any, options: Any, kind: str, settings: Any) -> None:
    """Saved at any step, loaded into another average, also one that has been used: it goes on in the same bits."""
    for steps in range(6):
        ours, theirs = alike(cls, options)
        one, other = attach(ours, kind, settings), attach(theirs, kind, settings)
        run(ours, steps)
        run(theirs, 2, seed=50)
        theirs.load_state_dict(ours.state_dict())
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            q.data[...] = p.data
        other.load_state_dict(one.state_dict())
        assert average_numbers(one) == average_numbers(other)
        run(ours, 4, seed=7)
        run(theirs, 4, seed=7)
        assert average_numbers(one) == average_numbers(other)


@kinds
def test_what_is_in_a_state_dict(kind: str, settings: Any) -> None:
    """Plain data: a snapshot that nothing changes later, and that pickles."""
    (opt,) = alike(pyopt.Adam, {}, 1)
    average = attach(opt, kind, settings)
    run(opt, 5)
    saved = average.state_dict()
    assert saved["kind"] == kind and saved["steps"] == 5 and saved["n_averaged"] == average.n_averaged
    assert type(saved["steps"]) is int and type(saved["n_averaged"]) is int and isinstance(saved["averages"], list)
    assert all(isinstance(v, int | float | str | list) for v in saved.values())
    assert not any(np.may_share_memory(a, b) for a, b in zip(saved["averages"], average.averages, strict=True))
    before = average_numbers(average)
    again = pickle.loads(pickle.dumps(saved))
    run(opt, 3, seed=9)
    average.load_state_dict(saved)
    assert average_numbers(average) == before
    for a in saved["averages"]:
        a += 1
    assert average_numbers(average) == before
    average.load_state_dict(again)
    assert average_numbers(average) == before


def spoiled(saved: Any, **changes: Any) -> Any:
    return {**saved, **changes}


def last_average(saved: Any, value: Any) -> Any:
    return spoiled(saved, averages=[*saved["averages"][:-1], value])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: None, "must be a dict"),
        (lambda s: [s], "must be a dict"),
        (lambda s: {}, "kind|n_averaged|steps|averages"),
        (lambda s: {k: v for k, v in s.items() if k != "averages"}, "averages"),
        (lambda s: {k: v for k, v in s.items() if k != "n_averaged"}, "n_averaged"),
        (lambda s: {k: v for k, v in s.items() if k != "steps"}, "steps"),
        (lambda s: spoiled(s, kind="SWA"), "SWA.*EMA|EMA.*SWA"),
        (lambda s: spoiled(s, kind="other"), "other"),
        (lambda s: spoiled(s, n_averaged=-1), "n_averaged == -1, must be"),
        (lambda s: spoiled(s, n_averaged=2.5), "n_averaged == 2.5, must be"),
        (lambda s: spoiled(s, steps="3"), "steps == '3', must be"),
        (lambda s: spoiled(s, averages=s["averages"][:-1]), "4.*5|5.*4"),
        (lambda s: spoiled(s, averages=[*s["averages"], np.ones(1, np.float32)]), "6.*5|5.*6"),
        (
            lambda s: spoiled(s, averages=[*s["averages"][:-1], np.ones((50, 40), np.float32)]),
            r"parameter 4.*\(50, 40\)",
        ),
        (lambda s: spoiled(s, averages=[*s["averages"][:-1], s["averages"][-1].astype(int)]), "parameter 4.*int64"),
        (lambda s: spoiled(s, averages=[*s["averages"][:-1], "text"]), "parameter 4.*str"),
        (lambda s: spoiled(s, averages=[*s["averages"][:-1], None]), "parameter 4.*None"),
    ],
)
def test_states_that_do_not_fit(spoil: Any, words: str) -> None:
    """They are named, and nothing has changed, though the faulty one is the last."""
    (opt,) = alike(pyopt.Adam, {}, 1)
    ema = pyopt.averaging.EMA(opt, decay=0.9)
    run(opt, 3)
    saved = copy.deepcopy(ema.state_dict())
    for a in saved["averages"]:
        a += 1
    raises_and_changes_nothing(
        lambda: ema.load_state_dict(spoil(saved)),
        lambda: average_numbers(ema),
        (TypeError, ValueError, KeyError),
        words,
    )
    run(opt, 1)


def test_the_optimizers_state_dict_is_without_averages() -> None:
    ours, plain = alike(pyopt.Adam, {})
    attach(ours, "EMA", {})
    run(ours, 2)
    run(plain, 2)
    saved = ours.state_dict()
    assert list(saved) == ["state", "param_groups"] and repr(saved) == repr(plain.state_dict())
    before = numbers(ours)
    ours.load_state_dict(saved)
    assert numbers(ours) == before


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@few
def test_copies_of_an_optimizer(cls: Any, options: Any, make_copy: Any) -> None:
    """A copy steps like the original, and leaves the averages of that alone."""
    (opt,) = alike(cls, options, 1)
    averages = [attach(opt, *KINDS[i]) for i in (1, 8)]
    run(opt, 2)
    other = make_copy(opt)
    before = average_numbers(*averages), numbers(opt)
    run(other, 3, seed=5)
    assert (average_numbers(*averages), numbers(opt)) == before
    run(opt, 3, seed=5)
    assert numbers(opt) == numbers(other) and averages[0].n_averaged == 5


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@brief_kinds
def test_copies_of_an_optimizer_together_with_its_average(make_copy: Any, kind: str, settings: Any) -> None:
    """The copied average follows the copied optimizer."""
    (opt,) = alike(pyopt.Adam, {}, 1)
    average = attach(opt, kind, settings)
    run(opt, 2)
    opt_2, average_2 = make_copy((opt, average))
    before = average_numbers(average)
    run(opt_2, 3, seed=5)
    assert average_numbers(average) == before
    run(opt, 3, seed=5)
    assert average_numbers(average) == average_numbers(average_2) and average_2.n_averaged == 5
    params = all_bits(data(opt))
    with average_2.swapped():
        assert all_bits(data(opt)) == params != all_bits(data(opt_2))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        ("EMA", "decay", [-0.1, 1.5, math.nan, "x", None, True]),
        ("EMA", "warmup", [-1, math.nan, math.inf, "x", None]),
        ("EMA", "every", [0, -1, 1.5, "x", None, True]),
        ("SWA", "every", [0, -1, 1.5, "x", None, True]),
        ("SWA", "start", [-1, 1.5, "x", None, True]),
    ],
)
def test_wrong_arguments(kind: str, name: str, values: Any) -> None:
    """They are named, and nothing is attached then."""
    ours, plain = alike(pyopt.Adam, {})
    for value in values:
        with pytest.raises((TypeError, ValueError), match=f"{name} == {value!r}, must be"):
            attach(ours, kind, {name: value})
    run(ours, 2)
    run(plain, 2)
    assert numbers(ours) == numbers(plain)


@pytest.mark.parametrize("what", [None, [np.ones(3)], pyopt.Parameter(np.ones(3)), "Adam"], ids=str)
@brief_kinds
def test_of_no_optimizer(what: Any, kind: str, settings: Any) -> None:
    with pytest.raises(TypeError, match=f"optimizer is a {type(what).__name__}, must be"):
        attach(what, kind, settings)


# --- interruption, signals, threads -----------------------------------------------------------------------------------

ALL = {"max_norm": 0.5, "nonfinite": "skip", "zero_grad": True}


@pytest.mark.parametrize("steps", [0, 3], ids=["first update", "fourth update"])
@few
@isolated
def test_interrupted_at_any_call(cls: Any, options: Any, steps: int) -> None:
    """Parameters, state and all averages are those before the step or those after it, and the next step is right."""

    def made() -> Any:
        (opt,) = alike(cls, options, 1, steps=0)
        averages = [attach(opt, *KINDS[i]) for i in (1, 7, 8)]
        run(opt, steps)
        set_gradients(opt, seed=77)
        return opt, averages

    def found(opt: Any, averages: Any) -> Any:
        return numbers(opt), average_numbers(*averages), all_bits(gradients(opt))

    opt, averages = made()
    shots = [found(opt, averages)]
    opt.step(**ALL)
    shots.append(found(opt, averages))
    counts = [0, 0]
    for n in itertools.count(1, 23 if cls is pyopt.Adafactor else 1):
        opt, averages = made()
        try:
            reached = by_profile(SimpleNamespace(step=lambda: opt.step(**ALL)), n)  # noqa: B023  # called at once
        except Stop:
            reached = True
        now = found(opt, averages)
        assert now in shots, f"half a step at point {n}"
        counts[shots.index(now)] += 1
        if now == shots[0]:
            opt.step(**ALL)
            assert found(opt, averages) == shots[1], f"the step after the interrupted one, at point {n}"
        if not reached:
            break
    assert all(counts)


@brief_kinds
@isolated
def test_swapped_interrupted_at_any_call(kind: str, settings: Any) -> None:
    """Behind the block, however it was left, parameters and averages are each where they belong."""
    for n in itertools.count(1):
        (opt,) = alike(pyopt.Adam, {}, 1)
        average = attach(opt, kind, settings)
        run(opt, 2)
        before = numbers(opt), average_numbers(average)

        def evaluate(average: Any = average) -> None:
            with average.swapped():
                pass

        try:
            reached = by_profile(SimpleNamespace(step=evaluate), n)
        except Stop:
            reached = True
        assert (numbers(opt), average_numbers(average)) == before, f"exchanged by halves at point {n}"
        run(opt, 1)
        if not reached:
            break
    assert n > 3


@isolated
def test_signals() -> None:
    """Real ones, at random moments of steps that threads share: the pair of parameters and average is always whole."""

    def handler(*_: Any) -> None:
        if armed:
            raise Stop

    armed = False
    signal.signal(signal.SIGALRM, handler)
    rng = np.random.default_rng(0)
    p = pyopt.Parameter(np.zeros(200_000, np.float32), np.ones(200_000, np.float32))
    opt = pyopt.SGD([p], lr=1.0)
    ema = pyopt.averaging.EMA(opt, decay=0.0)
    swa = pyopt.averaging.SWA(opt)
    interrupted = 0
    end = time.monotonic() + 2
    while time.monotonic() < end:
        steps = swa.n_averaged
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-6, 5e-4)))
            for _ in range(1000):
                opt.step(nonfinite="skip")
        except Stop:
            interrupted += 1
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        done = -int(p.data[0])
        assert steps <= done == swa.n_averaged == ema.n_averaged
        assert (p.data == -done).all()
        assert not done or (ema.averages[0] == -done).all()
        assert not done or len(np.unique(swa.averages[0])) == 1
    assert interrupted > 10


@isolated
def test_other_threads_beside_a_step() -> None:
    """What they read is whole: each element of a snapshot is the same number."""
    p = pyopt.Parameter(np.zeros(100_000, np.float32), np.ones(100_000, np.float32))
    opt = pyopt.SGD([p], lr=1.0)
    ema = pyopt.averaging.EMA(opt, decay=0.0)
    stop, failures = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            try:
                saved = ema.state_dict()
                (array,) = saved["averages"]
                assert (array == array[0]).all() and (-array[0] == saved["n_averaged"] or not saved["n_averaged"])
            except RuntimeError as error:
                if "already running" not in str(error):
                    failures.append(error)
            except AssertionError as error:
                failures.append(error)

    others = [threading.Thread(target=look) for _ in range(2)]
    for thread in others:
        thread.start()
    end = time.monotonic() + 1
    steps = 0
    while time.monotonic() < end:
        try:
            opt.step(max_norm=1e9)
            steps += 1
        except RuntimeError as error:
            assert "already running" in str(error)
    stop.set()
    for thread in others:
        thread.join(30)
    assert not failures, failures[0]
    assert ema.n_averaged == steps == -p.data[0]


# --- optimizers of the user's own -------------------------------------------------------------------------------------


def test_an_own_update_that_raises_moves_no_average() -> None:
    class Raising(Own):
        stop = False

        def update(self, p: Any, g: Any, state: Any, group: Any) -> None:
            super().update(p, g, state, group)
            if self.stop and p.size == 5:
                raise ZeroDivisionError

    (opt,) = alike(Raising, {}, 1, steps=0)
    beside = Beside(pyopt.averaging.EMA(opt, decay=0.9), "EMA", decay=0.9)
    run(opt, 2, beside)
    before = average_numbers(beside.average)
    opt.stop = True
    with pytest.raises(ZeroDivisionError):
        opt.step()
    assert average_numbers(beside.average) == before
    opt.stop = False
    run(opt, 2, beside)
