"""Inputs on which an optimizer of NumPy arrays once failed, by kind, with what is right."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from pyopt import SGD, Adagrad, Adam, AdamW, Lion, Optimizer, Parameter, RMSprop
from whole_steps import (
    KIND_IDS,
    KINDS,
    in_place,
    in_process,
    isolated,
    params_of,
    random,
    refused,
    steps_right,
    values,
)

EACH = pytest.mark.parametrize("cls, options", KINDS, ids=KIND_IDS)
WITH_STATE = pytest.mark.parametrize("cls, options", KINDS[1:], ids=KIND_IDS[1:])
ones = np.ones


def make(cls=Adam, options=None, shapes=((3, 4), (), (5,)), steps=1, dtype="float32"):
    params = [Parameter(random(s, dtype, i), random(s, dtype, 50 + i)) for i, s in enumerate(shapes)]
    opt = cls(params, **(options or {}))
    for _ in range(steps):
        opt.step()
    return opt, params


def array_keys(opt, p):
    return [k for k, v in opt.state[p].items() if isinstance(v, np.ndarray)]


# --------------------------------------------------------------------------------- A. a step that was stopped half-way

OVERRIDES = ["check_group", "state_streams", "scalars", "new_state", "initial_value"]


def stopping(cls, name, error=KeyboardInterrupt):
    """A subclass whose method raises once, when told to."""

    def method(self, *args, **kwargs):
        if self.armed:
            self.armed = False
            raise error
        return getattr(cls, name)(self, *args, **kwargs)

    return type(f"Stopping{cls.__name__}", (cls,), {"armed": False, name: method})


@pytest.mark.parametrize("name", OVERRIDES)
@EACH
@isolated
def test_first_step_after_an_interrupted_first_step(cls, options, name):
    params = [Parameter(random(s, seed=i), random(s, seed=9 + i)) for i, s in enumerate([(4,), (2, 3), (5,)])]
    opt = stopping(cls, name)([{"params": params[:1]}, {"params": params[1:]}], **options)
    before, opt.armed = values(opt), True
    try:
        opt.step()
    except KeyboardInterrupt:
        assert values(opt) == before
    opt.armed = False
    steps_right(opt)


@isolated
def test_sgd_after_an_interrupted_first_step_moves_by_the_gradient():
    p = Parameter(np.zeros(4), ones(4))
    opt = stopping(SGD, "state_streams")([p], lr=1.0)
    opt.armed = True
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    opt.step()
    assert p.data.tolist() == [-1] * 4


@pytest.mark.parametrize("name", OVERRIDES[:3])
@EACH
@isolated
def test_changed_lr_is_used_after_an_interrupted_step(cls, options, name):
    params = [Parameter(random(4, seed=i), random(4, seed=9 + i)) for i in range(2)]
    opt = stopping(cls, name)(params, **options)
    opt.step()
    for lr in 100.0, 0.5:
        opt.param_groups[0]["lr"], opt.armed, before = lr, True, values(opt)
        try:
            opt.step()
        except KeyboardInterrupt:
            assert values(opt) == before
        opt.armed = False
        steps_right(opt)


@pytest.mark.parametrize("name", OVERRIDES)
@isolated
def test_changed_betas_and_flags_are_used_after_an_interrupted_step(name):
    p = Parameter(random(4), random(4, seed=1))
    opt = stopping(Adam, name)([p])
    opt.step()
    for key, value in [("betas", (0.5, 0.6)), ("maximize", True), ("decoupled_weight_decay", True), ("eps", 0.5)]:
        opt.param_groups[0][key], opt.armed = value, True
        try:
            opt.step()
        except KeyboardInterrupt:
            opt.armed = False
        steps_right(opt, steps=1)


@isolated
def test_first_state_that_cannot_be_put_in_leaves_nothing_of_it():
    """A key whose hash fails where the states of all parameters go into their entries, the last thing that can."""

    class Key:
        hashes = 1  # in the dict of the first state

        def __hash__(self):
            self.hashes -= 1
            if self.hashes < 0:
                raise KeyboardInterrupt
            return 1

    class Odd(Adam):
        def new_state(self, p, group):
            state = super().new_state(p, group)
            return {**state, key: 1.0} if p is params[1] else state

    key = Key()
    params = [Parameter(random(4, seed=i), random(4, seed=9 + i)) for i in range(2)]
    opt = Odd(params)
    before = values(opt)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert values(opt) == before and not any(opt.state.values())
    key.hashes = 10**6
    opt.step()
    assert [opt.state[p]["step"] for p in params] == [1, 1] and opt.state[params[1]][key] == 1.0


@isolated
def test_parameter_that_changes_while_its_first_state_is_entered():
    """A hash of the user's own runs then: the arrays are looked at again."""

    class Meddling(Parameter):
        act = staticmethod(lambda: None)

        def __hash__(self):
            self.act()
            return super().__hash__()

    p = Meddling(random(4), random(4, seed=1))
    opt = Adam([p])
    before = p.data.copy()
    p.act = lambda: in_place(p.data.flags, writeable=False)
    with pytest.raises(ValueError, match="read-only"):
        opt.step()
    assert (p.data == before).all()
    p.act = lambda: None
    assert not opt.state[p]
    p.data = before
    steps_right(opt)


@isolated
def test_option_that_changes_inside_is_used():
    """A list is the same object with other numbers in it."""
    opt = Adam([Parameter(random(4), random(4, seed=1))], betas=[0.9, 0.999])
    steps_right(opt)
    opt.param_groups[0]["betas"][0] = 0.5
    steps_right(opt)


@pytest.mark.parametrize("name", OVERRIDES)
@EACH
@isolated
def test_new_group_after_an_interrupted_step(cls, options, name):
    opt = stopping(cls, name)([Parameter(random(4), random(4, seed=1))], **options)
    opt.step()
    opt.add_param_group({"params": [Parameter(random(7), random(7, seed=2)), Parameter(random(3), random(3, seed=3))]})
    opt.armed = True
    try:
        opt.step()
    except KeyboardInterrupt:
        opt.armed = False
    steps_right(opt)


@pytest.mark.parametrize("error", [KeyError, AttributeError, StopIteration, TypeError, MemoryError, IndexError])
@pytest.mark.parametrize("name", OVERRIDES[:4])
@isolated
def test_error_of_an_override_comes_out(name, error):
    """Whatever its type, none is taken for a sign of pyopt's own."""
    opt = stopping(Adam, name, error)([Parameter(random(4), random(4, seed=1))])
    before, opt.armed = values(opt), True
    with pytest.raises((error, RuntimeError) if error is StopIteration else error):
        opt.step()
    assert values(opt) == before
    steps_right(opt)


@WITH_STATE
@isolated
def test_bad_option_in_the_second_group_then_mended(cls, options):
    """The first group has been checked by then; it must not count as looked at."""
    params = [Parameter(random(n), random(n, seed=n)) for n in (4, 6)]
    opt = cls([{"params": params[:1]}, {"params": params[1:]}], **options)
    for steps in range(2):
        opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = 0.25 / (1 + steps), float("nan")
        refused(opt, opt.step, ValueError, ["lr", "nan"])
        refused(opt, opt.step, ValueError, ["lr", "nan"])
        opt.param_groups[1]["lr"] = 0.5
        steps_right(opt)


def overlaps():
    """name: what makes two things that a step writes overlap, given the optimizer and two parameters of one shape"""
    key = "exp_avg"
    return {
        "state on its parameter": lambda o, p, q: o.state[p].update({key: p.data}),
        "state on another parameter": lambda o, p, q: o.state[p].update({key: q.data}),
        "state on another's state": lambda o, p, q: o.state[p].update({key: o.state[q][key]}),
        "state on another entry": lambda o, p, q: o.state[p].update({key: o.state[p]["exp_avg_sq"]}),
        "one state dict for two": lambda o, p, q: o.state.__setitem__(p, o.state[q]),
        "parameter on another": lambda o, p, q: setattr(p, "data", q.data),
        "parameter on a view of another": lambda o, p, q: setattr(p, "data", q.data[:]),
        "parameter on state": lambda o, p, q: setattr(p, "data", o.state[q]["exp_avg_sq"]),
        "parameter on its own state": lambda o, p, q: setattr(p, "data", o.state[p][key]),
    }


