"""step(max_norm=, nonfinite=, zero_grad=) on arrays: each is what it stands for, in bits, for every optimizer."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyopt
from all_optimizers import BROADCAST, CLASSES, LAYOUTS, TYPES, Own, bits, params_of, random
from extras import (
    BAD,
    alike,
    cleared,
    clip_factor,
    every,
    exact_norm,
    few,
    gradient_bits,
    gradients,
    numbers,
    raises_and_changes_nothing,
    scaled,
    set_gradients,
)
from pyopt.optimizer import register_optimizer_step_pre_hook
from test_engine import everything_shared
from test_interruption import Stop, by_profile
from whole_steps import isolated

bad_values = pytest.mark.parametrize("bad", BAD, ids=str)


def set_scaled(opt: Any, grads: list[Any], factor: float) -> None:
    for p, g in zip(params_of(opt), grads, strict=True):
        p.grad = scaled(g, factor)


# --- max_norm ---------------------------------------------------------------------------------------------------------


@every
@TYPES
def test_max_norm_is_clipping_before_the_step(cls: Any, options: Any, dtype: str) -> None:
    """The norm is that of all groups together; gradients stay, parameters and state are those of clipped ones."""
    ours, by_hand, by_call = alike(cls, options, 3, dtype, steps=1)
    for step in range(4):
        max_norm = [0.1, 1e9, 3, 0.5][step]
        set_gradients(ours, by_hand, by_call, seed=step, scale=[1.0, 1.0, 100.0, 1e-3][step])
        before = gradient_bits(ours)
        ours.step(max_norm=max_norm)
        assert gradient_bits(ours) == before, "a gradient was written"
        norm = pyopt.clip_grad_norm_(params_of(by_call), max_norm)
        assert isinstance(ours.last_grad_norm, float) and ours.last_grad_norm == norm
        assert norm == pytest.approx(exact_norm(gradients(ours)), rel=1e-13)
        set_scaled(by_hand, gradients(by_hand), clip_factor(max_norm, norm))
        for other in (by_hand, by_call):
            other.step()
            assert numbers(ours) == numbers(other), f"step {step}"


@few
@pytest.mark.parametrize("layout", [*LAYOUTS, *BROADCAST])
def test_max_norm_with_gradients_in_every_memory_order(cls: Any, options: Any, layout: str) -> None:
    ours, by_call = alike(cls, options)
    for p, q in zip(params_of(ours), params_of(by_call), strict=True):
        p.grad = (LAYOUTS | BROADCAST)[layout](p.grad)
        q.grad = np.array(p.grad, order="K")
    before = gradient_bits(ours)
    ours.step(max_norm=0.1)
    norm = pyopt.clip_grad_norm_([np.array(p.grad) for p in params_of(by_call)], 0.1)
    assert ours.last_grad_norm == pytest.approx(norm, rel=1e-13) and gradient_bits(ours) == before
    set_scaled(by_call, gradients(by_call), clip_factor(0.1, ours.last_grad_norm))
    by_call.step()
    assert numbers(ours) == numbers(by_call)


@few
def test_max_norm_with_gradients_that_are_parameters(cls: Any, options: Any) -> None:
    """A gradient that lies where the step writes, and one that two parameters share, count as they were."""
    ours, plain = alike(cls, options, steps=0)
    for opt, wrap in ((ours, lambda a: a), (plain, np.array)):
        a, *_, last = params_of(opt)
        last.grad = wrap(last.data[::-1, ::-1])
        a.grad = wrap(a.data)
    set_scaled(plain, gradients(plain), clip_factor(0.2, pyopt.get_total_norm(gradients(ours))))
    ours.step(max_norm=0.2)
    plain.step()
    assert numbers(ours) == numbers(plain)


@few
def test_max_norm_with_given_gradients(cls: Any, options: Any) -> None:
    """Those of grads= count, in the order of the groups or by name, and parameters' own do not."""
    ours, plain = alike(cls, options)
    given = [None if i == 1 else random(p.shape, "float32", 7 + i) for i, p in enumerate(params_of(ours))]
    before = gradient_bits(ours)
    ours.step(grads=given, max_norm=0.1)
    assert gradient_bits(ours) == before
    assert ours.last_grad_norm == pytest.approx(exact_norm(given), rel=1e-13)
    factor = clip_factor(0.1, ours.last_grad_norm)
    plain.step(grads=[scaled(g, factor) for g in given])
    assert numbers(ours) == numbers(plain)


