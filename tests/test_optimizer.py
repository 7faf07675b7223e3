"""What an optimizer does around its rule: groups, state, checkpoints, copies, hooks, and arrays of every kind.

The rules themselves are tested elsewhere: here two ways to the same result are compared, bit for bit.
"""

import copy
import gc
import pickle
import sys
import weakref

import numpy as np
import pytest

from pyopt import SGD, Adagrad, Adam, AdamW, Lion, Optimizer, Parameter, RMSprop
from pyopt.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

DTYPES = ["float32", "float64"]


class Own(Optimizer):
    """A user's optimizer, in plain NumPy: g is read before and after p is written."""

    def __init__(self, params, lr=0.1, decay=0.9, maximize=False):
        super().__init__(params, {"lr": lr, "decay": decay, "maximize": maximize})

    def update(self, p, g, state, group):
        if not state:
            state["n"] = 0
            state["mean"] = np.zeros_like(p)
        state["n"] += 1
        state["mean"] *= group["decay"]
        state["mean"] += g
        sign = -1 if group["maximize"] else 1
        p -= sign * group["lr"] * state["mean"]
        p -= sign * group["lr"] / state["n"] * g


# (class, options, options that differ, state after a step in the order of its keys)
TABLE = [
    (SGD, {"lr": 0.1}, {"lr": 0.3, "weight_decay": 0.1}, []),
    (SGD, {"lr": 0.1, "momentum": 0.9}, {"momentum": 0.5, "maximize": True}, ["momentum_buffer"]),
    (
        SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "maximize": True},
        {"dampening": 0.5},
        ["momentum_buffer"],
    ),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"nesterov": False}, ["momentum_buffer"]),
    (Adam, {}, {"betas": (0.8, 0.9), "eps": 0.1}, ["step", "exp_avg", "exp_avg_sq"]),
    (
        Adam,
        {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
        {"amsgrad": False},
        ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    ),
    (
        Adam,
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"decoupled_weight_decay": False},
        ["step", "exp_avg", "exp_avg_sq"],
    ),
    (AdamW, {"lr": 0.1}, {"weight_decay": 0.5, "maximize": True}, ["step", "exp_avg", "exp_avg_sq"]),
    (AdamW, {"lr": 0.1, "amsgrad": True}, {"lr": 0.2}, ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
    (RMSprop, {}, {"alpha": 0.5}, ["step", "square_avg"]),
    (RMSprop, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5}, ["step", "square_avg", "momentum_buffer"]),
    (RMSprop, {"centered": True, "maximize": True}, {"eps": 0.1}, ["step", "square_avg", "grad_avg"]),
    (
        RMSprop,
        {"momentum": 0.9, "centered": True},
        {"weight_decay": 0.1},
        ["step", "square_avg", "momentum_buffer", "grad_avg"],
    ),
    (Adagrad, {}, {"lr": 0.2}, ["step", "sum"]),
    (
        Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "maximize": True},
        {"lr_decay": 0.5, "eps": 0.1},
        ["step", "sum"],
    ),
    (Lion, {"lr": 0.1}, {"weight_decay": 0.5}, ["exp_avg"]),
    (Lion, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, {"betas": (0.5, 0.6)}, ["exp_avg"]),
    (Own, {}, {"decay": 0.5}, ["n", "mean"]),
]
IDS = ["-".join([row[0].__name__, *row[1]]) for row in TABLE]
CASES = pytest.mark.parametrize("cls, options", [row[:2] for row in TABLE], ids=IDS)
WITH_OTHER = pytest.mark.parametrize("cls, options, other", [row[:3] for row in TABLE], ids=IDS)
WITH_KEYS = pytest.mark.parametrize("cls, options, keys", [(row[0], row[1], row[3]) for row in TABLE], ids=IDS)
# One row, with much state, per class.
ONE = {row[0]: pytest.param(row[0], row[1], id=row[0].__name__) for row in TABLE if row[3]}
CLASSES = pytest.mark.parametrize("cls, options", ONE.values())
TYPES = pytest.mark.parametrize("dtype", DTYPES)