@pytest.mark.parametrize("kind", overlaps())
@pytest.mark.parametrize("first", [0, 1])
@isolated
def test_overlap_is_refused_each_time_until_it_is_corrected(kind, first):
    p, q = params = [Parameter(random(4, seed=i), random(4, seed=9 + i)) for i in range(2)]
    opt = Adam(params[::-1] if first else params)
    opt.step()
    data, state = p.data, {k: dict(v) for k, v in opt.state.items()}
    overlaps()[kind](opt, p, q)
    for _ in range(4):
        refused(opt, opt.step, ValueError, ["parameter"])
    opt.param_groups[0]["lr"] = 0.5  # another reason to look again
    refused(opt, opt.step, ValueError, ["parameter"])
    refused(opt, lambda: opt.step(grads=[ones(4, np.float32)] * 2), ValueError, ["parameter"])
    p.data = data
    for each, entries in state.items():
        opt.state[each] = entries
    steps_right(opt)


@EACH
@isolated
def test_overlap_of_new_data_is_refused_each_time(cls, options):
    opt, (p, q) = make(cls, options, [(6,), (6,)])
    old, big = p.data, random(16)
    p.data, q.data = big[:6], big[5:11]  # overlap by one
    for _ in range(3):
        refused(opt, opt.step, ValueError, ["parameter 0", "parameter 1"])
    q.data = big[6:12]
    steps_right(opt)
    p.data = old
    steps_right(opt)


@EACH
@isolated
def test_overlap_is_noticed_when_one_sat_out(cls, options):
    """Rows that were inactive when memory was last measured come back measured."""
    opt, (p, q, r) = make(cls, options, [(6,), (6,), (6,)], steps=2)
    gq = q.grad
    q.grad = None
    opt.step()
    p.data = q.data
    p.grad, q.grad, r.grad = random(6, seed=3), gq, random(6, seed=4)
    for _ in range(3):
        refused(opt, opt.step, ValueError, ["parameter 0", "parameter 1"])
    p.data = random(6, seed=5)
    steps_right(opt)


@isolated
def test_overlap_stays_noticed_when_a_third_parameter_moves():
    opt, (p, q, r) = make(Adam, {}, [(6,), (6,), (6,)])
    p.data = q.data
    refused(opt, opt.step, ValueError)
    r.data = random(6, seed=5)
    refused(opt, opt.step, ValueError)
    opt.state[r]["exp_avg"] = random(6, seed=6)
    refused(opt, opt.step, ValueError)
    p.data = random(6, seed=7)
    steps_right(opt)


@isolated
def test_data_that_lands_on_a_live_gradient():
    """A gradient in the memory of what is written is taken as it was before the step, whenever it came to lie there."""
    p, q = params = [Parameter(random(6, seed=i), random(6, seed=9 + i)) for i in range(2)]
    opt = SGD(params, lr=0.5, momentum=0.9)
    for _ in range(2):
        steps_right(opt)
    g = random(12, seed=3)
    p.grad = g[:6]
    steps_right(opt)
    q.data = g[4:10]
    for _ in range(2):
        steps_right(opt, [g[:6], g[5:11]], steps=1)


@isolated
def test_data_that_lands_on_a_gradient_that_stays():
    """The first row writes where the second one reads, later: only what is written has moved, not the gradient."""
    p, q = params = [Parameter(random(6, seed=i), random(6, seed=9 + i)) for i in range(2)]
    opt = SGD(params, lr=0.5, momentum=0.9)
    steps_right(opt)
    p.data = q.grad
    steps_right(opt)


@EACH
@isolated
def test_gradient_that_one_step_refuses_leaves_the_rows_before_it_alone(cls, options):
    opt, (p, _q, r) = make(cls, options, steps=0)
    r.grad = ones(4, np.float32)
    refused(opt, opt.step, ValueError, ["parameter 2", "(4,)"])
    assert not opt.state_dict()["state"] or cls is Adagrad
    p.data = random((3, 4), seed=8)
    refused(opt, opt.step, ValueError, ["parameter 2", "(4,)"])
    r.grad = ones(5, np.float32)
    steps_right(opt)


# --- load_state_dict


def saved_and_live(cls, options, steps=2):
    opt, _ = make(cls, options, steps=steps)
    saved, expected = copy.deepcopy(opt.state_dict()), [state for _, state in values(opt)]
    opt.step()
    opt.param_groups[0]["lr"] = 7.0
    return opt, saved, expected


def loads(opt, saved, expected):
    data = [p.data.tobytes() for p in params_of(opt)]
    opt.load_state_dict(saved)
    assert [p.data.tobytes() for p in params_of(opt)] == data
    assert [state for _, state in values(opt)] == expected
    assert opt.param_groups[0]["lr"] == saved["param_groups"][0]["lr"]
    steps_right(opt)


def poor_states():
    def each(change):
        def do(opt):
            for p in params_of(opt):
                for key in array_keys(opt, p):
                    opt.state[p][key] = change(opt.state[p][key], p)

        return do

    def lock(v, p):
        v.flags.writeable = False
        return v

    return {
        "replaced by {}": lambda o: setattr(o, "state", {}),
        "cleared": lambda o: o.state.clear(),
        "one entry deleted": lambda o: o.state.pop(params_of(o)[1]),
        "empty": lambda o: o.state.__setitem__(params_of(o)[1], {}),
        "list": lambda o: o.state.__setitem__(params_of(o)[1], [1]),
        "None": lambda o: o.state.__setitem__(params_of(o)[1], None),
        "half": lambda o: o.state[params_of(o)[0]].popitem(),
        "read-only": each(lock),
        "from a pickle's buffers": each(lambda v, p: np.frombuffer(v.tobytes(), v.dtype).reshape(v.shape)),
        "broadcast": each(lambda v, p: np.broadcast_to(v.flat[0], v.shape)),
        "the parameter's memory": each(lambda v, p: p.data),
        "one array for all": each(lambda v, p: np.zeros(100, v.dtype)[: v.size].reshape(v.shape)),
        "another shape": each(lambda v, p: np.zeros(v.size + 1, v.dtype)),
        "another dtype": each(lambda v, p: v.astype(np.float64)),
        "another order": each(lambda v, p: np.asfortranarray(v)),
        "strided": each(lambda v, p: np.repeat(v, 2, axis=-1)[..., ::2] if v.ndim else v),
        "None as arrays": each(lambda v, p: None),
        "numbers as arrays": each(lambda v, p: 3.0),
    }


@pytest.mark.parametrize("kind", poor_states())
@WITH_STATE
@isolated
def test_load_state_dict_into_any_state(cls, options, kind):
    """What lies there is what is replaced: it need not be sound, and nothing of the user's is written into."""
    opt, saved, expected = saved_and_live(cls, options)
    poor_states()[kind](opt)
    loads(opt, saved, expected)


@pytest.mark.parametrize("kind", poor_states())
@isolated
def test_bad_state_dict_changes_nothing_in_any_state(kind):
    opt, saved, _ = saved_and_live(Adam, {"lr": 0.1})
    poor_states()[kind](opt)
    saved["state"][2]["exp_avg"] = ones(3, np.float32)
    state, entries, lr = opt.state, list(opt.state.items()), opt.param_groups[0]["lr"]
    kept = [(k, v, dict(v) if isinstance(v, dict) else v) for k, v in entries]
    arrays = [(a, a.copy()) for _, v, _ in kept if isinstance(v, dict) for a in v.values() if isinstance(a, np.ndarray)]
    with pytest.raises(ValueError, match=r"exp_avg.*parameter 2|parameter 2.*exp_avg"):
        opt.load_state_dict(saved)
    assert opt.state is state and opt.param_groups[0]["lr"] == lr
    assert [k for k, _, _ in kept] == list(opt.state)
    for k, v, copied in kept:
        assert opt.state[k] is v
        assert not isinstance(v, dict) or all(v[name] is value for name, value in copied.items())
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in arrays)


@isolated
def test_load_state_dict_does_not_write_into_read_only_memory_that_a_copy_shares():
    opt, saved, expected = saved_and_live(Adam, {"lr": 0.1})
    shared = [v for p in params_of(opt) for v in opt.state[p].values() if isinstance(v, np.ndarray)]
    kept = [v.copy() for v in shared]
    for v in shared:
        v.flags.writeable = False
    loads(opt, saved, expected)
    assert all(np.array_equal(a, b) for a, b in zip(shared, kept, strict=True))


@pytest.mark.parametrize("cls, options", KINDS[1:4], ids=KIND_IDS[1:4])
@isolated
def test_optimizer_out_of_read_only_buffers(cls, options):
    """As joblib's workers and pickle 5 with buffers give it: an error that names, and a load that mends the state."""
    opt, _ = make(cls, options, steps=2)
    buffers = []
    data = pickle.dumps(opt, protocol=5, buffer_callback=buffers.append)
    new = pickle.loads(data, buffers=[bytes(b.raw()) for b in buffers])
    before = values(new)
    assert before == values(opt)
    with pytest.raises(ValueError, match=r"read-only.*parameter 0|parameter 0.*read-only"):
        new.step()
    assert values(new) == before
    for p in params_of(new):
        p.data = p.data.copy()
    refused(new, new.step, ValueError, ["parameter 0", "read-only"])
    new.load_state_dict(opt.state_dict())
    steps_right(new)