def test_max_norm_over_both_dtypes() -> None:
    def made() -> Any:
        arrays = [random((70, 3), "float32", 1), random((9,), "float64", 2), random((5, 4), "float32", 3)]
        return pyopt.Adam([pyopt.Parameter(a, random(a.shape, a.dtype, 9)) for a in arrays], lr=0.1)

    ours, plain = made(), made()
    ours.step(max_norm=0.5)
    assert ours.last_grad_norm == pytest.approx(exact_norm(gradients(ours)), rel=1e-13)
    pyopt.clip_grad_norm_(params_of(plain), 0.5)
    plain.step()
    assert numbers(ours) == numbers(plain)


@bad_values
@CLASSES
def test_max_norm_applies_what_is_not_finite(cls: Any, options: Any, bad: float) -> None:
    """By default as in torch: NaNs everywhere, or zeros and NaN where an inf has been."""
    ours, by_hand = alike(cls, options)
    for opt in (ours, by_hand):
        params_of(opt)[1].grad[2] = bad
    with np.errstate(all="ignore"):
        ours.step(max_norm=1.0)
        set_scaled(by_hand, gradients(by_hand), clip_factor(1.0, abs(bad)))
        by_hand.step()
    assert not math.isfinite(ours.last_grad_norm) and ours.skipped_steps == 0
    for p, q in zip(params_of(ours), params_of(by_hand), strict=True):
        np.testing.assert_array_equal(p.data, q.data)


@few
@TYPES
def test_bits_of_max_norm_on_any_number_of_threads(cls: Any, options: Any, dtype: str) -> None:
    found = []
    with everything_shared():
        for threads in (1, 2, 5):
            with pyopt.num_threads(threads):
                (opt,) = alike(cls, options, 1, dtype)
                opt.step(max_norm=0.3, zero_grad=True)
                found.append((opt.last_grad_norm, numbers(opt), gradient_bits(opt)))
    assert found[0] == found[1] == found[2]


def test_the_last_norm() -> None:
    """None until a step has computed one, and after a step that has not."""
    (opt,) = alike(pyopt.Adam, {}, 1)
    assert opt.last_grad_norm is None and opt.skipped_steps == 0
    opt.step()
    assert opt.last_grad_norm is None
    for arguments in ({"max_norm": 1.0}, {"nonfinite": "skip"}, {"nonfinite": "raise"}):
        opt.step(**arguments)
        assert opt.last_grad_norm == pyopt.get_total_norm(gradients(opt))
        opt.step(zero_grad=False)
        assert opt.last_grad_norm is None
    opt.zero_grad()
    opt.step(max_norm=1.0)
    assert opt.last_grad_norm == 0.0
    opt.skipped_steps = 5
    params_of(opt)[0].grad = np.full((3, 4), np.nan, np.float32)
    opt.step(nonfinite="skip")
    assert opt.skipped_steps == 6 and math.isnan(opt.last_grad_norm)


@every
def test_a_norm_that_is_only_looked_at_changes_no_bit(cls: Any, options: Any) -> None:
    ours, plain = alike(cls, options)
    for step in range(3):
        set_gradients(ours, plain, seed=step)
        ours.step(nonfinite=["raise", "skip", "apply"][step])
        plain.step()
        assert numbers(ours) == numbers(plain)


def test_a_huge_norm_of_finite_gradients() -> None:
    """1e200 in double is no overflow: the step is clipped, not skipped."""
    ours = pyopt.SGD([pyopt.Parameter(np.zeros(3), np.array([3e200, 0.0, 4e200]))], lr=1.0)
    ours.step(max_norm=1.0, nonfinite="raise")
    np.testing.assert_allclose(params_of(ours)[0].data, [-0.6, 0, -0.8], rtol=1e-12)