def random(shape, dtype="float32", seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def make(cls=Adam, options=None, dtype="float32", steps=0, shapes=((3, 4), (), (5,)), order="C"):
    """An optimizer of parameters with gradients, and the parameters."""
    params = []
    for i, shape in enumerate(shapes):
        params.append(Parameter(np.array(random(shape, dtype, i), order=order), random(shape, dtype, 50 + i)))
    opt = cls(params, **(options or {}))
    for _ in range(steps):
        opt.step()
    return opt, params


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def bits(x):
    """The value of an array, whatever its memory order, or of anything else."""
    return (x.dtype, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else (type(x), x)


def values(opt):
    """All numbers of an optimizer: parameters and state."""
    return [
        (bits(p.data), {k: bits(v) for k, v in opt.state[p].items()} if p in opt.state else {}) for p in params_of(opt)
    ]


def arrays(opt):
    return [a for p in params_of(opt) for a in [p.data, *opt.state.get(p, {}).values()] if isinstance(a, np.ndarray)]


def go_on(*opts, steps=3):
    """The optimizers take the same further steps and stay equal; they share no array that is written."""
    for i in range(steps):
        for opt in opts:
            for j, p in enumerate(params_of(opt)):
                p.grad = random(p.data.shape, p.data.dtype, 100 * i + j)
            opt.step()
        assert all(values(opt) == values(opts[0]) for opt in opts)
    for i, one in enumerate(opts):
        for other in opts[:i]:
            assert not any(np.may_share_memory(a, b) for a in arrays(one) for b in arrays(other) if a.size)


# -------------------------------------------------------------------------------------------------------------- groups


@TYPES
@WITH_OTHER
def test_groups_with_overrides(cls, options, other, dtype):
    """A group is what an optimizer of its own with these options is."""
    opt, _ = make(cls, options, dtype)
    first, second = (make(cls, options | extra, dtype)[0] for extra in ({}, other))
    p, q, r = params_of(make(cls, options, dtype)[0])
    both = cls([{"params": [p, q]}, {"params": r, **other}], **options)
    for _ in range(3):
        for o in (first, second, both, opt):
            o.step()
    assert values(both) == values(first)[:2] + values(second)[2:]
    assert values(opt) == values(first) != values(second)
    assert [len(group["params"]) for group in both.param_groups] == [2, 1]
    assert {k: both.param_groups[0][k] for k in options} == options
    assert {k: both.param_groups[1][k] for k in options | other} == options | other
    assert both.defaults == opt.defaults


@TYPES
@WITH_OTHER
def test_add_param_group(cls, options, other, dtype):
    """In mid-run: the new parameters begin with their own step 1, and with the defaults."""
    opt, _ = make(cls, options, dtype, steps=2)
    old, _ = make(cls, options, dtype, steps=5)
    new, _ = make(cls, options | other, dtype, steps=3, shapes=[(2, 3), (4,)])
    opt.param_groups[0]["lr"] = lr = opt.defaults["lr"]
    group = {"params": iter([Parameter(random(s, dtype, i), random(s, dtype, 50 + i)) for i, s in [(0, (2, 3))]])}
    opt.add_param_group(group | other)
    opt.add_param_group({"params": Parameter(random(4, dtype, 1), random(4, dtype, 51)), **other})
    for _ in range(3):
        opt.step()
    assert values(opt) == values(old) + values(new)
    assert [group["lr"] for group in opt.param_groups] == [lr] + [(options | other).get("lr", opt.defaults["lr"])] * 2


def test_new_groups_take_the_defaults():
    opt, _ = make(SGD, {"lr": 0.1, "momentum": 0.9})
    opt.param_groups[0]["lr"] = 5
    opt.add_param_group({"params": np.ones(3)})
    assert opt.param_groups[1]["lr"] == 0.1
    assert opt.param_groups[1]["momentum"] == 0.9


GROUP_KEYS = {
    SGD: "lr momentum dampening weight_decay nesterov maximize",
    Adam: "lr betas eps weight_decay amsgrad maximize decoupled_weight_decay",
    AdamW: "lr betas eps weight_decay amsgrad maximize decoupled_weight_decay",
    RMSprop: "lr momentum alpha eps centered weight_decay maximize",
    Adagrad: "lr lr_decay eps weight_decay initial_accumulator_value maximize",
    Lion: "lr betas weight_decay maximize",
    Own: "lr decay maximize",
}
DEFAULTS = {
    SGD: (1e-3, 0, 0, 0, False, False),
    Adam: (1e-3, (0.9, 0.999), 1e-8, 0, False, False, False),
    AdamW: (1e-3, (0.9, 0.999), 1e-8, 1e-2, False, False, True),
    RMSprop: (1e-2, 0, 0.99, 1e-8, False, 0, False),
    Adagrad: (1e-2, 0, 1e-10, 0, 0, False),
    Lion: (1e-4, (0.9, 0.99), 0, False),
    Own: (0.1, 0.9, False),
}


@pytest.mark.parametrize("cls", GROUP_KEYS)
def test_group_keys(cls):
    keys = GROUP_KEYS[cls].split()
    opt = cls([{"params": [np.ones(3)]}, {"params": [np.ones(3), np.ones(2)]}])
    expected = dict(zip(keys, DEFAULTS[cls], strict=True))
    assert opt.defaults == expected
    for group, indices in zip(opt.state_dict()["param_groups"], [[0], [1, 2]], strict=True):
        assert list(group) == [*keys, "params"]
        assert group == expected | {"params": indices}
    for group in opt.param_groups:
        assert {k: v for k, v in group.items() if k != "params"} == expected
        assert all(isinstance(p, Parameter) for p in group["params"])


def test_arguments_in_torchs_order():
    w = [np.ones(1)]
    opts = {
        SGD(w, 1, 2, 0, 4, True): (1, 2, 0, 4, True, False),
        Adam(w, 1, (0.2, 0.3), 4, 5, True): (1, (0.2, 0.3), 4, 5, True, False, False),
        AdamW(w, 1, (0.2, 0.3), 4, 5, True): (1, (0.2, 0.3), 4, 5, True, False, True),
        RMSprop(w, 1, 0.2, 3, 4, 5, True, True): (1, 5, 0.2, 3, True, 4, True),
        Adagrad(w, 1, 2, 3, 4, 5): (1, 2, 5, 3, 4, False),
        Lion(w, 1, (0.2, 0.3), 4): (1, (0.2, 0.3), 4, False),
    }
    for opt, expected in opts.items():
        assert opt.defaults == dict(zip(GROUP_KEYS[type(opt)].split(), expected, strict=True))


def test_kinds_of_params():
    """An ndarray becomes a Parameter that writes into it; generators and mixtures are taken."""
    a, p = np.ones(3), Parameter(np.ones(3))
    for params in ([a, p], (x for x in (a, p)), (a, p), {"a": a, "p": p}.values()):
        first, second = params_of(SGD(params, lr=0.5))
        assert first.data is a
        assert second is p
    SGD([a], lr=0.5).step(grads=[np.ones(3)])
    assert a.tolist() == [0.5] * 3
    big = np.ones(8, np.float32)  # neighbours, and views without elements, do not overlap
    opt = SGD([big[:3], big[3:7], big[3:3], big[7:].reshape(())], lr=0.5)
    opt.step(grads=[np.ones(3, np.float32), None, np.ones(0, np.float32), None])
    assert big.tolist() == [0.5] * 3 + [1] * 5


def test_float32_and_float64_together():
    opt, _ = make(Adam, {"lr": 0.1})
    wide, _ = make(Adam, {"lr": 0.1}, "float64")
    both = Adam([*params_of(make()[0]), *params_of(make(dtype="float64")[0])], lr=0.1)
    for o in (opt, wide, both):
        o.step()
        o.step()
    assert values(both) == values(opt) + values(wide)


# --------------------------------------------------------------------------------------------------------------- state


@TYPES
@WITH_KEYS
def test_state(cls, options, keys, dtype):
    for order in "C", "F":
        opt, params = make(cls, options, dtype, order=order, shapes=[(3, 4), (), (0, 2), (2, 3, 4)])
        if cls is Adagrad:  # as in torch, there from the start
            start = options.get("initial_accumulator_value", 0)
            for p in params:
                assert list(opt.state[p]) == keys
                assert opt.state[p]["step"] == 0
                assert bits(opt.state[p]["sum"]) == bits(np.full_like(p.data, start))
        else:
            assert opt.state_dict()["state"] == {}
        for step in 1, 2:
            opt.step()
            for p in params:
                state = opt.state[p] if keys else {}
                assert list(state) == keys
                for key, value in state.items():
                    if key in ("step", "n"):
                        assert type(value) is int
                        assert value == step
                    else:
                        assert (value.dtype, value.shape, value.strides) == (dtype, p.data.shape, p.data.strides)
        assert list(opt.state_dict()["state"]) == (list(range(4)) if keys else [])


@TYPES
def test_first_momentum_is_a_copy_of_the_gradient(dtype):
    opt, params = make(SGD, {"momentum": 0.9, "dampening": 0.5}, dtype, steps=1)
    for p in params:
        assert bits(opt.state[p]["momentum_buffer"]) == bits(p.grad)
        assert not np.may_share_memory(opt.state[p]["momentum_buffer"], p.grad)


@TYPES
@CASES
def test_without_gradient(cls, options, dtype):
    """No state, no step, no weight decay; and its first gradient later is its first step."""
    opt, (p, q, r) = make(cls, options, dtype)
    late, grad, before = q, q.grad, bits(q.data)
    q.grad = None
    for i in range(2):
        opt.step(grads=[p.grad, None, r.grad] if i else None)
    assert bits(late.data) == before
    state = opt.state_dict()["state"]
    assert state[1]["step"] == 0 if cls is Adagrad else 1 not in state
    q.grad = grad
    opt.step()
    often, _ = make(cls, options, dtype, steps=3)
    once, _ = make(cls, options, dtype, steps=1)
    assert values(opt) == [values(often)[0], values(once)[1], values(often)[2]]


def test_nothing_to_do():
    opt, _ = make()
    before = values(opt)
    opt.step(grads=[None, None, None])
    opt.zero_grad()
    assert opt.step() is None
    assert values(opt) == before
    assert opt.state_dict()["state"] == {}
    empty = SGD([{"params": []}])
    empty.step()
    empty.load_state_dict(empty.state_dict())


@CLASSES
def test_state_deleted(cls, options):
    """The parameter starts anew."""
    opt, params = make(cls, options, steps=3)
    fresh, twins = make(cls, options)
    for p, twin in zip(params, twins, strict=True):
        twin.data[...] = p.data
        del opt.state[p]
    opt.step()
    fresh.step()
    assert values(opt) == values(fresh)


@TYPES
@CLASSES
def test_state_entry_replaced(cls, options, dtype):
    """The new array is the one that the next step reads and writes."""
    opt, params = make(cls, options, dtype, steps=2)
    twin, twins = make(cls, options, dtype, steps=2)
    replaced = []
    for p, q in zip(params, twins, strict=True):
        for key, value in opt.state[p].items():
            if isinstance(value, np.ndarray):
                old, new = value.tobytes(), np.square(random(p.data.shape, dtype, 7), out=np.empty(p.data.shape, dtype))
                twin.state[q][key][...] = new
                opt.state[p][key] = new
                replaced.append((opt.state[p], key, new, value, old))
    go_on(opt, twin)
    for state, key, new, value, old in replaced:
        assert state[key] is new
        assert value.tobytes() == old


@pytest.mark.parametrize("cls, options", [(Adam, {}), (AdamW, {}), (Adagrad, {"lr_decay": 0.1})])
def test_step_count_replaced(cls, options):
    opt, params = make(cls, options, steps=2)
    twin, _ = make(cls, options, steps=2)
    sd = twin.state_dict()
    sd["state"][1]["step"] = opt.state[params[1]]["step"] = 2**40  # more than float32, or a C int, could count
    twin.load_state_dict(sd)
    opt.step()
    twin.step()
    assert values(opt) == values(twin)
    assert [opt.state[p]["step"] for p in params] == [3, 2**40 + 1, 3]


@TYPES
@CLASSES
def test_data_replaced(cls, options, dtype):
    """State goes on; the old array is not written any more."""
    opt, params = make(cls, options, dtype, steps=2)
    twin, twins = make(cls, options, dtype, steps=2)
    old = [(p.data, p.data.tobytes()) for p in params]
    for i, (p, q) in enumerate(zip(params, twins, strict=True)):
        p.data = new = random(p.data.shape, dtype, 7 + i)
        q.data[...] = new
        assert p.data is new
    go_on(opt, twin)
    assert all(array.tobytes() == before for array, before in old)


@TYPES
def test_data_replaced_by_another_shape(dtype):
    """Without state, nothing stands against it."""
    opt, (p, *_) = make(SGD, {"lr": 0.5}, dtype, steps=1)
    p.data, p.grad = np.ones((2, 7), dtype), np.ones((2, 7), dtype)
    opt.step()
    assert bits(p.data) == bits(np.full((2, 7), 0.5, dtype))


CHANGES = [
    (SGD, "momentum", "lr weight_decay momentum dampening maximize"),
    (SGD, "nesterov", "lr weight_decay momentum nesterov maximize"),
    (Adam, "amsgrad", "lr betas eps weight_decay amsgrad maximize decoupled_weight_decay"),
    (AdamW, "", "lr betas eps weight_decay maximize"),
    (RMSprop, "momentum centered", "lr alpha eps weight_decay momentum centered maximize"),
    (RMSprop, "", "lr alpha eps weight_decay maximize"),
    (Adagrad, "lr_decay", "lr lr_decay eps weight_decay maximize"),
    (Lion, "", "lr betas weight_decay maximize"),
    (Own, "", "lr decay maximize"),
]
BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "amsgrad": True, "centered": True}
BASE |= {"lr_decay": 0.1}
CHANGED = {"betas": (0.5, 0.6), "eps": 0.5, "alpha": 0.5, "dampening": 0.5, "decay": 0.5, "maximize": True, "lr": 0.3}
CHANGED |= {"decoupled_weight_decay": True, "nesterov": False, "amsgrad": False, "centered": False, "lr_decay": 0.5}
CHANGED |= {"momentum": 0.5, "weight_decay": 0.3}


@pytest.mark.parametrize("cls, on, name", [(cls, on, name) for cls, on, names in CHANGES for name in names.split()])
def test_hyper_parameter_changed(cls, on, name):
    """Noticed at the next step, in the group where it changed."""
    options = {k: BASE[k] for k in ["lr", "weight_decay", *on.split()] if k in GROUP_KEYS[cls].split()}
    options |= {"momentum": 0.9} if on == "nesterov" else {}
    (opt, params), (same, _) = (make(cls, options, steps=2) for _ in range(2))
    new, _ = make(cls, options | {name: CHANGED[name]})
    sd = opt.state_dict()
    sd["param_groups"][0][name] = CHANGED[name]
    for p, q in zip(params, params_of(new), strict=True):
        q.data[...] = p.data
    new.load_state_dict(sd)
    opt.param_groups[0][name] = CHANGED[name]
    for o in (opt, new, same):
        o.step()
    assert values(opt) == values(new) != values(same)


@pytest.mark.parametrize("cls", [Adam, AdamW, Lion])
def test_betas_changed_in_place(cls):
    opt, _ = make(cls, {"betas": [0.9, 0.99]}, steps=1)
    twin, _ = make(cls, {"betas": [0.9, 0.99]}, steps=1)
    opt.param_groups[0]["betas"][:] = [0.5, 0.6]
    twin.param_groups[0]["betas"] = [0.5, 0.6]
    go_on(opt, twin)


def test_numpy_numbers_as_hyper_parameters():
    opt, _ = make(SGD, {"lr": np.float64(0.1), "momentum": np.float32(0.5)}, steps=2)
    assert values(opt) == values(make(SGD, {"lr": 0.1, "momentum": 0.5}, steps=2)[0])


# ------------------------------------------------------------------------------------------- zero_grad, closure, grads


def test_zero_grad():
    opt, params = make()
    grads = [p.grad for p in params]
    params[2].grad = None
    opt.zero_grad(set_to_none=False)
    assert [p.grad is g for p, g in zip(params, grads, strict=True)] == [True, True, False]
    assert params[2].grad is None
    assert not any(g.any() for g in grads[:2])
    params[1].grad = np.float32(3)  # what a NumPy sum gives for a 0-dim parameter
    opt.zero_grad(False)
    assert params[1].grad == 0
    opt.zero_grad()
    assert [p.grad for p in params] == [None] * 3
    assert grads[2].any()


@CLASSES
def test_closure(cls, options):
    """It is called once, before anything is read, and its gradients are used."""
    opt, params = make(cls, options)
    twin, _ = make(cls, options)
    before, calls = values(opt), []
    grads = [p.grad for p in params]
    opt.zero_grad()

    def closure():
        calls.append(values(opt) == before)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return {"loss": 1.5}

    assert opt.step(closure) == {"loss": 1.5}
    assert twin.step() is None
    assert calls == [True]
    assert values(opt) == values(twin)
    opt.zero_grad()
    assert opt.step(closure=closure) == {"loss": 1.5}


@TYPES
@CASES
def test_step_with_grads(cls, options, dtype):
    """As stored ones, bit for bit; the stored ones are neither used nor replaced."""
    opt, params = make(cls, options, dtype)
    twin, twins = make(cls, options, dtype)
    stored = [None, params[1].grad, np.ones(5, dtype)]
    for p, g in zip(params, stored, strict=True):
        p.grad = g
    for i in range(3):
        grads = [random(p.data.shape, dtype, 10 * i + j) for j, p in enumerate(params)]
        for q, g in zip(twins, grads, strict=True):
            q.grad = g
        assert opt.step(grads=iter(grads) if i else grads) is None
        twin.step()
        assert values(opt) == values(twin)
        assert all(p.grad is g for p, g in zip(params, stored, strict=True))


# --------------------------------------------------------------------------------------------------------- checkpoints


@TYPES
@CASES
def test_round_trip(cls, options, dtype):
    """In mid-run, through pickle or not, into a new optimizer and into one with another past."""
    opt, params = make(cls, {}, dtype)
    opt.param_groups[0].update(options)  # the options come with the checkpoint
    if cls is Adagrad:
        opt, params = make(cls, options, dtype)
    go_on(opt)
    sd = opt.state_dict()
    new, used, other = make(cls, {}, dtype)[0], make(cls, options, dtype, steps=2)[0], make(cls, {}, dtype)[0]
    for o in (new, used, other):
        for p, q in zip(params, params_of(o), strict=True):
            q.data[...] = p.data
    new.load_state_dict(sd)
    used.load_state_dict(pickle.loads(pickle.dumps(sd)))
    other.load_state_dict(opt.state_dict(copy=False))
    assert new.state_dict()["param_groups"] == sd["param_groups"]
    go_on(opt, new, used, other)


@TYPES
@WITH_KEYS
def test_state_dict(cls, options, keys, dtype):
    """A snapshot; with copy=False the live arrays; and neither is shared by who loads it."""
    opt, params = make(cls, options, dtype, steps=2)
    sd, live = opt.state_dict(), opt.state_dict(copy=False)
    assert list(sd) == list(live) == ["state", "param_groups"]
    assert [list(state) for state in sd["state"].values()] == ([keys] * 3 if keys else [])
    saved = pickle.dumps(sd)
    for i, p in enumerate(params):
        for key, value in opt.state[p].items() if keys else []:
            if isinstance(value, np.ndarray):
                assert live["state"][i][key] is value
                assert not np.may_share_memory(sd["state"][i][key], value)
                assert bits(sd["state"][i][key]) == bits(value)
    other, _ = make(cls, options, dtype)
    other.load_state_dict(sd)
    opt.step()
    other.step()
    opt.param_groups[0]["lr"] = 7
    assert pickle.dumps(sd) == saved
    before = values(other), other.param_groups[0]["lr"]
    sd["param_groups"][0]["lr"] = 9
    sd["param_groups"][0]["params"].clear()
    for state in sd["state"].values():
        for key in state:
            state[key] = None
    sd["state"].clear()
    assert (values(other), other.param_groups[0]["lr"]) == before


@CLASSES
def test_load_replaces_all_state(cls, options):
    """State that is not in the checkpoint is gone; loading what one has changes nothing."""
    opt, params = make(cls, options)
    start = opt.state_dict()
    go_on(opt)
    opt.load_state_dict(start)
    fresh, _ = make(cls, options)
    for p, q in zip(params, params_of(fresh), strict=True):
        q.data[...] = p.data
    go_on(opt, fresh)
    before = values(opt)
    opt.load_state_dict(opt.state_dict(copy=False))
    assert values(opt) == before
    go_on(opt, fresh)


LAYOUTS = {
    "C": lambda x: np.array(x, order="C"),
    "F": lambda x: np.array(x, order="F"),
    "rolled axes": lambda x: np.moveaxis(np.array(np.moveaxis(x, 0, -1), order="C"), -1, 0) if x.ndim else x,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x,
    "every third row": lambda x: np.repeat(x, 3, axis=0)[::3] if x.ndim else x,
    "reversed": lambda x: np.flip(np.array(np.flip(x), order="C")) if x.ndim else x,
    "reversed rows": lambda x: np.flip(np.array(np.flip(x, 0), order="C"), 0) if x.ndim else x,
    "part of a larger one": lambda x: np.pad(x, 1)[(..., *(slice(1, -1),) * x.ndim)],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "misaligned": lambda x: np.frombuffer(bytearray(b"x" + x.tobytes()), x.dtype, offset=1).reshape(x.shape),
}
BROADCAST = {
    "broadcast rows": lambda x: np.broadcast_to(x[:1], x.shape) if x.ndim else x,
    "broadcast columns": lambda x: np.broadcast_to(x[..., :1], x.shape) if x.ndim else x,
    "broadcast number": lambda x: np.broadcast_to(x.flat[0], x.shape) if x.size else x,
}
DENSE = ["C", "F", "rolled axes"]


@TYPES
@CLASSES
def test_load_into_other_memory_order(cls, options, dtype):
    """Arrays are copied element by element, from any memory order into that of the parameter."""
    opt, params = make(cls, options, dtype, steps=2, shapes=[(3, 4), (2, 3, 4)])
    sd = opt.state_dict()
    loaded = []
    for order in DENSE:
        for layout in LAYOUTS.values():
            copies = [Parameter(LAYOUTS[order](p.data.copy())) for p in params]
            new = cls(copies, **options)
            state = {
                i: {k: layout(v) if isinstance(v, np.ndarray) else v for k, v in s.items()}
                for i, s in sd["state"].items()
            }
            new.load_state_dict({"state": state, "param_groups": sd["param_groups"]})
            for p in copies:
                assert all(a.strides == p.data.strides for a in new.state[p].values() if isinstance(a, np.ndarray))
            loaded.append(new)
    go_on(opt, *loaded, steps=2)


# ---------------------------------------------------------------------------------------------- copies, repr and names

CALLS = []


def note_pre(optimizer, args, kwargs):
    CALLS.append(("pre", optimizer))


def note_post(optimizer, args, kwargs):
    CALLS.append(("post", optimizer))


def note_saved(optimizer, state_dict):
    CALLS.append(("saved", optimizer))


def note_loaded(optimizer):
    CALLS.append(("loaded", optimizer))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@TYPES
@CASES
def test_copies(cls, options, dtype, duplicate):
    """Continue bit for bit with arrays of their own, in the same memory order."""
    opt, params = make(cls, options, dtype, steps=2)
    params[0].name = "w"
    new, copies = duplicate((opt, params))
    assert type(new) is cls
    assert all(p is q and p is not r for p, q, r in zip(params_of(new), copies, params, strict=True))
    assert [p.name for p in copies] == ["w", None, None]
    assert [bits(p.grad) for p in copies] == [bits(p.grad) for p in params]
    assert values(new) == values(opt)
    assert new.state_dict()["param_groups"] == opt.state_dict()["param_groups"]
    assert new.defaults == opt.defaults
    assert repr(new) == repr(opt)
    go_on(opt, new)
    before = values(opt)
    new.param_groups[0]["lr"] = 0.7
    new.add_param_group({"params": np.ones(3, dtype)})
    new.step()
    assert values(opt) == before
    assert len(opt.param_groups) == 1
    assert opt.param_groups[0]["lr"] == opt.defaults["lr"]


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_other_orders(duplicate):
    opt, params = make(Adam, {"lr": 0.1}, order="F", shapes=[(3, 4), (2, 3, 4)])
    opts = [opt, duplicate(opt)]
    opt.step()
    opts += [new := duplicate(opt), duplicate(new)]
    opts[1].step()
    go_on(*opts)
    assert params_of(new)[0].data.strides == params[0].data.strides


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_share_the_model(duplicate):
    """Arrays that are copied along with the optimizer are those that its copy updates."""
    w = np.ones(3)
    model = {"w": w, "opt": SGD([w], lr=0.5)}
    new = duplicate(model)
    new["opt"].step(grads=[np.ones(3)])
    assert w.tolist() == [1, 1, 1]
    assert params_of(new["opt"])[0].data.tolist() == [0.5, 0.5, 0.5]
    assert new["w"] is params_of(new["opt"])[0].data


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_keep_hooks(duplicate):
    opt, _ = make()
    handles = [
        opt.register_step_pre_hook(note_pre),
        opt.register_step_post_hook(note_post),
        opt.register_state_dict_post_hook(note_saved),
        opt.register_load_state_dict_post_hook(note_loaded),
    ]
    new = duplicate(opt)
    for handle in handles:
        handle.remove()
    for o, expected in [(opt, []), (new, ["pre", "post", "saved", "loaded"])]:
        o.step()
        o.load_state_dict(o.state_dict())
        seen = CALLS.copy()
        CALLS.clear()
        assert seen == [(name, new) for name in expected]


def test_repr():
    """torch's, less the switches it has and we have not."""
    opt = Adam([{"params": np.ones(2), "lr": 0.5}, {"params": np.ones(2), "amsgrad": True}], weight_decay=0.1)
    text = """Adam (
Parameter Group 0
    amsgrad: False
    betas: (0.9, 0.999)
    decoupled_weight_decay: False
    eps: 1e-08
    lr: 0.5
    maximize: False
    weight_decay: 0.1

Parameter Group 1
    amsgrad: True
    betas: (0.9, 0.999)
    decoupled_weight_decay: False
    eps: 1e-08
    lr: 0.001
    maximize: False
    weight_decay: 0.1
)"""
    assert repr(opt) == str(opt) == text
    one = "SGD (\nParameter Group 0\n    dampening: 0\n    lr: 0.1\n    maximize: False\n    momentum: 0\n"
    one += "    nesterov: False\n    param_names: ['w']\n    weight_decay: 0\n)"
    assert repr(SGD([("w", np.ones(2))], lr=0.1)) == one


def test_names():
    groups = [{"params": [("w", random(3)), ("b", Parameter(random(())))]}, {"params": iter([("v", random(2))])}]
    opt = Adam(groups)
    assert [group["param_names"] for group in opt.param_groups] == [["w", "b"], ["v"]]
    assert all(isinstance(p, Parameter) for p in params_of(opt))
    sd = opt.state_dict()
    assert [group["param_names"] for group in sd["param_groups"]] == [["w", "b"], ["v"]]
    opt.step(grads=[random(3), random(()), random(2)])
    opt.load_state_dict(opt.state_dict())
    opt.add_param_group({"params": [("u", random(2))]})
    assert opt.param_groups[2]["param_names"] == ["u"]
    assert [list(g["param_names"]) for g in copy.deepcopy(opt).param_groups] == [["w", "b"], ["v"], ["u"]]
    plain, _ = make(steps=1)
    assert "param_names" not in plain.state_dict()["param_groups"][0]
    named = Adam([(f"w{i}", Parameter(p.data.copy())) for i, p in enumerate(params_of(plain))])
    named.load_state_dict(plain.state_dict())  # torch keeps the live names where the checkpoint has none
    assert named.param_groups[0]["param_names"] == ["w0", "w1", "w2"]
    go_on(plain, named)


# --------------------------------------------------------------------------------------------------------------- hooks


def test_step_hooks():
    """global pre, own pre, closure and step, own post, global post; each in the order of registration."""
    opt, (p, *_) = make(SGD, {"lr": 0.5})
    opt.zero_grad()
    p.grad = np.ones((3, 4), np.float32)
    log, start = [], p.data.copy()

    def hook(name):
        def note(optimizer, args, kwargs):
            assert optimizer is opt
            log.append((name, args, kwargs, bool((p.data == start).all())))

        return note

    def closure():
        log.append("closure")

    with (
        opt.register_step_post_hook(hook("post 1")),
        opt.register_step_pre_hook(hook("pre 1")),
        register_optimizer_step_post_hook(hook("global post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        opt.register_step_post_hook(hook("post 2")),
        opt.register_step_pre_hook(hook("pre 2")),
    ):
        opt.step(closure)
        args = ((opt, closure), {})
        pre = [(name, *args, True) for name in ("global pre", "pre 1", "pre 2")]
        post = [(name, *args, False) for name in ("post 1", "post 2", "global post")]
        assert log == [*pre, "closure", *post]
        for arguments in [{}, {"grads": (None, None, None)}]:
            log.clear()
            opt.step(**arguments)
            assert [entry[1:3] for entry in log] == [((opt,), arguments)] * 6
    log.clear()
    opt.step()
    assert log == []


def test_global_hooks_see_every_optimizer():
    seen, opts = [], [make(cls)[0] for cls in (SGD, Adam, Own)]
    with register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append(opt)):
        for opt in opts:
            opt.step()
    opts[0].step()
    assert seen == opts


def test_pre_hook_replaces_arguments():
    opt, params = make(SGD, {"lr": 0.5})
    twin, _ = make(SGD, {"lr": 0.5})
    grads = [2 * p.grad for p in params]
    seen = []

    def replace(optimizer, args, kwargs):
        return args, {**kwargs, "grads": grads}

    def nothing(optimizer, args, kwargs):
        seen.append(kwargs.get("grads"))

    opt.register_step_pre_hook(replace)
    opt.register_step_pre_hook(nothing)
    opt.register_step_post_hook(nothing)
    with register_optimizer_step_pre_hook(lambda o, args, kwargs: ((*args, lambda: 5), kwargs)):
        assert opt.step() == 5
    twin.step(grads=grads)
    assert values(opt) == values(twin)
    assert seen == [grads, grads]


@pytest.mark.parametrize("value", [3, "ab", (), (1,), (1, 2, 3), [(), {}]], ids=repr)
def test_bad_return_of_a_pre_hook(value):
    opt, _ = make(steps=1)
    before = values(opt)
    with opt.register_step_pre_hook(lambda *_: value), pytest.raises(RuntimeError, match="None or"):
        opt.step()
    with register_optimizer_step_pre_hook(lambda *_: value), pytest.raises(RuntimeError, match="None or"):
        opt.step()
    assert values(opt) == before
    opt.step()
    assert values(opt) != before


def test_post_hooks_of_step_return_nothing_of_interest():
    opt, _ = make()
    opt.register_step_post_hook(lambda *_: 3)
    assert opt.step() is None
    assert opt.step(lambda: 4) == 4


HOOKS = {
    "step_pre": lambda opt: opt.step(),
    "step_post": lambda opt: opt.step(),
    "state_dict_pre": lambda opt: opt.state_dict(),
    "state_dict_post": lambda opt: opt.state_dict(),
    "load_state_dict_pre": lambda opt: opt.load_state_dict(opt.state_dict()),
    "load_state_dict_post": lambda opt: opt.load_state_dict(opt.state_dict()),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_registration_and_removal(kind):
    opt, _ = make()
    register, log = getattr(opt, f"register_{kind}_hook"), []

    def run(expected):
        log.clear()
        HOOKS[kind](opt)
        assert log == expected

    def hook(name):
        return lambda *args: log.append(name)

    first, second = register(hook("a")), register(hook("b"))
    run(["a", "b"])
    if not kind.startswith("step"):
        with register(hook("c"), prepend=True), register(hook("d"), prepend=True):
            run(["d", "c", "a", "b"])
    with register(hook("e")) as handle:
        run(["a", "b", "e"])
        first.remove()
        run(["b", "e"])
    handle.remove()  # a second time does no harm
    run(["b"])
    second.remove()
    second.remove()
    run([])
    once = [register(lambda *args: (log.append("once"), once[0].remove())[2:] or None)]
    run(["once"])
    run([])


def test_state_dict_hooks():
    """Arguments, and replacements one after the other."""
    opt, _ = make(steps=1)
    log = []
    opt.register_state_dict_pre_hook(lambda *args: log.append(args))
    opt.register_state_dict_post_hook(lambda o, sd: {**sd, "a": o is opt})
    opt.register_state_dict_post_hook(lambda o, sd: None)
    opt.register_state_dict_post_hook(lambda o, sd: {**sd, "b": list(sd)})
    sd = opt.state_dict()
    assert log == [(opt,)]
    assert sd["a"] is True
    assert sd["b"] == ["state", "param_groups", "a"]


def test_load_state_dict_hooks():
    opt, _ = make(Adam, {"lr": 0.1}, steps=1)
    saved = opt.state_dict()
    log = []

    def pre(optimizer, sd):
        assert optimizer is opt
        log.append(("pre", optimizer.param_groups[0]["lr"], sd["param_groups"][0]["lr"]))
        return {**sd, "param_groups": [{**group, "lr": 2 * group["lr"]} for group in sd["param_groups"]]}

    opt.register_load_state_dict_pre_hook(pre)
    opt.register_load_state_dict_pre_hook(pre)
    opt.register_load_state_dict_pre_hook(lambda o, sd: None)
    opt.register_load_state_dict_post_hook(lambda *args: log.append((*args, args[0].param_groups[0]["lr"])))
    opt.param_groups[0]["lr"] = 7
    opt.load_state_dict(saved)
    assert log == [("pre", 7, 0.1), ("pre", 7, 0.2), (opt, 0.4)]
    assert saved["param_groups"][0]["lr"] == 0.1


# ----------------------------------------------------------------------------------------------- a user's own optimizer


@TYPES
def test_own_optimizer(dtype):
    """The formula, its state, its groups, and a parameter without gradient."""
    params = [Parameter(random(s, dtype, i), random(s, dtype, 5 + i)) for i, s in enumerate([(3, 4), (2,), (3,)])]
    opt = Own([{"params": params[:1]}, {"params": params[1:], "lr": 0.5, "decay": 0.25}], lr=0.1)
    params[2].grad, start = None, params[2].data.copy()
    expected = []
    for p, lr, decay in [(params[0], 0.1, 0.9), (params[1], 0.5, 0.25)]:
        x, mean = p.data.copy(), np.zeros_like(p.data)
        for n in range(1, 4):
            mean *= decay
            mean += p.grad
            x -= 1 * lr * mean
            x -= 1 * lr / n * p.grad
        expected.append((bits(x), bits(mean)))
    for _ in range(3):
        opt.step()
    assert [(bits(p.data), bits(opt.state[p]["mean"])) for p in params[:2]] == expected
    assert [list(opt.state[p]) for p in params[:2]] == [["n", "mean"]] * 2
    assert list(opt.state_dict()["state"]) == [0, 1]
    assert bits(params[2].data) == bits(start)


def test_own_optimizer_gets_arrays():
    seen = []

    class Look(Optimizer):
        def update(self, p, g, state, group):
            seen.append((p is w, type(p), type(g), g.shape, g.dtype, bits(g), state, dict(group)))

    w, g = np.ones((2, 3)), np.asfortranarray(random((2, 3), "float64"))
    opt = Look([w], {"anything": "goes"})
    opt.step(grads=[g])
    (group,) = opt.param_groups
    assert seen == [(True, np.ndarray, np.ndarray, (2, 3), np.float64, bits(g), {}, group)]


def test_own_optimizer_cannot_write_gradients():
    class Doubles(Optimizer):
        def update(self, p, g, state, group):
            g *= 2

    g = np.ones(3)
    opt = Doubles([Parameter(np.ones(3), g)], {"lr": 0.1})
    with pytest.raises(ValueError, match="read-only"):
        opt.step()
    assert g.tolist() == [1, 1, 1]
    assert g.flags.writeable


def test_own_optimizer_fails():
    """An error in update comes through, and the optimizer can be used again."""

    class Fails(Own):
        def update(self, p, g, state, group):
            if np.isnan(g).any():
                raise ArithmeticError("gradient is NaN")
            super().update(p, g, state, group)

    opt, params = make(Fails)
    twin, _ = make(Fails)
    with pytest.raises(ArithmeticError, match="NaN"):
        opt.step(grads=[np.full_like(params[0].data, np.nan), None, None])
    go_on(opt, twin)


@pytest.mark.parametrize(
    "bad, error", [(np.ones(4, np.float32), ValueError), (np.ones(5), TypeError), ([1.0] * 5, TypeError)]
)
def test_own_optimizer_refuses_bad_gradients(bad, error):
    opt, params = make(Own, steps=1)
    before = values(opt)
    with pytest.raises(error, match="parameter 2"):
        opt.step(grads=[params[0].grad, params[1].grad, bad])
    assert values(opt) == before


def test_own_optimizer_hyper_parameters():
    with pytest.raises(ValueError, match="lr"):
        Own([np.ones(3)], lr=-1)
    with pytest.raises(ValueError, match="foo"):
        Own([{"params": np.ones(3), "foo": 1}])


# -------------------------------------------------------------------------------------------------- arrays of all kinds

SHAPES = [(33, 70), (2, 3, 4), (7,), (1,), (), (0,), (3, 0, 2), (1, 1, 5), (600, 40)]


@pytest.mark.parametrize("layout", LAYOUTS | BROADCAST)
@TYPES
@CLASSES
def test_memory_order(cls, options, dtype, layout):
    """Of parameter and gradient: the same bits as in C order, stored or passed; and gradients are not written."""
    spread = (LAYOUTS | BROADCAST)[layout]
    starts = [random(s, dtype, i) for i, s in enumerate(SHAPES)]
    reference = cls([x.copy() for x in starts], **options)
    opts = [cls([LAYOUTS[order](x.copy()) for x in starts], **options) for order in DENSE]
    strides = [[p.data.strides for p in params_of(opt)] for opt in opts]
    for step in range(2):
        grads = [spread(random(s, dtype, 20 * step + i)) for i, s in enumerate(SHAPES)]
        assert [g.shape for g in grads] == SHAPES
        kept = [np.array(g, order="C") for g in grads]
        reference.step(grads=kept)
        for opt in opts:
            if step:
                for p, g in zip(params_of(opt), grads, strict=True):
                    p.grad = g
                opt.step()
            else:
                opt.step(grads=grads)
            assert values(opt) == values(reference)
        assert [bits(g) for g in grads] == [bits(np.array(g)) for g in kept]
    assert [[p.data.strides for p in params_of(opt)] for opt in opts] == strides


@CLASSES
def test_neighbours_are_not_touched(cls, options):
    big = random((9, 50))
    before = big.copy()
    opt = cls([big[2:4], big[6, 3:20]], **options)
    opt.step(grads=[np.ones((2, 50), np.float32), np.ones(17, np.float32)])
    mask = np.zeros(big.shape, bool)
    mask[2:4] = mask[6, 3:20] = True
    assert ((big != before) == mask).all()


# Gradients that lie in the memory of parameters or state, of a square matrix `p` and `q` side by side in `memory`.
ALIASES = {
    "itself": lambda p, q, memory, state: (p, q),
    "each other": lambda p, q, memory, state: (q, p),
    "transposed": lambda p, q, memory, state: (p.T, q.T),
    "reversed": lambda p, q, memory, state: (p[::-1, ::-1], q[::-1]),
    "shifted up": lambda p, q, memory, state: (memory[1 : 1 + p.size].reshape(p.shape), None),
    "shifted down": lambda p, q, memory, state: (None, memory[p.size - 1 : -1].reshape(q.shape)),
    "far shifted": lambda p, q, memory, state: (memory[p.size // 2 :][: p.size].reshape(p.shape),) * 2,
    "broadcast": lambda p, q, memory, state: (np.broadcast_to(p[0], p.shape), np.broadcast_to(p[:, :1], p.shape)),
    "the same for both": lambda p, q, memory, state: (q, q),
    "state of one": lambda p, q, memory, state: (state(0), state(0)),
    "state of each other": lambda p, q, memory, state: (state(1), state(0)),
    "state transposed": lambda p, q, memory, state: (state(0).T, state(1)[::-1]),
}


# The state of a user's own rule is the rule's own affair.
ALIASED = [(*c.values, k) for c in ONE.values() for k in ALIASES if not (c.values[0] is Own and "state" in k)]


@TYPES
@pytest.mark.parametrize("cls, options, kind", ALIASED, ids=[f"{c.__name__}-{k}" for c, _, k in ALIASED])
def test_gradient_in_the_memory_of_what_is_written(cls, options, dtype, kind):
    """Gives what a copy of it gives."""
    for n in 3, 130:  # of one small chunk, and of several
        results = []
        for copies in (False, True):
            memory = random(2 * n * n, dtype)
            p, q = (Parameter(half.reshape(n, n)) for half in np.split(memory, 2))
            opt = cls([p, q], **options)
            opt.step(grads=[random((n, n), dtype, 1), random((n, n), dtype, 2)])

            def state(i, opt=opt, params=(p, q)):
                return next(v for v in opt.state[params[i]].values() if isinstance(v, np.ndarray))

            for step in range(3):
                grads = ALIASES[kind](p.data, q.data, memory, state)
                if copies:
                    grads = [None if g is None else g.copy() for g in grads]
                if step == 2:
                    p.grad, q.grad = grads
                    opt.step()
                else:
                    opt.step(grads=grads)
            results.append(values(opt))
        assert results[0] == results[1]


class Bare:
    """An array by __array__ and nothing else."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


class Described(Bare):
    """As most array libraries have it."""

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)


class Sub(np.ndarray):
    pass


@pytest.mark.parametrize("wrap", [Bare, Described, lambda a: a.view(Sub)], ids=["Bare", "Described", "subclass"])
@TYPES
@CLASSES
def test_gradient_that_is_no_plain_ndarray(cls, options, dtype, wrap):
    opt, params = make(cls, options, dtype)
    twin, _ = make(cls, options, dtype)
    for step in range(2):
        grads = [random(p.data.shape, dtype, 10 * step + i) for i, p in enumerate(params)]
        kept = [g.copy() for g in grads]
        wrapped = [wrap(g) for g in grads]
        if step:
            for p, g in zip(params, wrapped, strict=True):
                p.grad = g
            opt.step()
            assert all(p.grad is g for p, g in zip(params, wrapped, strict=True))
        else:
            opt.step(grads=wrapped)
        twin.step(grads=kept)
        assert values(opt) == values(twin)
        assert [bits(g) for g in grads] == [bits(g) for g in kept]


def test_wrong_gradient_that_is_no_ndarray():
    opt, _ = make(Adam, steps=1)
    before = values(opt)
    for wrap in Bare, Described:
        for g, error in [(np.ones(5), TypeError), (np.ones(4, np.float32), ValueError)]:
            with pytest.raises(error, match="parameter 2"):
                opt.step(grads=[None, None, wrap(g)])
    assert values(opt) == before


@TYPES
def test_numpy_scalar_as_gradient(dtype):
    """What NumPy's sums give is a scalar, no 0-dim array."""
    opt, params = make(Adam, {}, dtype)
    twin, _ = make(Adam, {}, dtype)
    scalar = random(9, dtype).sum()
    opt.step(grads=[None, scalar, None])
    twin.step(grads=[None, np.array(scalar), None])
    params[1].grad = scalar
    opt.step()
    twin.step(grads=[params[0].grad, np.array(scalar), params[2].grad])
    assert values(opt) == values(twin)


@pytest.mark.parametrize("layout", ["C", "F", "strided", "reversed", "broadcast rows", "misaligned", "Bare"])
@CLASSES
def test_no_reference_to_a_gradient_is_kept(cls, options, layout):
    opt, (p, *_) = make(cls, options)
    spread = (LAYOUTS | BROADCAST | {"Bare": Bare})[layout]
    gc.disable()  # no cycle may hold it either
    try:
        for stored in False, True, False:
            array = np.array(random((3, 4)))
            g = spread(array)
            g = g if g is not array else array.view()
            refs = [weakref.ref(g), weakref.ref(array)]
            if stored:
                p.grad = g
                opt.step()
                p.grad = None
            else:
                opt.step(grads=[g, None, None])
            del g, array
            assert [ref() for ref in refs] == [None, None]
        p.grad = g = random((3, 4))
        count = sys.getrefcount(g)
        for _ in range(2):
            opt.step()
            opt.state_dict()
            assert sys.getrefcount(g) == count
    finally:
        gc.enable()


def test_no_reference_is_kept_by_a_failed_step():
    opt, (p, _, r) = make()
    p.grad, r.grad = g, bad = random((3, 4)), random(4)
    refs = weakref.ref(g), weakref.ref(bad)
    with pytest.raises(ValueError):
        opt.step()
    p.grad = r.grad = None
    del g, bad
    assert [ref() for ref in refs] == [None, None]