# ------------------------------------------------------------------------------------ B. others touch what a step reads


@pytest.mark.parametrize("name", OVERRIDES)
@EACH
@isolated
def test_group_added_by_an_override_in_mid_step(cls, options, name):
    """The new group joins this step or the next one; each parameter makes whole steps."""

    def method(self, *args, **kwargs):
        if self.armed:
            self.armed = False
            self.add_param_group({"params": [Parameter(random(9), random(9, seed=9))]})
        return getattr(cls, name)(self, *args, **kwargs)

    opt = type("Adding", (cls,), {"armed": False, name: method})([Parameter(random(4), random(4, seed=1))], **options)
    opt.armed = True
    try:
        opt.step()
    except RuntimeError:  # refused from inside a step, clearly: all right as well
        opt.armed = False
    opt.armed = False
    steps_right(opt)


def meddle(kind, opt):
    p = params_of(opt)[-1]
    {
        "groups cleared": lambda: opt.param_groups.clear(),
        "last group deleted": lambda: opt.param_groups.pop(),
        "params cleared": lambda: opt.param_groups[-1]["params"].clear(),
        "params deleted": lambda: opt.param_groups[-1].pop("params"),
        "param appended": lambda: opt.param_groups[-1]["params"].append(Parameter(random(3), random(3))),
        "state cleared": lambda: opt.state.clear(),
        "state replaced": lambda: setattr(opt, "state", {}),
        "entries deleted": lambda: opt.state[p].clear() if p in opt.state else None,
        "entries replaced": lambda: opt.state.update({p: {k: copy.copy(v) for k, v in opt.state.get(p, {}).items()}}),
        "entries garbage": lambda: opt.state.__setitem__(p, [1]),
        "data replaced": lambda: setattr(p, "data", p.data.copy()),
        "data shrunk": lambda: setattr(p, "data", p.data[:1].copy()),
        "gradient dropped": lambda: setattr(p, "grad", None),
        "shape in place": lambda: in_place(p.data, shape=(p.data.size, 1)),
        "resized if free": lambda: p.data.resize(100_000),
        "a step": lambda: opt.step(),
        "loaded": lambda: opt.load_state_dict(opt.state_dict()),
        "saved": lambda: opt.state_dict(),
        "shown": lambda: repr(opt),
        "copied": lambda: copy.deepcopy(opt).step(),
    }[kind]()


MEDDLING = ["groups cleared", "last group deleted", "params cleared", "params deleted", "param appended"]
MEDDLING += ["state cleared", "state replaced", "entries deleted", "entries replaced", "entries garbage"]
MEDDLING += [
    "data replaced",
    "data shrunk",
    "gradient dropped",
    "shape in place",
    "resized if free",
    "a step",
]
MEDDLING += ["loaded", "saved", "shown", "copied"]


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize("kind", MEDDLING)
@isolated
def test_override_that_meddles_with_the_optimizer(kind, name, steps):
    """Whatever it does: an exception, or a step; no crash, and no hang of what comes after."""

    def method(self, *args, **kwargs):
        result = getattr(Adam, name)(self, *args, **kwargs)
        if self.armed:
            self.armed = False
            meddle(kind, self)
        return result

    params = [Parameter(random(n, seed=n), random(n, seed=9 + n)) for n in (4, 6, 5)]
    opt = type("Meddling", (Adam,), {"armed": False, name: method})([{"params": params[:1]}, {"params": params[1:]}])
    for _ in range(steps):
        opt.step()
    opt.param_groups[1]["lr"] = 0.5
    opt.armed = True
    try:
        opt.step()
    except Exception as error:
        assert not isinstance(error, SystemError), error
    opt.armed = False
    good = [Parameter(random(n, seed=n), random(n, seed=9 + n)) for n in (4, 6)]
    opt.param_groups[:] = [{**opt.defaults, "params": good}]
    opt.state = {}
    steps_right(opt)


@pytest.mark.parametrize("value", [[1], None, 3, "state", np.ones(3), (1, 2)], ids=repr)
@pytest.mark.parametrize("steps", [0, 1])
@EACH
@isolated
def test_state_of_a_parameter_that_is_no_dict(cls, options, steps, value):
    opt, (_, q, _) = make(cls, options, steps=steps)
    had = q in opt.state
    good = opt.state.get(q)
    opt.state[q] = value
    data = [p.data.copy() for p in params_of(opt)]
    for _ in range(2):
        with pytest.raises(TypeError, match="parameter 1"):
            opt.step()
        assert all(np.array_equal(a, p.data) for a, p in zip(data, params_of(opt), strict=True))
    if had:
        opt.state[q] = good
    else:
        del opt.state[q]
    steps_right(opt)


@EACH
@isolated
def test_state_is_a_plain_dict_without_entries(cls, options):
    opt, _ = make(cls, options, steps=2)
    opt.state = {}
    steps_right(opt)


# -------------------------------------------------------------------------------------- C. content, not identity


def test_shape_set_in_place_is_followed():
    a = np.zeros(6, np.float32)
    opt = SGD([a], lr=1.0)
    opt.step(grads=[np.zeros(6, np.float32)])
    in_place(a, shape=(3, 2))
    opt.step(grads=[np.arange(6, dtype=np.float32).reshape(2, 3).T])
    assert (-a).tolist() == [[0, 3], [1, 4], [2, 5]]


@isolated
def test_gradient_of_the_old_shape_is_refused():
    a = np.zeros(6, np.float32)
    opt = SGD([a], lr=1.0)
    opt.step(grads=[ones(6, np.float32)])
    in_place(a, shape=(3, 2))
    for _ in range(2):
        refused(opt, lambda: opt.step(grads=[ones(6, np.float32)]), ValueError, ["parameter 0", "(6,)", "(3, 2)"])
    steps_right(opt, [random((3, 2))])
    in_place(a, shape=(6,))
    refused(opt, lambda: opt.step(grads=[ones((3, 2), np.float32)]), ValueError, ["parameter 0", "(3, 2)", "(6,)"])
    steps_right(opt, [random(6)])


@pytest.mark.parametrize("new", [(6, 4), (4, 6), (24,), (2, 3, 4), (24, 1), (1, 24), (4, 3, 2), (2, 2, 2, 3)])
@pytest.mark.parametrize("old", [(24,), (4, 6), (2, 3, 4)])
@EACH
@isolated
def test_shapes_of_parameter_and_state_set_in_place(cls, options, old, new):
    """Of both: followed. Gradients of C and Fortran order give what the oracle gives."""
    opt, (p, q) = make(cls, options, [old, (5,)])
    for shape in new, old, new:
        for array in (
            [p.data, *(opt.state[p][k] for k in array_keys(opt, p) if p in opt.state)] if p in opt.state else [p.data]
        ):
            in_place(array, shape=shape)
        steps_right(opt, [random(shape, seed=3), q.grad], 1)
        steps_right(opt, [np.asfortranarray(random(shape, seed=4)), q.grad], 2)
        steps_right(opt, [np.broadcast_to(np.float32(0.5), shape), None], 1)


@WITH_STATE
@isolated
def test_shape_of_the_state_alone_set_in_place_is_an_error(cls, options):
    opt, (p, _) = make(cls, options, [(4, 6), (5,)])
    for key in array_keys(opt, p):
        value = opt.state[p][key]
        in_place(value, shape=(6, 4))
        for _ in range(2):
            refused(opt, opt.step, ValueError, ["parameter 0", key])
        in_place(value, shape=(4, 6))
        steps_right(opt)


@WITH_STATE
@isolated
def test_shape_of_the_parameter_alone_set_in_place_is_an_error(cls, options):
    opt, (p, q) = make(cls, options, [(4, 6), (5,)])
    in_place(p.data, shape=(6, 4))
    g = [random((6, 4)), q.grad]
    for _ in range(2):
        refused(opt, lambda: opt.step(grads=g), ValueError, ["parameter 0"])
    in_place(p.data, shape=(4, 6))
    steps_right(opt)