# --- nonfinite --------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_raise_and_skip_change_nothing(cls: Any, options: Any, steps: int, max_norm: Any) -> None:
    """No parameter, no state, no count; then the steps are those of an optimizer that never saw such gradients."""
    ours, never = alike(cls, options, steps=steps)
    for count, (bad, where) in enumerate(itertools.product(BAD, (0, -1)), 1):
        victim = params_of(ours)[where]
        victim.grad.flat[-1] = bad
        before, grads = numbers(ours), gradient_bits(ours)
        with pytest.raises(ValueError, match=f"parameter {where % len(params_of(ours))}\\b.*gradient"):
            ours.step(max_norm=max_norm, nonfinite="raise")
        assert ours.skipped_steps == count - 1
        ours.step(max_norm=max_norm, nonfinite="skip")
        assert (numbers(ours), gradient_bits(ours)) == (before, grads)
        assert ours.skipped_steps == count and not math.isfinite(ours.last_grad_norm)
        set_gradients(ours)
    for step in range(3):
        set_gradients(ours, never, seed=step)
        ours.step(max_norm=max_norm, nonfinite="skip")
        never.step(max_norm=max_norm)
        assert numbers(ours) == numbers(never)
    assert ours.skipped_steps == 6


def test_the_first_parameter_with_such_a_gradient_is_named() -> None:
    params = [pyopt.Parameter(np.ones(3), np.ones(3), name=name) for name in ("w", "b", None, "c")]
    opt = pyopt.SGD([{"params": params[:1]}, {"params": params[1:]}])
    params[3].grad[0] = math.inf
    for i, text in ((3, "parameter 'c'"), (2, "parameter 2"), (1, "parameter 'b'")):
        params[i].grad[1] = math.nan
        with pytest.raises(ValueError, match=f"^{text}.*gradient") as found:
            opt.step(nonfinite="raise")
        assert "nan" in str(found.value) or "inf" in str(found.value) or "finite" in str(found.value)
    with pytest.raises(ValueError, match="parameter 2"):
        opt.step(grads=[None, None, np.full(3, math.inf), None], nonfinite="raise")
    opt.step(grads=[np.ones(3)] * 4, nonfinite="raise")


def test_what_is_not_finite_beside_gradients_does_not_matter() -> None:
    """It is gradients that are looked at: a NaN in a parameter is the step's as ever, None is none."""
    ours, plain = alike(pyopt.Adam, {})
    for opt in (ours, plain):
        params_of(opt)[0].data[0, 0] = math.nan
        params_of(opt)[1].grad = None
    ours.step(nonfinite="raise")
    plain.step()
    assert numbers(ours) == numbers(plain)


# --- zero_grad --------------------------------------------------------------------------------------------------------


@every
@TYPES
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_zero_grad_in_the_pass(cls: Any, options: Any, dtype: str, max_norm: Any) -> None:
    """The step is that without; then the very arrays are zeros, and what is added to them is the next gradient."""
    ours, plain = alike(cls, options, dtype=dtype)
    arrays = gradients(ours)
    for step in range(3):
        ours.step(max_norm=max_norm, zero_grad=True)
        plain.step(max_norm=max_norm)
        assert numbers(ours) == numbers(plain)
        assert all(g is a and cleared(g) for g, a in zip(gradients(ours), arrays, strict=True))
        for p, q in zip(params_of(ours), params_of(plain), strict=True):
            for part in (1, 2):
                p.grad += random(p.shape, dtype, 10 * step + part)
            q.grad = random(p.shape, dtype, 10 * step + 1) + random(p.shape, dtype, 10 * step + 2)


@every
def test_zero_grad_to_none(cls: Any, options: Any) -> None:
    """All are None, and what they were is as it was."""
    ours, plain = alike(cls, options)
    arrays, before = gradients(ours), gradient_bits(ours)
    ours.step(zero_grad="set_to_none")
    plain.step()
    assert numbers(ours) == numbers(plain)
    assert gradients(ours) == [None] * len(arrays) and [bits(a) for a in arrays] == before


# The gradient, of a fresh array; whether it can be filled with zeros in place.
WRITABLE = {**dict.fromkeys(LAYOUTS, True), "read-only": False, **dict.fromkeys(BROADCAST, False)}


