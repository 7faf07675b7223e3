"""The state of an optimizer: when it appears, checkpoints, copies, and how it prints."""

import copy
import pickle

import numpy as np
import pytest

from all_optimizers import (
    CASES,
    CLASSES,
    DENSE,
    GROUP_KEYS,
    LAYOUTS,
    TYPES,
    WITH_KEYS,
    Own,
    bits,
    go_on,
    make,
    params_of,
    random,
    values,
)
from pyopt import SGD, Adagrad, Adam, AdamW, Lion, Parameter, RMSprop, RowwiseAdagrad

# --- state ------------------------------------------------------------------------------------------------------------


@TYPES
@WITH_KEYS
def test_state(cls, options, keys, dtype):
    for order in "C" if cls is RowwiseAdagrad else "CF":
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
                    if key in cls.number_states:
                        assert type(value) is float
                    elif key == "step" or (cls, key) == (Own, "n"):
                        assert type(value) is int
                        assert value == step
                    else:
                        like = p.data if cls is not RowwiseAdagrad else np.zeros(p.data.shape[:1], dtype)  # one a row
                        assert (value.dtype, value.shape, value.strides) == (dtype, like.shape, like.strides)
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
                old, new = value.tobytes(), np.square(random(value.shape, dtype, 7), out=np.empty(value.shape, dtype))
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


# --- checkpoints ------------------------------------------------------------------------------------------------------


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


@TYPES
@CLASSES
def test_load_into_other_memory_order(cls, options, dtype):
    """Arrays are copied element by element, from any memory order into that of the parameter."""
    if cls is RowwiseAdagrad:
        pytest.skip("its tables lie in C order")
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


# --- copies, repr and names -------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("duplicate", [*COPIES.values(), copy.copy], ids=[*COPIES, "copy"])
def test_copies_leave_hooks_behind(duplicate):
    """As in torch: local functions do not stand against a pickle, and the original's are not called for a copy."""
    calls = []
    opt, _ = make()
    opt.register_step_pre_hook(lambda *args: calls.append(args[0]))
    opt.register_step_post_hook(lambda *args: calls.append(args[0]))
    opt.register_state_dict_pre_hook(lambda *args: calls.append(args[0]))
    opt.register_state_dict_post_hook(lambda *args: calls.append(args[0]))
    opt.register_load_state_dict_pre_hook(lambda *args: calls.append(args[0]))
    opt.register_load_state_dict_post_hook(lambda *args: calls.append(args[0]))
    new = duplicate(opt)
    for o, expected in [(new, []), (opt, [opt] * 6)]:
        o.step()
        o.load_state_dict(o.state_dict())
        assert calls == expected
    new.register_step_post_hook(lambda *args: calls.append(args[0]))
    opt.step()
    new.step()
    assert calls == [*[opt] * 8, new]


def test_repr():
    """torch's, less the switches it has and we have not."""
    opt = Adam([{"params": np.ones(2), "lr": 0.5}, {"params": np.ones(2), "amsgrad": True}], weight_decay=0.1)
    text = """Adam (
Parameter Group 0
    amsgrad: False
    betas: (0.9, 0.999)
    cautious: False
    decoupled_weight_decay: False
    eps: 1e-08
    lr: 0.5
    maximize: False
    update_clip: False
    weight_decay: 0.1

Parameter Group 1
    amsgrad: True
    betas: (0.9, 0.999)
    cautious: False
    decoupled_weight_decay: False
    eps: 1e-08
    lr: 0.001
    maximize: False
    update_clip: False
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