@EACH
@isolated
def test_transposed_in_place(cls, options):
    """The same memory, read the other way."""
    opt, (p, q) = make(cls, options, [(4, 4), (5,)])
    for _ in range(2):
        for array in [p.data, *(opt.state[p][k] for k in array_keys(opt, p))] if p in opt.state else [p.data]:
            in_place(array, strides=array.strides[::-1])
        g = random((4, 4), seed=5)
        steps_right(opt, [g, q.grad])
        steps_right(opt, [np.asfortranarray(g), q.grad])


@WITH_STATE
@isolated
def test_parameter_alone_transposed_in_place_is_an_error(cls, options):
    opt, (p, _) = make(cls, options, [(4, 4), (5,)])
    in_place(p.data, strides=p.data.strides[::-1])
    for _ in range(2):
        refused(opt, opt.step, ValueError, ["parameter 0", "strides"])
    in_place(p.data, strides=p.data.strides[::-1])
    steps_right(opt)


@EACH
@isolated
def test_parameter_that_no_longer_lies_dense(cls, options):
    opt, (p, _q) = make(cls, options, [(4, 4), (5,)])
    good = p.data.strides
    whole = p.data
    view = whole[:]
    p.data = view
    steps_right(opt)
    in_place(view, strides=(16, 0))
    for _ in range(2):
        refused(opt, opt.step, ValueError, ["parameter 0"])
    in_place(view, strides=good)
    steps_right(opt)


@pytest.mark.parametrize("dtype", ["int32", ">f4", "uint32"])
@EACH
@isolated
def test_dtype_of_the_parameter_set_in_place(cls, options, dtype):
    opt, (_, q, r) = make(cls, options)
    in_place(r.data, dtype=dtype)
    for g in (r.grad, r.grad.view(dtype)):
        for _ in range(2):
            refused(opt, lambda g=g: opt.step(grads=[None, q.grad, g]), TypeError, ["parameter 2"])
    in_place(r.data, dtype="float32")
    steps_right(opt)


@pytest.mark.parametrize("dtype", ["int32", ">f4"])
@WITH_STATE
@isolated
def test_dtype_of_the_state_set_in_place(cls, options, dtype):
    opt, (*_, r) = make(cls, options)
    for key in array_keys(opt, r):
        in_place(opt.state[r][key], dtype=dtype)
        for _ in range(2):
            refused(opt, opt.step, TypeError, ["parameter 2", key])
        in_place(opt.state[r][key], dtype="float32")
        steps_right(opt)


@isolated
def test_float32_in_place_to_float64():
    opt, (p,) = make(SGD, {"lr": 0.5}, [(6,)])
    in_place(p.data, dtype="float64")
    refused(opt, opt.step, (TypeError, ValueError), ["parameter 0"])
    steps_right(opt, [ones(3)])


@pytest.mark.parametrize("size", [0, 1, 3, 7, 1000, 300_000])
@EACH
@isolated
def test_parameter_resized_in_place(cls, options, size):
    """Its memory may be elsewhere now. State of the old size is an error; none is a new beginning."""
    opt, (p, _q) = make(cls, options, [(6,), (5,)], steps=2)
    p.data.resize(size, refcheck=False)
    refused(opt, opt.step, ValueError, ["parameter 0", "(6,)", f"({size},)"])
    p.grad = random(size)
    if opt.state.get(p):
        refused(opt, opt.step, ValueError, ["parameter 0"])
        del opt.state[p]
    if cls is Adagrad:
        opt.state.pop(p, None)
    steps_right(opt)


@pytest.mark.parametrize("size", [0, 1, 7, 300_000])
@WITH_STATE
@isolated
def test_state_resized_in_place(cls, options, size):
    opt, (p, _) = make(cls, options, [(6,), (5,)], steps=2)
    key = array_keys(opt, p)[-1]
    opt.state[p][key].resize(size, refcheck=False)
    for _ in range(2):
        refused(opt, opt.step, ValueError, ["parameter 0", key])
    del opt.state[p]
    steps_right(opt)


@EACH
@isolated
def test_parameter_and_state_resized_together(cls, options):
    opt, (p, _q) = make(cls, options, [(6,), (5,)], steps=2)
    for size in 200_000, 3, 0, 8:
        p.data.resize(size, refcheck=False)
        for key in array_keys(opt, p) if p in opt.state else ():
            opt.state[p][key].resize(size, refcheck=False)
        p.grad = random(size, seed=size)
        steps_right(opt)


@pytest.mark.parametrize("steps", [0, 2])
@EACH
@isolated
def test_parameter_made_read_only(cls, options, steps):
    opt, (_, q, _) = make(cls, options, steps=steps)
    q.data.flags.writeable = False
    for _ in range(3):
        refused(opt, opt.step, ValueError, ["parameter 1", "read-only"])
    q.data.flags.writeable = True
    steps_right(opt)


@WITH_STATE
@isolated
def test_state_made_read_only(cls, options):
    opt, (_, q, _) = make(cls, options, steps=2)
    for key in array_keys(opt, q):
        opt.state[q][key].flags.writeable = False
        for _ in range(3):
            refused(opt, opt.step, ValueError, ["parameter 1", key, "read-only"])
        opt.state[q][key].flags.writeable = True
        steps_right(opt)


@EACH
@isolated
def test_frozen_parameter_may_be_read_only(cls, options):
    """What has no gradient is not written, so it does no harm."""
    opt, (_, q, _) = make(cls, options, steps=2)
    q.grad = None
    q.data.flags.writeable = False
    steps_right(opt)
    q.grad = np.float32(3)
    refused(opt, opt.step, ValueError, ["parameter 1", "read-only"])


@EACH
@isolated
def test_state_of_a_frozen_parameter_does_no_harm(cls, options):
    opt, (_, q, _) = make(cls, options, steps=2)
    good = opt.state.get(q)
    q.grad = None
    opt.state[q] = {"anything": ones(3), "step": "x"}
    data = [v for v, _ in values(opt)]
    opt.step()
    assert [a == v for a, (v, _) in zip(data, values(opt), strict=True)] == [False, True, False]
    q.grad = np.float32(1)
    if good is None:
        del opt.state[q]
    else:
        opt.state[q] = good
    steps_right(opt)


@EACH
@isolated
def test_no_elements_then_some_with_a_broadcast_gradient(cls, options):
    """The private copy of a gradient is made for the shape that there is now."""
    opt, (p, q) = make(cls, options, [(0, 3), (5,)], steps=0)
    opt.step(grads=[np.broadcast_to(np.float32(1), (0, 3)), q.grad])
    opt.state.pop(p, None)
    p.data = random((1, 3))
    steps_right(opt, [np.broadcast_to(np.float32(1), (1, 3)), q.grad])


@EACH
@isolated
def test_pruned_with_a_transposed_gradient(cls, options):
    opt, (p, q) = make(cls, options, [(4, 3), (5,)], steps=0)
    opt.step(grads=[random((3, 4)).T, q.grad])
    opt.state.pop(p, None)
    for rows in 2, 6, 1, 500, 4:
        p.data = random((rows, 3), seed=rows)
        opt.state.pop(p, None)
        steps_right(opt, [random((3, rows), seed=2).T, q.grad])


@EACH
@isolated
def test_order_of_the_parameter_changes_under_a_kept_gradient(cls, options):
    opt, (p, _q) = make(cls, options, [(4, 3), (5,)], steps=0)
    g = random((3, 4), seed=3).T
    for data in random((4, 3)), np.asfortranarray(random((4, 3))), random((4, 3)):
        p.data = data
        opt.state.pop(p, None)
        p.grad = g
        steps_right(opt)
    in_place(g, strides=(12, 4))
    steps_right(opt)


@isolated
def test_order_of_the_parameter_changes_under_a_copied_gradient():
    """The private copy lies in memory as the parameter does now."""
    p = Parameter(random((4, 4)))
    opt = SGD([p], lr=0.5)
    for order in "CFC":
        p.data = random((4, 4)).copy(order)
        p.grad = random((4, 8), seed=3)[:, ::2]
        steps_right(opt)


@EACH
@isolated
def test_gradient_changed_in_place(cls, options):
    """Shape, strides, dtype and memory of one gradient object that stays."""
    opt, (p, q) = make(cls, options, [(4, 4), (5,)])
    g = p.grad = random((4, 4), seed=3)
    in_place(g, strides=(4, 16))
    steps_right(opt)
    in_place(g, strides=(16, 4), shape=(16,))
    refused(opt, opt.step, ValueError, ["parameter 0", "(16,)"])
    in_place(g, dtype="int32")
    refused(opt, opt.step, (TypeError, ValueError), ["parameter 0"])
    in_place(g, dtype="float32", shape=(4, 4))
    steps_right(opt)
    q.grad.resize(500_000, refcheck=False)
    refused(opt, opt.step, ValueError, ["parameter 1"])
    q.grad.resize(5, refcheck=False)
    steps_right(opt)