@few
@pytest.mark.parametrize("layout", [name for name in WRITABLE if name != "misaligned"])
def test_zero_grad_in_every_memory_order(cls: Any, options: Any, layout: str) -> None:
    """Those that the step takes a private copy of are cleared themselves, and nothing beside them."""
    ours, plain = alike(cls, options)
    for opt in (ours, plain):
        p = params_of(opt)[-1]
        p.grad = (LAYOUTS | BROADCAST)[layout](p.grad)
    g = params_of(ours)[-1].grad
    around = g if g.base is None else np.asarray(g.base)
    was = np.array(around)
    ours.step(zero_grad=True)
    plain.step()
    assert numbers(ours) == numbers(plain)
    if WRITABLE[layout]:
        assert params_of(ours)[-1].grad is g and cleared(g)
        g[...] = params_of(plain)[-1].grad
    else:
        assert params_of(ours)[-1].grad is None
    assert bits(np.array(around)) == bits(was), "memory beside the gradient has changed, or one that is not ours"
    assert all(cleared(p.grad) for p in params_of(ours)[:-1])


def shared(opt: Any, kind: str) -> list[int]:
    """Gradients that share memory; which of the parameters 0, 1, 2 (of 12 elements each) must have None after it."""
    a, b, c = params_of(opt)
    buffer = random(40, a.dtype, 5)
    if kind == "one array":
        a.grad = b.grad = buffer[:12]
        return [0, 1]
    if kind == "two views of the same elements":
        a.grad, b.grad = buffer[:12], buffer[:12]
        return [0, 1]
    if kind == "views that overlap":
        a.grad, b.grad, c.grad = buffer[:12], buffer[6:18], buffer[18:30]
        return [0, 1]
    if kind == "reversed":
        b.grad, c.grad = buffer[:12], buffer[11::-1]
        return [1, 2]
    if kind == "views side by side":
        a.grad, b.grad, c.grad = buffer[:12], buffer[12:24], buffer[24:36]
        return []
    if kind == "its own parameter":
        a.grad = a.data
        return [0]
    if kind == "its own parameter reversed":
        b.grad = b.data[::-1]
        return [1]
    if kind == "another parameter":
        c.grad = a.data
        return [2]
    if kind == "its own state":
        arrays = [v for v in opt.state[a].values() if isinstance(v, np.ndarray)]
        a.grad = arrays[0] if arrays else a.data
        return [0]
    raise AssertionError(kind)


SHARED = ["one array", "two views of the same elements", "views that overlap", "reversed", "views side by side"]
SHARED += ["its own parameter", "its own parameter reversed", "another parameter", "its own state"]


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("extras", [{}, {"max_norm": 0.5}], ids=["plain", "clipped"])
@CLASSES
def test_zero_grad_of_shared_memory(cls: Any, options: Any, extras: Any, kind: str) -> None:
    """The step is that of separate copies. Gradients that share memory become None, the others zeros in place."""
    if kind == "its own state" and cls is Own:
        pytest.skip("an update in NumPy reads what it writes")
    opts = []
    for _ in range(2):
        params = [pyopt.Parameter(random(12, "float32", i), random(12, "float32", 20 + i)) for i in range(3)]
        opts.append(cls(params, **options))
        opts[-1].step()
    ours, plain = opts
    dropped = shared(ours, kind)
    arrays = gradients(ours)
    for p, g in zip(params_of(plain), arrays, strict=True):
        p.grad = g.copy()
    ours.step(**extras, zero_grad=True)
    plain.step(**extras)
    assert numbers(ours) == numbers(plain)
    for i, (p, g) in enumerate(zip(params_of(ours), arrays, strict=True)):
        if i in dropped:
            assert p.grad is None
        else:
            assert p.grad is g and cleared(g)


class Foreign:
    """An array of another library."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.array


@few
def test_zero_grad_of_other_objects(cls: Any, options: Any) -> None:
    """What is no ndarray becomes None; None stays; a number of NumPy's too."""
    ours, plain = alike(cls, options)
    foreign = Foreign(params_of(ours)[0].grad)
    scalar = next((p for p in params_of(ours) if p.shape == ()), None)
    for opt in (ours, plain):
        params_of(opt)[0].grad = Foreign(foreign.array.copy()) if opt is plain else foreign
        params_of(opt)[1].grad = None
        if scalar is not None:
            params_of(opt)[3].grad = np.float32(0.25)
    ours.step(zero_grad=True, max_norm=0.1)
    plain.step(max_norm=0.1)
    assert numbers(ours) == numbers(plain)
    assert params_of(ours)[0].grad is None and params_of(ours)[1].grad is None
    assert scalar is None or scalar.grad is None
    assert cleared(params_of(ours)[-1].grad)


@every
def test_zero_grad_with_what_is_not_finite(cls: Any, options: Any) -> None:
    """Zeros, not 0 * NaN; a skipped step clears the same, a step that raises does not."""
    for nonfinite in ("apply", "skip", "raise"):
        (opt,) = alike(cls, options, 1)
        arrays = gradients(opt)
        arrays[0][:] = math.nan
        arrays[-1].flat[3] = math.inf
        before = gradient_bits(opt)
        state = numbers(opt)
        if nonfinite == "raise":
            with pytest.raises(ValueError, match="parameter 0"):
                opt.step(nonfinite=nonfinite, zero_grad=True)
            assert gradient_bits(opt) == before and numbers(opt) == state
            continue
        with np.errstate(all="ignore"):
            opt.step(nonfinite=nonfinite, zero_grad=True)
        assert all(g is a and cleared(a) for g, a in zip(gradients(opt), arrays, strict=True))
        assert (numbers(opt) == state) == (nonfinite == "skip")
        if nonfinite == "apply":  # NaN may be in the groups now too
            continue
        arrays[0][:] = math.nan
        opt.step(nonfinite="skip", zero_grad="set_to_none")
        assert gradients(opt) == [None] * len(arrays) and np.isnan(arrays[0]).all()


# --- together, and with the rest of a step ----------------------------------------------------------------------------

ALL = {"max_norm": 0.5, "nonfinite": "skip", "zero_grad": True}


@few
def test_closures(cls: Any, options: Any) -> None:
    """The closure comes first: its gradients are clipped, looked at and cleared, and its value is returned."""
    ours, plain = alike(cls, options)

    def closure_of(opt: Any) -> Any:
        def closure() -> str:
            for i, p in enumerate(params_of(opt)):
                p.grad = np.asarray(p.data * np.float32(i + 1))
            return "loss"

        return closure

    assert ours.step(closure_of(ours), **ALL) == "loss"
    assert plain.step(closure_of(plain), max_norm=0.5) == "loss"
    assert numbers(ours) == numbers(plain) and all(cleared(g) for g in gradients(ours))

    def spoiling() -> str:
        set_gradients(ours)
        params_of(ours)[0].grad[0, 0] = math.nan
        return "bad"

    before = numbers(ours)
    assert ours.step(spoiling, **ALL) == "bad"
    assert numbers(ours) == before and ours.skipped_steps == 1


def test_lbfgs_refuses_or_clips_what_its_closure_returns() -> None:
    """An optimizer that asks for gradients many times must not take the extras and leave them out."""

    def made(clip: bool) -> Any:
        w = pyopt.Parameter(np.array([-1.5, 1.0]))

        def closure() -> float:
            x, y = w.data.tolist()
            w.grad = np.array([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)])
            if clip:
                pyopt.clip_grad_norm_([w], 1.0)
            return 100 * (y - x**2) ** 2 + (1 - x) ** 2

        return pyopt.LBFGS([w], lr=0.1, max_iter=3), w, closure

    (ours, w, closure), (theirs, v, clipping) = made(False), made(True)
    before = bits(w.data)
    try:
        ours.step(closure, max_norm=1.0)
    except (TypeError, ValueError) as error:
        assert "max_norm" in str(error) and "LBFGS" in str(error) and bits(w.data) == before
    else:
        theirs.step(clipping)
        assert bits(w.data) == bits(v.data)


def test_hooks_see_the_arguments() -> None:
    ours, plain = alike(pyopt.Adam, {})
    seen = []

    def pre(opt: Any, args: Any, kwargs: Any) -> Any:
        seen.append(dict(kwargs))
        return (args, {**kwargs, "max_norm": 0.1}) if kwargs.get("max_norm") == 7.0 else None

    with ours.register_step_pre_hook(pre):
        ours.step(max_norm=0.5, zero_grad=True)
        plain.step(max_norm=0.5)
        set_gradients(ours, plain)
        ours.step(max_norm=7.0)
        plain.step(max_norm=0.1)
    assert [kwargs["max_norm"] for kwargs in seen] == [0.5, 7.0] and seen[0]["zero_grad"] is True
    assert numbers(ours) == numbers(plain)
    with register_optimizer_step_pre_hook(lambda opt, args, kwargs: (args, {"nonfinite": "raise"})):
        params_of(ours)[1].grad[2] = math.nan
        with pytest.raises(ValueError, match="parameter 1"):
            ours.step()