# --- what is let go is freed


@WITH_STATE
def test_state_that_is_let_go_is_freed(cls, options):
    opt, (p, q, r) = make(cls, options, steps=2)
    refs = [weakref.ref(opt.state[p][k]) for k in array_keys(opt, p)]
    del opt.state[p]
    p.grad = None
    assert all(ref() is None for ref in refs)
    opt.step()
    opt.state.clear()
    refs = [weakref.ref(q.data), weakref.ref(r.data)]
    q.data, r.data, q.grad, r.grad = random(()), random(5), None, None
    gc.collect()
    assert all(ref() is None for ref in refs)


@EACH
def test_everything_that_is_let_go_is_freed(cls, options):
    """Parameter, data, gradient, state, group: at once, without another step."""
    opt, (p, _q, r) = make(cls, options, steps=2)
    opt.add_param_group({"params": [Parameter(random(9), random(9))]})
    opt.step()
    group = opt.param_groups[1]
    s = group["params"][0]
    refs = [weakref.ref(x) for x in (s, s.data, s.grad)]
    refs += [weakref.ref(opt.state[s][k]) for k in array_keys(opt, s)] if s in opt.state else []
    del opt.param_groups[1]
    opt.state.pop(s, None)
    del s, group
    gc.collect()
    assert all(ref() is None for ref in refs)
    refs = [weakref.ref(x) for x in (r, r.data)]
    opt.state.pop(r, None)
    opt.param_groups[0]["params"].pop()
    del r
    gc.collect()
    assert all(ref() is None for ref in refs)
    refs = [weakref.ref(p.data), weakref.ref(p.grad)]
    p.data, p.grad = random((3, 4), seed=3), random((3, 4), seed=4)
    assert all(ref() is None for ref in refs)
    steps_right(opt)


@EACH
def test_nothing_is_held_by_a_failed_step(cls, options):
    opt, (p, _q, r) = make(cls, options, steps=1)
    p.data, r.grad = random((3, 4), seed=7), ones(4, np.float32)
    state = [opt.state[p][k] for k in array_keys(opt, p)] if p in opt.state else []
    refs = [weakref.ref(x) for x in (p.data, r.grad, *state)]
    try:
        opt.step()
        raise AssertionError("must raise")
    except ValueError:
        pass
    del state
    p.data, r.grad = random((3, 4), seed=8), random(5)
    opt.state.pop(p, None)
    gc.collect()
    assert all(ref() is None for ref in refs)
    opt.state.clear()
    steps_right(opt)


# --- threads


def test_threads_that_cannot_start_are_an_error():
    out = in_process("""
import numpy as np, pyopt
a = np.ones(4_000_000, np.float32)
o = pyopt.SGD([a], lr=1.0)
for n in (32767, 100_000, 2**31 - 1, 2**31, 2**40, 2**70):
    before = pyopt.get_num_threads()
    try:
        pyopt.set_num_threads(n)
        for _ in range(3): o.step(grads=[np.zeros(4_000_000, np.float32)])
    except (ValueError, RuntimeError, OverflowError) as e:
        assert str(n) in str(e), e
    pyopt.set_num_threads(before)
o.step(grads=[np.ones(4_000_000, np.float32)])
print((a == 0).all())
""")
    assert out == "True\n"


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_NPROC"])
def test_threads_under_a_limit_of_the_process(limit):
    """A number that this process may not start: an error or fewer threads, not the end."""
    code = f"""
import resource, numpy as np, pyopt
a, g = np.ones(4_000_000, np.float32), np.ones(4_000_000, np.float32)
o = pyopt.SGD([a], lr=1.0)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.{limit}, ((size + (100 << 20),) * 2 if {limit == "RLIMIT_AS"} else (1, 1)))
moved = 0
for n in (64, 256, 1000, 2):
    try:
        pyopt.set_num_threads(n)
        o.step(grads=[g])
        moved += 1
    except (ValueError, RuntimeError) as e:
        assert str(n) in str(e), e
pyopt.set_num_threads(1)
o.step(grads=[g])
print((a == -moved).all())
"""
    assert in_process(code, OPENBLAS_NUM_THREADS="1") == "True\n"


def test_blocks_of_thread_numbers_that_overlap_in_threads():
    out = in_process("""
import threading, pyopt
pyopt.set_num_threads(2)
inside, leave = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]
def block(i, n):
    with pyopt.num_threads(n):
        inside[i].set()
        assert leave[i].wait(30)
threads = [threading.Thread(target=block, args=(i, n)) for i, n in enumerate((3, 4))]
for i in range(2):  # the first goes in, the second goes in, the first leaves, the second leaves
    threads[i].start()
    assert inside[i].wait(30)
for i in range(2):
    leave[i].set()
    threads[i].join()
print(pyopt.get_num_threads())
""")
    assert out == "2\n"


def test_from_which_size_threads_pay_is_the_same_on_a_busy_machine():
    code = """
import numpy as np, pyopt
with pyopt.num_threads(2):
    a = np.ones(2_000_000, np.float32)
    o = pyopt.Adam([a])
    for _ in range(5): o.step(grads=[a.copy()])
    pyopt.show_config()
"""

    def decision():
        lines = [line for line in in_process(code).splitlines() if "parallel" in line]
        assert lines, "show_config names the size from which threads pay"
        return float(lines[0].split()[-1])

    quiet = decision()
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    try:
        busy = [decision() for _ in range(3)]
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert all(0 <= x <= 2 * max(quiet, 1) for x in busy), (quiet, busy)


# ------------------------------------------------------------------------------------------------------- E. numbers

HUGE = [
    *((cls, {"lr": 1e39}, ["lr"]) for cls in (SGD, Adam, AdamW, RMSprop, Adagrad, Lion)),
    (Adam, {"lr": 1e38}, ["lr"]),  # lr / (1 - beta1) of the first step
    (Adam, {"lr": 1e37, "betas": (0.999, 0.999)}, ["lr"]),
    (AdamW, {"lr": 1e38, "weight_decay": 0.0}, ["lr"]),
    (SGD, {"weight_decay": 1e39}, ["weight_decay"]),
    (SGD, {"momentum": 1e39}, ["momentum"]),
    (SGD, {"momentum": 0.9, "dampening": -1e39}, []),
    (Adam, {"weight_decay": 1e300}, ["weight_decay"]),
    (AdamW, {"lr": 1e20, "weight_decay": 1e20}, ["weight_decay"]),
    (Lion, {"lr": 1e20, "weight_decay": 1e20}, ["weight_decay"]),
    (Lion, {"lr": 1.0, "weight_decay": 1e39}, ["weight_decay"]),
    (RMSprop, {"weight_decay": 1e39}, ["weight_decay"]),
    (RMSprop, {"momentum": 1e39}, ["momentum"]),
    *((cls, {"eps": 1e39}, ["eps"]) for cls in (Adam, AdamW, RMSprop, Adagrad)),
    (Adagrad, {"weight_decay": 1e39}, ["weight_decay"]),
    (Adagrad, {"initial_accumulator_value": 1e39}, ["initial_accumulator_value"]),
]
TINY = [
    *((cls, {"eps": 1e-50}, ["eps"]) for cls in (Adam, AdamW, RMSprop, Adagrad)),
    *((cls, {"lr": 1e-50}, ["lr"]) for cls in (SGD, Adam, AdamW, RMSprop, Adagrad, Lion)),
    (SGD, {"weight_decay": 1e-50}, ["weight_decay"]),
    (SGD, {"momentum": 1e-50}, ["momentum"]),
    (Adam, {"eps": 1e-46}, ["eps"]),
]
LIMITS = [*HUGE, *TINY]
LIMIT_IDS = ["-".join([c.__name__, *(f"{k}={v}" for k, v in o.items())]).replace(" ", "") for c, o, _ in LIMITS]