def test_hooks_may_change_gradients() -> None:
    """A pre-hook comes before the norm, a post-hook behind the clearing."""
    ours, plain = alike(pyopt.Adam, {})
    for p in params_of(plain):
        p.grad *= 2
    with (
        ours.register_step_pre_hook(lambda opt, *_: [p.grad.__imul__(2) for p in params_of(opt)] and None),
        ours.register_step_post_hook(lambda opt, *_: seen.extend(cleared(g) for g in gradients(opt))),
    ):
        seen: list[bool] = []
        ours.step(**ALL)
    plain.step(max_norm=0.5)
    assert numbers(ours) == numbers(plain) and seen == [True] * len(seen) and seen


@every
def test_state_dicts_know_nothing_of_it(cls: Any, options: Any) -> None:
    ours, plain = alike(cls, options)
    ours.step(**ALL)
    params_of(ours)[-1].grad.flat[0] = math.nan
    ours.step(**ALL)
    plain.step()
    saved, expected = ours.state_dict(), plain.state_dict()
    assert list(saved) == ["state", "param_groups"]
    assert [list(g) for g in saved["param_groups"]] == [list(g) for g in expected["param_groups"]]
    assert {i: list(s) for i, s in saved["state"].items()} == {i: list(s) for i, s in expected["state"].items()}
    assert repr(ours) == repr(plain) or cls is pyopt.Prodigy  # its d depends on the clipping


def test_copies_keep_the_count() -> None:
    (opt,) = alike(pyopt.Adam, {}, 1)
    params_of(opt)[0].grad[0, 0] = math.nan
    opt.step(nonfinite="skip")
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other.skipped_steps == 1
        other.step(nonfinite="skip")
        assert (other.skipped_steps, opt.skipped_steps) == (2, 1)


class Reading(Own):
    """An optimizer of the user's that looks at what it is given."""

    seen: Any = None

    def update(self, p: Any, g: Any, state: Any, group: Any) -> None:
        self.seen = g.copy()
        assert not g.flags.writeable
        super().update(p, g, state, group)


def test_own_updates_get_the_clipped_gradient() -> None:
    p = pyopt.Parameter(np.zeros(2), np.array([3.0, 4.0]))
    opt = Reading([p])
    opt.step(max_norm=1.0, zero_grad=True)
    assert bits(opt.seen) == bits(scaled(np.array([3.0, 4.0]), clip_factor(1.0, 5.0))) and cleared(p.grad)


def test_an_own_update_that_raises() -> None:
    """Gradients are cleared only where the step has happened."""

    class Raising(Own):
        def update(self, p: Any, g: Any, state: Any, group: Any) -> None:
            super().update(p, g, state, group)
            if p.size == 5:
                raise ZeroDivisionError

    (opt,) = alike(Raising, {}, 1, steps=0)
    before = numbers(opt), gradient_bits(opt)
    with pytest.raises(ZeroDivisionError):
        opt.step(**ALL)
    assert (numbers(opt), gradient_bits(opt)) == before


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = [
    ({"max_norm": 0.0}, ValueError),
    ({"max_norm": -1.0}, ValueError),
    ({"max_norm": math.nan}, ValueError),
    ({"max_norm": "1"}, TypeError),
    ({"max_norm": True}, TypeError),
    ({"max_norm": [1.0]}, TypeError),
    ({"nonfinite": "stop"}, ValueError),
    ({"nonfinite": None}, (TypeError, ValueError)),
    ({"nonfinite": True}, (TypeError, ValueError)),
    ({"zero_grad": "none"}, (TypeError, ValueError)),
    ({"zero_grad": None}, (TypeError, ValueError)),
    ({"zero_grad": 1}, (TypeError, ValueError)),
]