@pytest.mark.parametrize("where", ["constructor", "group", "later"])
@pytest.mark.parametrize("cls, options, words", LIMITS, ids=LIMIT_IDS)
@isolated
def test_option_beyond_the_type_of_the_parameter(cls, options, words, where):
    """inf, or a positive number that becomes 0: refused before anything changes. float64 holds it."""
    p = Parameter(ones(2, np.float32), np.array([0, 1], np.float32))
    q = Parameter(ones(3), ones(3))

    def build():
        if where == "constructor":
            return cls([p], **options)
        if where == "group":
            return cls([{"params": [p], **options}])
        return cls([p])

    opt = None
    try:
        opt = build()
        if where == "later":
            opt.step()
            good, before = dict(opt.param_groups[0]), values(opt)
            if {"initial_accumulator_value", "momentum"} & options.keys():  # options that begin with the state
                opt.state.clear()
            opt.param_groups[0].update(options)
            before = values(opt)
        else:
            before = values(opt)
        for _ in range(2):
            with pytest.raises(ValueError) as caught:
                opt.step()
            assert values(opt) == before
            assert all(word in str(caught.value) for word in words), caught.value
        if where == "later":
            opt.param_groups[0].update(good)
            steps_right(opt)
        wide = cls([q], **options)
        if not any(abs(v) > 1e100 for v in options.values() if isinstance(v, float)):
            steps_right(wide)
    except ValueError as error:
        assert opt is None and where != "later", error
        assert all(word in str(error) for word in words), error


@isolated
def test_option_that_one_parameter_of_a_group_cannot_hold():
    wide, narrow = Parameter(ones(2), ones(2)), Parameter(ones(2, np.float32), ones(2, np.float32))
    try:
        opt = SGD([wide, narrow], lr=1e39)
    except ValueError as error:
        assert "lr" in str(error)
        return
    refused(opt, opt.step, ValueError, ["lr"])
    refused(opt, opt.step, ValueError, ["lr"])
    narrow.grad = None
    steps_right(opt)


@pytest.mark.parametrize("dtype, lr", [("float32", 1e38), ("float32", 1e-45), ("float64", 1e300), ("float64", 5e-324)])
@isolated
def test_option_at_the_limit_of_the_type(dtype, lr):
    steps_right(SGD([Parameter(ones(2, dtype), np.array([0, 1e-3], dtype))], lr=lr), steps=1)


@isolated
def test_option_overflows_only_in_double():
    """lr / (1 - beta1) beyond float64 itself."""
    opt = Adam([Parameter(ones(2), np.array([0.0, 1.0]))], lr=1.7e308)
    refused(opt, opt.step, ValueError, ["lr"])


@isolated
def test_zero_options_stay_legal():
    for cls, options in [(Adam, {"lr": 0, "eps": 0}), (SGD, {"lr": 0.0}), (Adagrad, {"eps": 0}), (Lion, {"lr": 0})]:
        steps_right(cls([Parameter(ones(2, np.float32), ones(2, np.float32))], **options))


@pytest.mark.parametrize("count", [2**63 - 1, 2**63 - 2, 2**63 - 3, 2**62, 2**53, 2**53 - 1])
@pytest.mark.parametrize("where", ["live", "loaded"])
@pytest.mark.parametrize("cls, options", [k for k in KINDS if k[0] in (Adam, AdamW, RMSprop, Adagrad)][:4])
@isolated
def test_step_count_at_its_end(cls, options, where, count):
    """What is taken can be stepped from, saved and loaded; the end is a clear error, not a trap one step later."""
    opt, (p, *_) = make(cls, options)
    saved = opt.state_dict()
    saved["state"][0]["step"] = count

    def named(error):
        return all(word in str(error) for word in ("step", "parameter 0"))

    try:
        if where == "loaded":
            opt.load_state_dict(saved)
        else:
            opt.state[p]["step"] = count
    except ValueError as error:
        assert named(error) and str(count) in str(error)
    for _ in range(3):
        before, reached = values(opt), opt.state[p]["step"]
        try:
            opt.step()
        except ValueError as error:
            assert named(error) and str(reached) in str(error)
            assert values(opt) == before
        else:
            assert opt.state[p]["step"] == reached + 1
    opt.state[p]["step"] = 3
    steps_right(opt)


# ---------------------------------------------------------------------------------------------- F. what a user meant

TREE = {"w": (2, 2), "head": {"b": (2, 2), "a": (2, 2)}, "layers": [(2, 2), {"k": (2, 2)}]}
NAMES = ["w", "head.b", "head.a", "layers.0", "layers.1.k"]


def build(tree, seed=0):
    """Arrays in the form of a tree, different ones of one shape."""
    if isinstance(tree, dict):
        return {k: build(v, seed + 10 * i + 1) for i, (k, v) in enumerate(tree.items())}
    if isinstance(tree, list):
        return [build(v, seed + 100 * i + 1) for i, v in enumerate(tree)]
    return random(tree, seed=seed)


def flat(tree, name=""):
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {n: a for k, v in pairs for n, a in flat(v, f"{name}.{k}" if name else str(k)).items()}
    return {name: tree}


def reordered(tree):
    """Keys sorted, as JAX gives them back."""
    if isinstance(tree, dict):
        return {k: reordered(tree[k]) for k in sorted(tree)}
    return [reordered(v) for v in tree] if isinstance(tree, list) else tree


@EACH
def test_gradients_by_name_whatever_their_order(cls, options):
    params, twins = build(TREE), flat(build(TREE))
    opt, twin = cls(params, **options), cls(list(twins.values()), **options)
    for i in range(3):
        grads = build(TREE, 1000 + i)
        opt.step(grads=reordered(grads) if i else grads)
        twin.step(grads=list(flat(grads).values()))
        assert values(opt) == values(twin)
    assert list(flat(params)) == NAMES
    for name, array in flat(params).items():
        assert array.tobytes() == twins[name].tobytes()


def test_gradients_by_dotted_name():
    params = build(TREE)
    opt = SGD(params, lr=1.0)
    twin = SGD(list(flat(build(TREE)).values()), lr=1.0)
    grads = flat(build(TREE, 7))
    opt.step(grads=dict(sorted(grads.items())))
    twin.step(grads=list(grads.values()))
    assert values(opt) == values(twin)


def test_gradients_by_name_of_named_pairs_and_groups():
    a, b, c = (np.zeros(2) for _ in range(3))
    opt = SGD([{"params": [("a", a), ("b", b)]}, {"params": [("c", c)], "lr": 2.0}], lr=1.0)
    opt.step(grads={"c": ones(2), "b": 3 * ones(2), "a": ones(2)})
    assert [x.tolist() for x in (a, b, c)] == [[-1, -1], [-3, -3], [-2, -2]]


@pytest.mark.parametrize("form", ["tree", "dotted"])
def test_none_for_none_by_name(form):
    params = build(TREE)
    before = {k: v.copy() for k, v in flat(params).items()}
    opt = Adam(params)
    grads = build(TREE, 3)
    grads["head"]["b"] = None
    opt.step(grads=flat(grads) if form == "dotted" else grads)
    assert [k for k, v in flat(params).items() if np.array_equal(v, before[k])] == ["head.b"]
    assert 1 not in opt.state_dict()["state"]


@pytest.mark.parametrize("missing", NAMES)
def test_missing_name_is_listed(missing):
    opt = Adam(build(TREE))
    grads = flat(build(TREE, 3))
    del grads[missing]
    refused(opt, lambda: opt.step(grads=grads), (KeyError, ValueError), [missing])


@pytest.mark.parametrize("unknown", ["W", "head.c", "layers.2", "layers.-1", "head", ""])
def test_unknown_name_is_listed(unknown):
    opt = Adam(build(TREE))
    grads = flat(build(TREE, 3))
    grads[unknown] = random((2, 2))
    refused(opt, lambda: opt.step(grads=grads), (KeyError, TypeError, ValueError), [unknown])


def test_grads_of_another_form():
    for change in (
        lambda g: g["layers"].pop(),
        lambda g: g["layers"].append(random((2, 2))),
        lambda g: g.update(head=random((2, 2))),
        lambda g: g.update(w={"x": random((2, 2))}),
        lambda g: g.update(layers=dict(enumerate(g["layers"][:1]))),
        lambda g: g["head"].clear(),
    ):
        opt = Adam(build(TREE))
        grads = build(TREE, 3)
        change(grads)
        refused(opt, lambda opt=opt, grads=grads: opt.step(grads=grads), (KeyError, TypeError, ValueError))


@pytest.mark.parametrize("view", ["values", "keys", "items"])
def test_grads_in_the_order_of_a_dict_are_refused(view):
    """JAX sorts keys: the order of values() is not that of the parameters."""
    params = {"w": np.zeros(2), "b": np.zeros(2)}
    opt = SGD(params.values(), lr=1.0)
    grads = {"b": ones(2), "w": 2 * ones(2)}
    refused(opt, lambda: opt.step(grads=getattr(grads, view)()), TypeError, ["grads"])
    named = SGD(params, lr=1.0)
    refused(named, lambda: named.step(grads=getattr(grads, view)()), TypeError, ["grads"])
    named.step(grads=grads)
    assert params["w"].tolist() == [-2, -2] and params["b"].tolist() == [-1, -1]