@few
@pytest.mark.parametrize(("arguments", "error"), WRONG, ids=[str(row[0]) for row in WRONG])
def test_wrong_arguments(cls: Any, options: Any, arguments: Any, error: Any) -> None:
    """They are named, with their value and what they must be, before the closure is called."""
    (opt,) = alike(cls, options, 1)
    ((name, value),) = arguments.items()
    called: list[int] = []
    for call in (lambda: opt.step(**arguments), lambda: opt.step(lambda: called.append(1), **arguments)):
        raises_and_changes_nothing(
            call,
            lambda: (numbers(opt), gradient_bits(opt), opt.last_grad_norm, opt.skipped_steps),
            error,
            re.escape(f"{name} == {value!r}, must be"),
        )
    assert not called


@few
@pytest.mark.parametrize("zero_grad", [True, "set_to_none"])
def test_zero_grad_of_given_gradients(cls: Any, options: Any, zero_grad: Any) -> None:
    """They are not the optimizer's to clear."""
    (opt,) = alike(cls, options, 1)
    given = [g.copy() for g in gradients(opt)]
    raises_and_changes_nothing(
        lambda: opt.step(grads=given, zero_grad=zero_grad),
        lambda: (numbers(opt), gradient_bits(opt), [bits(g) for g in given]),
        ValueError,
        "zero_grad.*grads",
    )


@few
def test_a_bad_gradient_is_an_error_before_anything_is_cleared(cls: Any, options: Any) -> None:
    (opt,) = alike(cls, options, 1)
    params_of(opt)[2].grad = np.ones(77, np.float32)
    raises_and_changes_nothing(
        lambda: opt.step(**ALL), lambda: (numbers(opt), gradient_bits(opt)), ValueError, r"parameter 2.*\(77,\)"
    )


def test_the_extras_are_keywords() -> None:
    (opt,) = alike(pyopt.SGD, {}, 1)
    opt.step(None, max_norm=1.0)
    with pytest.raises(TypeError, match="positional"):
        opt.step(None, 1.0)


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["good", "skipped", "copied"])
@few
@isolated
def test_interrupted_at_any_call(cls: Any, options: Any, case: str) -> None:
    """Parameters, state, gradients and the count of skipped steps are those before the step or those after it."""

    def made() -> Any:
        (opt,) = alike(cls, options, 1)
        params = params_of(opt)
        if case == "skipped":
            params[0].grad[0, 0] = math.nan
        if case == "copied":
            params[0].grad = np.asfortranarray(params[0].grad)
            params[1].grad = None
        return opt

    def found(opt: Any) -> Any:
        return numbers(opt), gradient_bits(opt), opt.skipped_steps

    before = found(made())
    whole = made()
    whole.step(**ALL)
    after = found(whole)
    counts = {"before": 0, "after": 0}
    for n in itertools.count(1, 23 if cls is pyopt.Adafactor else 1):
        opt = made()
        try:
            reached = by_profile(SimpleNamespace(step=lambda: opt.step(**ALL)), n)  # noqa: B023  # called at once
        except Stop:
            reached = True
        assert found(opt) in (before, after), f"half a step at point {n}"
        counts["before" if found(opt) == before else "after"] += 1
        if found(opt) == before:
            opt.step(**ALL)
            assert found(opt) == after, f"the step after the interrupted one, at point {n}"
        if not reached:
            break
    assert counts["before"] and counts["after"]


@every
def test_gradient_factor_is_a_multiple_of_the_gradients(cls: Any, options: Any) -> None:
    """Bits of steps with gradients multiplied before, by a power of 2; the norm is that of the multiples."""
    ours, plain = alike(cls, options)
    for step in range(3):
        set_gradients(ours, plain, seed=step)
        before = gradient_bits(ours)
        for p in params_of(plain):
            if p.grad is not None:
                p.grad = np.asarray(p.grad * p.grad.dtype.type(0.25))
        ours.step(gradient_factor=0.25, max_norm=0.5)
        plain.step(max_norm=0.5)
        assert gradient_bits(ours) == before and ours.last_grad_norm == plain.last_grad_norm
        assert numbers(ours) == numbers(plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True])
def test_bad_gradient_factor(value: Any) -> None:
    (opt,) = alike(pyopt.Adam, {}, 1)
    before = numbers(opt)
    with pytest.raises((TypeError, ValueError), match=r"gradient_factor == .*must be"):
        opt.step(gradient_factor=value)
    assert numbers(opt) == before