def test_grads_in_no_order_are_refused():
    a = np.zeros(())
    opt = SGD([a], lr=1.0)
    for grads in ({np.float64(1)}, frozenset({np.float64(1)})):
        refused(opt, lambda grads=grads: opt.step(grads=grads), TypeError, ["grads"])


def test_grads_by_name_for_parameters_without_names():
    opt = SGD([np.zeros(2), np.zeros(2)], lr=1.0)
    refused(opt, lambda: opt.step(grads={"a": ones(2), "b": ones(2)}), (KeyError, TypeError, ValueError))


def test_mapping_that_is_no_dict():
    import collections
    import types

    a, b = np.zeros(2), np.zeros(2)
    opt = SGD(types.MappingProxyType({"a": a, "b": b}), lr=1.0)
    opt.step(grads=collections.OrderedDict(b=ones(2), a=2 * ones(2)))
    opt.step(grads=types.MappingProxyType({"b": ones(2), "a": 2 * ones(2)}))
    assert a.tolist() == [-4, -4] and b.tolist() == [-2, -2]


def test_items_are_taken():
    a, b = np.zeros(2), np.zeros(2)
    opt = SGD({"a": a, "b": b}.items(), lr=1.0)
    opt.step(grads=[ones(2), 2 * ones(2)])
    opt.step(grads={"b": ones(2), "a": ones(2)})
    assert a.tolist() == [-2, -2] and b.tolist() == [-3, -3]


def test_state_of_named_parameters_is_saved_by_index_and_loaded():
    opt = Adam(build(TREE))
    opt.step(grads=build(TREE, 3))
    new = Adam(build(TREE))
    new.load_state_dict(opt.state_dict())
    assert [s for _, s in values(new)] == [s for _, s in values(opt)]


@EACH
def test_bare_arrays_without_grads(cls, options):
    opt = cls([ones(3), ones(2)], **options)
    errors = (TypeError, ValueError, RuntimeError)
    for _ in range(2):
        refused(opt, opt.step, errors, ["grads"])
        refused(opt, lambda: opt.step(lambda: 3.0), errors, ["grads"])
    steps_right(opt, [ones(3), None])
    refused(opt, opt.step, errors, ["grads"])


def test_step_of_a_list_of_gradients():
    a = ones(3)
    opt = SGD([a], lr=1.0)
    for wrong in ([ones(3)], (ones(3),), ones(3), {"a": ones(3)}):
        refused(opt, lambda wrong=wrong: opt.step(wrong), TypeError, ["grads"])


# --- checkpoints in plain numbers


@EACH
def test_state_dict_holds_plain_numbers(cls, options):
    opt = cls([Parameter(random(3), random(3, seed=1))], **{k: np.float64(v) if type(v) is float else v
                                                            for k, v in options.items()})  # fmt: skip
    opt.step()
    group = opt.param_groups[0]
    group["lr"] = np.float32(0.25)
    if "betas" in group:
        group["betas"] = (np.float64(0.5), np.float32(0.75))
    opt.step()
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        for key, value in group.items():
            assert type(value) in (int, float, bool, list, tuple), (key, value)
            for each in value if isinstance(value, list | tuple) else ():
                assert type(each) in (int, float), (key, value)
    for state in saved["state"].values():
        for key, value in state.items():
            assert type(value) is (int if key == "step" else np.ndarray), (key, value)


def through_npz(saved):
    """As one writes it: a flat dict of arrays. Every number comes back as a 0-d array, every index as a string."""
    arrays = {f"state/{i}/{k}": v for i, state in saved["state"].items() for k, v in state.items()}
    for i, group in enumerate(saved["param_groups"]):
        arrays |= {f"groups/{i}/{k}": v for k, v in group.items()}
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    new = {"state": {}, "param_groups": []}
    for name, value in np.load(file).items():
        kind, i, key = name.split("/")
        if kind == "state":
            new["state"].setdefault(i, {})[key] = value
        else:
            while len(new["param_groups"]) <= int(i):
                new["param_groups"].append({})
            new["param_groups"][int(i)][key] = value
    return new


def through_json(saved):
    """Numbers as JSON has them, the arrays beside it."""
    arrays = {(str(i), k): v for i, s in saved["state"].items() for k, v in s.items() if isinstance(v, np.ndarray)}
    plain = {i: {k: v for k, v in s.items() if not isinstance(v, np.ndarray)} for i, s in saved["state"].items()}
    new = json.loads(json.dumps({**saved, "state": plain}))
    for (i, k), v in arrays.items():
        new["state"][i][k] = v
    return new


def with_floats(saved):
    new = copy.deepcopy(saved)
    for state in new["state"].values():
        if "step" in state:
            state["step"] = float(state["step"])
    return new


@pytest.mark.parametrize("way", [through_npz, through_json, with_floats])
@EACH
def test_state_dict_out_of_a_file(cls, options, way):
    opt, _ = make(cls, options, steps=3)
    saved = way(opt.state_dict())
    new, _ = make(cls, {}, steps=0)
    for p, q in zip(params_of(new), params_of(opt), strict=True):
        p.data[...] = q.data
    new.load_state_dict(saved)
    assert values(new) == values(opt)
    for key, value in opt.param_groups[0].items():
        if key != "params":
            loaded = new.param_groups[0][key]
            assert (tuple(loaded) if isinstance(value, tuple) else loaded) == value
    for key, value in new.state_dict()["param_groups"][0].items():
        assert not isinstance(value, np.ndarray | np.generic), key
    steps_right(new)


@pytest.mark.parametrize("step", [1.5, np.array(1.5), np.array([1]), np.nan, np.array(True), "3", -1.0, np.array(-1)])
def test_step_count_out_of_a_file_that_is_none(step):
    opt, _ = make(Adam)
    saved = opt.state_dict()
    saved["state"][1]["step"] = step
    refused(opt, lambda: opt.load_state_dict(saved), (TypeError, ValueError), ["step", "parameter 1"])


@pytest.mark.parametrize("index", ["3", "-1", "1.0", " 1", 1.5, None])
def test_index_out_of_a_file_that_is_none(index):
    opt, _ = make(Adam)
    saved = opt.state_dict()
    saved["state"][index] = saved["state"].pop(1)
    refused(opt, lambda: opt.load_state_dict(saved), (TypeError, ValueError, KeyError), [str(index)])


def test_index_twice_as_number_and_as_string():
    opt, _ = make(Adam)
    saved = opt.state_dict()
    saved["state"]["1"] = saved["state"][2]
    refused(opt, lambda: opt.load_state_dict(saved), (TypeError, ValueError, KeyError), ["1"])


# --- a user's own group keys and state entries

OWN_KEYS = {"name": "decoder", "lr_scale": 0.5, "layer_id": 3, "initial_lr": 0.1, "note": None, "tags": ["a", "b"]}


@EACH
def test_own_group_keys(cls, options):
    """Kept, saved, loaded, copied; without effect."""
    p, q = Parameter(random(3), random(3, seed=1)), Parameter(random(3), random(3, seed=1))
    opt = cls([{"params": [p], **OWN_KEYS}, {"params": [q]}], **options)
    opt.param_groups[1]["depth"] = 2
    steps_right(opt)
    assert p.data.tobytes() == q.data.tobytes()
    assert {k: opt.param_groups[0][k] for k in OWN_KEYS} == OWN_KEYS
    saved = opt.state_dict()
    assert {k: saved["param_groups"][0][k] for k in OWN_KEYS} == OWN_KEYS and saved["param_groups"][1]["depth"] == 2
    saved["param_groups"][0]["lr_scale"] = 0.25
    fresh = cls([{"params": [random(3)]}, {"params": [random(3)]}])
    for new in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), fresh):
        new.load_state_dict(saved)
        assert {k: new.param_groups[0][k] for k in OWN_KEYS} == {**OWN_KEYS, "lr_scale": 0.25}
        assert new.param_groups[1]["depth"] == 2
    opt.add_param_group({"params": [ones(2, np.float32)], "name": "new"})
    assert opt.param_groups[2]["name"] == "new"


def test_own_group_keys_are_saved_apart():
    opt, _ = make(SGD)
    opt.param_groups[0]["tags"] = tags = ["a"]
    saved = opt.state_dict()
    tags.append("b")
    assert saved["param_groups"][0]["tags"] == ["a"]
    opt.load_state_dict(saved)
    saved["param_groups"][0]["tags"].append("c")
    assert opt.param_groups[0]["tags"] == ["a"]


CLOSE = [
    (SGD, "wieght_decay", "weight_decay"),
    (SGD, "weight_deacy", "weight_decay"),
    (SGD, "weightdecay", "weight_decay"),
    (SGD, "momentun", "momentum"),
    (SGD, "dampning", "dampening"),
    (SGD, "nestrov", "nesterov"),
    (Adam, "beta", "betas"),
    (Adam, "bettas", "betas"),
    (AdamW, "epss", "eps"),
    (Adam, "amsgrads", "amsgrad"),
    (Adam, "maximise", "maximize"),
    (RMSprop, "centred", "centered"),
    (Adagrad, "lr_decy", "lr_decay"),
    (Lion, "Lr", "lr"),
]


@pytest.mark.parametrize("cls, key, meant", CLOSE)
def test_group_key_close_to_an_option(cls, key, meant):
    with pytest.raises((KeyError, ValueError)) as caught:
        cls([{"params": [ones(3)], key: 0.1}])
    assert key in str(caught.value) and meant in str(caught.value)
    opt = cls([Parameter(ones(3), ones(3))])
    opt.param_groups[0][key] = 0.1
    refused(opt, opt.step, (KeyError, ValueError), [key, meant])
    del opt.param_groups[0][key]
    saved = opt.state_dict()
    saved["param_groups"][0][key] = 0.1
    refused(opt, lambda: opt.load_state_dict(saved), (KeyError, ValueError), [key, meant])
    refused(opt, lambda: opt.add_param_group({"params": [ones(2)], key: 0.1}), (KeyError, ValueError), [key, meant])
    assert len(opt.param_groups) == 1
    steps_right(opt)


@EACH
def test_own_state_entries(cls, options):
    """Kept by steps, saved, loaded back, copied: Lookahead's slow weights, say."""
    opt, (p, _q, _) = make(cls, options)
    extra = {"slow": random((3, 4), seed=5), "count": 7, "note": "x", "nested": {"a": [1, 2]}}
    opt.state[p].update(extra) if p in opt.state else opt.state.__setitem__(p, dict(extra))
    slow = extra["slow"].copy()
    steps_right(opt)
    assert all(opt.state[p][k] is v for k, v in extra.items()) and np.array_equal(extra["slow"], slow)
    saved = opt.state_dict()
    assert np.array_equal(saved["state"][0]["slow"], slow) and saved["state"][0]["nested"] == {"a": [1, 2]}
    extra["slow"] += 1
    opt.state[p]["count"] = 9
    opt.load_state_dict(saved)
    assert np.array_equal(opt.state[p]["slow"], slow) and opt.state[p]["count"] == 7 and opt.state[p]["note"] == "x"
    assert not np.may_share_memory(opt.state[p]["slow"], saved["state"][0]["slow"])
    new, _ = make(cls, options, steps=0)
    new.load_state_dict(saved)
    assert np.array_equal(new.state[params_of(new)[0]]["slow"], slow)
    steps_right(new)
    for each in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert np.array_equal(each.state[params_of(each)[0]]["slow"], slow)
        steps_right(each)


@EACH
@isolated
def test_own_state_entries_before_the_first_step(cls, options):
    opt, (p, q, _) = make(cls, options, steps=0)
    for each in (p, q):
        entry = opt.state[each] if each in opt.state else opt.state.setdefault(each, {})
        entry["slow"] = each.data.copy()
    twin, _ = make(cls, options, steps=0)
    for _ in range(3):
        opt.step()
        twin.step()
    assert [v for v, _ in values(opt)] == [v for v, _ in values(twin)]
    assert "slow" in opt.state[p]
    assert [set(s) - {"slow"} for _, s in values(opt)] == [set(s) for _, s in values(twin)]


def test_entry_of_the_state_that_belongs_to_no_parameter():
    opt, _ = make(Adam)
    opt.state["global"] = {"k": 3}
    steps_right(opt)


# --- copies and hooks


def note(*args):
    NOTED.append(args[0])


NOTED: list = []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))],
                         ids=["deepcopy", "copy", "pickle"])  # fmt: skip
def test_hooks_are_left_behind_in_copies(duplicate):
    """As in torch; so a local function as a hook does not stand in the way of a pickle."""
    opt, _ = make(SGD, {"lr": 0.1})
    seen = []
    for register in (
        opt.register_step_pre_hook,
        opt.register_step_post_hook,
        opt.register_state_dict_pre_hook,
        opt.register_state_dict_post_hook,
        opt.register_load_state_dict_pre_hook,
        opt.register_load_state_dict_post_hook,
    ):
        register(lambda o, *args: seen.append(o))
        register(note)
    NOTED.clear()
    new = duplicate(opt)
    new.step()
    new.load_state_dict(new.state_dict())
    assert seen == [] and NOTED == []
    new.register_step_post_hook(note)  # and can be given to the copy
    new.step()
    assert [x is new for x in NOTED] == [True] and seen == []
    opt.step()
    assert len(seen) == 2 and all(x is opt for x in seen)


# --- Parameter as what it looks like


@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2), (5,)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameter_tells_its_array(shape, dtype):
    p = Parameter(random(shape, dtype))
    assert (p.shape, p.dtype, p.ndim, p.size) == (p.data.shape, p.data.dtype, p.data.ndim, p.data.size)
    array = np.asarray(p)
    assert array.dtype == dtype and array.shape == shape and array.tobytes() == p.data.tobytes()
    assert np.shares_memory(array, p.data) or not array.size
    assert np.asarray(p, np.float64).dtype == np.float64
    assert not np.may_share_memory(np.array(p), p.data) or not array.size
    assert not np.shares_memory(np.array(p, copy=True), p.data)
    if shape:
        assert len(p) == shape[0]
    else:
        with pytest.raises(TypeError):
            len(p)


def test_parameter_in_functions_of_numpy():
    p = Parameter(np.array([1.0, 2.0]))
    assert np.stack([p, p]).shape == (2, 2) and np.allclose(p, [1, 2])


@pytest.mark.parametrize(
    "expression",
    ["p + 1", "1 + p", "p - x", "x - p", "p * 2", "2 * p", "x @ p", "p @ x", "p / 2", "2 / p", "-p", "p ** 2", "p[0]"],
)
def test_arithmetic_with_a_parameter_says_what_to_do(expression):
    scope = {"p": Parameter(np.ones(3), name="w"), "x": np.ones(3)}
    with pytest.raises(TypeError, match=r"\.data"):
        eval(expression, scope)


def test_parameter_in_place_arithmetic_does_not_rebind_silently():
    p = q = Parameter(np.ones(3), name="w")
    with pytest.raises(TypeError, match=r"\.data"):
        p += 1
    assert p is q and q.data.tolist() == [1, 1, 1]


def test_parameters_compare_and_hash_by_identity():
    p, q = Parameter(np.ones(3)), Parameter(np.ones(3))
    assert p == p and p != q and len({p, q}) == 2 and [q, p].index(p) == 1


# --- what is shipped and said


def test_the_documentation_names_what_jax_needs():
    text = (Path(__file__).parent.parent / "docs" / "how_to" / "numpy_loop.md").read_text()
    assert "block_until_ready" in text


# --- rule and state are tied where the class is made


@pytest.mark.parametrize("names", [["exp_avg"], ["exp_avg_sq", "exp_avg", "max_exp_avg_sq"], [], ["exp_avg", "v", "w"],
                                   ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "fourth"]], ids=len)  # fmt: skip
@isolated
def test_state_names_that_do_not_fit_the_rule(names):
    """Too few, swapped, others, too many: an error where the class is made, or at the latest the optimizer."""
    with pytest.raises((TypeError, ValueError)):

        class Wrong(Adam):
            state_names = dict.fromkeys(names)

        Wrong([ones(3)])


# --- a user's own rule


@isolated
def test_own_rule_that_fails_half_way_leaves_nothing_and_can_go_on():
    class Half(Optimizer):
        def update(self, p, g, state, group):
            state["n"] = state.get("n", 0) + 1
            p -= group["lr"] * g
            state.setdefault("sum", np.zeros_like(p))[...] += p
            if self.fail and p is params[1].data:
                raise ArithmeticError

    params = [Parameter(np.zeros(3), ones(3)) for _ in range(2)]
    opt = Half(params, {"lr": 1.0})
    for steps in range(3):
        before, opt.fail = values(opt), True
        with pytest.raises(ArithmeticError):
            opt.step()
        assert values(opt) == before
        opt.fail = False
        opt.step()
        assert [p.data.tolist() for p in params] == [[-1.0 - steps] * 3] * 2
        assert [opt.state[p]["n"] for p in params] == [1 + steps] * 2
