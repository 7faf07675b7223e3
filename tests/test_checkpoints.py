"""Checkpoints in both directions: what the user keeps beside, what .npz and JSON make of them, all or nothing."""

import copy
import json
import pickle
import sys

import numpy as np
import pytest

from all_optimizers import CLASSES, Own, bits, go_on, make, params_of, random, values
from pyopt import SGD, Adagrad, Adam, AdamW, Lion, Parameter, RMSprop

COUNTING = pytest.mark.parametrize("cls", [Adam, AdamW, RMSprop, Adagrad])
KERNELS = pytest.mark.parametrize("cls", [SGD, Adam, AdamW, RMSprop, Adagrad, Lion])


def seen(opt):
    """All that a load may change, with the identity of arrays."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    arrays = {k: id(v) for p in params_of(opt) for k, v in opt.state.get(p, {}).items() if isinstance(v, np.ndarray)}
    return copy.deepcopy((values(opt), groups, arrays))


# --- what is the user's own -------------------------------------------------------------------------------------------

OWN_KEYS = {"name": "head", "lr_scale": 0.5, "layer_id": 3, "rho": 0.05, "max_momentum": 0.9, "weight_decay_mult": 2}
OWN_KEYS |= {"nested": {"a": [1, (2, 3)]}, "notes": None, 7: "a number as key"}


@CLASSES
def test_own_group_keys(cls, options):
    """Kept by constructor and add_param_group, saved, loaded, printed; in copies of their own."""
    own = copy.deepcopy(OWN_KEYS)
    opt = cls([{"params": [Parameter(random(3))], **own}], **options)
    opt.add_param_group({"params": [Parameter(random(3))], "name": "tail"})
    sd = opt.state_dict()
    assert OWN_KEYS.items() <= sd["param_groups"][0].items()
    assert sd["param_groups"][1]["name"] == "tail"
    new = cls([{"params": [Parameter(random(3))], "rho": 1}, {"params": [Parameter(random(3))]}], **options)
    new.load_state_dict(sd)
    assert OWN_KEYS.items() <= new.param_groups[0].items()
    assert new.param_groups[1]["name"] == "tail"
    sd["param_groups"][0]["nested"]["a"].append(4)
    assert new.param_groups[0]["nested"] == opt.param_groups[0]["nested"] == OWN_KEYS["nested"]
    assert "lr_scale: 0.5" in repr(new)


def test_own_keys_of_a_checkpoint_of_torch():
    """foreach, fused and the like choose between torch's implementations: kept, without effect."""
    opt, _ = make(SGD, {"momentum": 0.9}, steps=1)
    sd = opt.state_dict()
    sd["param_groups"][0] |= {"foreach": None, "fused": True, "differentiable": False, "initial_lr": 0.1}
    new, _ = make(SGD, steps=0)
    new.load_state_dict(sd)
    assert new.state_dict()["param_groups"] == sd["param_groups"]
    for p, q in zip(params_of(opt), params_of(new), strict=True):
        q.data[...] = p.data
    go_on(opt, new)


@CLASSES
def test_own_state_entries(cls, options):
    """Lookahead's slow weights and the like: saved and loaded with the optimizer's own, arrays copied."""
    opt, params = make(cls, options, steps=2)
    for p in params:
        opt.state[p]["slow"] = p.data.copy()
        opt.state[p]["note"] = {"k": [5, np.float64(0.5)], "array": np.arange(3)}
    opt.state["rounds"] = {"count": np.int64(3)}
    sd = opt.state_dict()
    new, others = make(cls, options)
    new.load_state_dict(sd)
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert bits(new.state[q]["slow"]) == bits(opt.state[p]["slow"]) == bits(sd["state"][i]["slow"])
        assert new.state[q]["slow"].strides == q.data.strides
        assert new.state[q]["slow"] is not sd["state"][i]["slow"]
        assert new.state[q]["note"]["k"] == [5, 0.5]
        assert new.state[q]["note"] is not sd["state"][i]["note"]
        assert type(sd["state"][i]["note"]["k"][1]) is float
        q.data[...] = p.data
    assert new.state["rounds"] == {"count": 3}
    assert new.state["rounds"] is not sd["state"]["rounds"]
    for o in (opt, new):
        for p in params_of(o):
            del o.state[p]["note"]
    go_on(opt, new)


@pytest.mark.parametrize("key", [0, np.int64(2), "1"])
def test_own_state_under_a_number(key):
    """It could not be told from a parameter's."""
    opt, _ = make(steps=1)
    opt.state[key] = {"mine": 1}
    with pytest.raises(ValueError, match="a parameter's number"):
        opt.state_dict()


def test_state_that_is_no_dict():
    opt, (_, p, _) = make(steps=1)
    opt.state[p] = [1]
    with pytest.raises(TypeError, match="parameter 1: its state is a list"):
        opt.state_dict()


@CLASSES
def test_own_state_from_before_the_first_step(cls, options):
    opt, params = make(cls, options)
    for p in params:
        opt.state[p]["slow"] = p.data.copy()
    new, others = make(cls, options)
    new.load_state_dict(opt.state_dict())
    assert [bits(new.state[q]["slow"]) for q in others] == [bits(p.data) for p in params]


# --- plain numbers ----------------------------------------------------------------------------------------------------


def kinds(x):
    if isinstance(x, dict):
        return {type(x)}.union(*map(kinds, x.values()))
    if isinstance(x, (list, tuple)):
        return {type(x)}.union(*map(kinds, x))
    return {type(x)}


@pytest.mark.parametrize("copied", [True, False])
def test_state_dict_holds_plain_numbers(copied):
    options = {"lr": np.float64(0.1), "betas": (np.float64(0.9), np.float32(0.5)), "eps": np.float32(1e-3)}
    opt, params = make(Adam, {**options, "amsgrad": np.True_}, steps=1)
    opt.param_groups[0]["lr_scale"] = np.int64(3)
    opt.state[params[0]]["step"] = np.int64(1)
    sd = opt.state_dict(copy=copied)
    assert kinds(sd) == {dict, list, tuple, int, float, bool, np.ndarray}
    assert sd["param_groups"][0]["betas"] == (0.9, 0.5)
    assert sd["param_groups"][0]["amsgrad"] is True
    new, _ = make(Adam)
    new.load_state_dict({"state": sd["state"], "param_groups": [{**sd["param_groups"][0], **options}]})
    assert kinds(new.param_groups[0]["betas"]) == {tuple, float}
    assert type(new.param_groups[0]["lr"]) is float


# --- .npz and JSON ----------------------------------------------------------------------------------------------------


def through_npz(sd, path):
    np.savez(path, **sd)
    return np.load(path, allow_pickle=True)


def through_flat_npz(sd, path):
    """As one writes it without pickles: each number an array of its own, betas an array."""
    flat = {f"state/{i}/{k}": v for i, entry in sd["state"].items() for k, v in entry.items()}
    flat |= {f"group/{i}/{k}": v for i, group in enumerate(sd["param_groups"]) for k, v in group.items()}
    np.savez(path, **flat)
    state, groups = {}, {}
    for key, value in np.load(path).items():
        kind, i, name = key.split("/")
        (state if kind == "state" else groups).setdefault(i, {})[name] = value
    return {"state": state, "param_groups": [groups[i] for i in sorted(groups)]}


def through_json(sd, path):
    """Arrays beside, since JSON has none."""
    arrays = {(str(i), k): v for i, s in sd["state"].items() for k, v in s.items() if isinstance(v, np.ndarray)}
    loaded = json.loads(json.dumps(sd, default=lambda x: None))
    for (i, k), array in arrays.items():
        loaded["state"][i][k] = array
    return loaded


def through_floats(sd, path):
    """Counts as floats, as MATLAB and some JSON writers make them; arrays in a 0-d array stay arrays."""
    for entry in sd["state"].values():
        if "step" in entry:
            entry["step"] = np.float32(entry["step"])
    return sd


@pytest.mark.parametrize("through", [through_npz, through_flat_npz, through_json, through_floats])
@CLASSES
def test_what_files_make_of_a_checkpoint(cls, options, through, tmp_path):
    params = [Parameter(random(s, seed=i), random(s, seed=9 + i)) for i, s in enumerate([(3, 4), (), (5,)])]
    opt = cls(dict(zip("abc", params, strict=True)), **options)
    for _ in range(3):
        opt.step()
    sd = opt.state_dict()
    if cls is Own:  # what its numbers are is its own business
        for entry in sd["state"].values():
            entry.pop("n")
    loaded = through(copy.deepcopy(sd), tmp_path / "checkpoint.npz")
    new = cls({name: p.data.copy() for name, p in zip("abc", params, strict=True)}, **options)
    new.load_state_dict(loaded)
    again = new.state_dict()
    assert again["param_groups"] == sd["param_groups"]
    assert kinds(again["param_groups"]) == kinds(sd["param_groups"])
    assert list(again["state"]) == list(sd["state"])
    for i, entry in sd["state"].items():
        assert {k: bits(v) for k, v in again["state"][i].items()} == {k: bits(v) for k, v in entry.items()}


@COUNTING
@pytest.mark.parametrize("step", [np.array(7), np.array(7.0), 7.0, np.float32(7), np.int8(7), np.array(7, object)])
def test_step_counts(cls, step):
    opt, (p, *_) = make(cls, steps=1)
    sd = opt.state_dict()
    sd["state"][0]["step"] = step
    opt.load_state_dict(sd)
    assert bits(opt.state[p]["step"]) == (int, 7)
    opt.step()
    assert opt.state[p]["step"] == 8


@COUNTING
@pytest.mark.parametrize("step", [2**52 + 1, 2**62, 2**63 - 2, 2.0**62, np.array(2**62)])
def test_a_step_count_near_its_end(cls, step):
    """Refused at once, and not after one more step: where counts end they stay."""
    opt, (p, *_) = make(cls, steps=1)
    sd = opt.state_dict()
    sd["state"][0]["step"] = step
    before = seen(opt)
    with pytest.raises(ValueError, match=r"step.*2\*\*52"):
        opt.load_state_dict(sd)
    assert seen(opt) == before
    sd["state"][0]["step"] = 2**52 - 1
    opt.load_state_dict(sd)
    for _ in range(3):
        opt.step()
    assert opt.state[p]["step"] == 2**52
    opt.load_state_dict(opt.state_dict())


# --- into any state of the optimizer ----------------------------------------------------------------------------------


def with_buffers(opt):
    """A copy whose arrays are read-only: pickle protocol 5, as joblib's workers get it."""
    buffers = []
    data = pickle.dumps(opt, protocol=5, buffer_callback=buffers.append)
    new = pickle.loads(data, buffers=[bytes(b.raw()) for b in buffers])
    for p in params_of(new):  # parameters must be writable to be stepped; their state is what is loaded
        p.data = p.data.copy()
    return new


def entries(opt, change):
    for p in params_of(opt):
        for k, v in opt.state[p].items():
            if isinstance(v, np.ndarray):
                opt.state[p][k] = change(v, p)
    return opt


def shared(opt):
    """Every state array is one piece of memory with others, or with its parameter."""
    return entries(opt, lambda v, p: p.data)


def put(opt, **attributes):
    vars(opt).update(attributes)
    return opt


def read_only(v):
    v = v.copy()
    v.flags.writeable = False
    return v


STATES = {
    "state {}": lambda opt: put(opt, state={}),
    "state a dict": lambda opt: put(opt, state=dict(opt.state)),
    "state None": lambda opt: put(opt, state=None),
    "entries None": lambda opt: put(opt, state=dict.fromkeys(opt.state)),
    "entries lists": lambda opt: put(opt, state={p: [1] for p in opt.state}),
    "read-only": lambda opt: entries(opt, lambda v, p: read_only(v)),
    "pickle 5": with_buffers,
    "shape": lambda opt: entries(opt, lambda v, p: np.zeros((2, 3), v.dtype)),
    "dtype": lambda opt: entries(opt, lambda v, p: v.astype(np.float64)),
    "integers": lambda opt: entries(opt, lambda v, p: v.astype(np.int32)),
    "big-endian": lambda opt: entries(opt, lambda v, p: v.astype(">f4")),
    "strided": lambda opt: entries(opt, lambda v, p: np.repeat(v, 2, -1)[..., ::2] if v.ndim else v),
    "other order": lambda opt: entries(opt, lambda v, p: np.asfortranarray(v)),
    "numbers": lambda opt: entries(opt, lambda v, p: 0.0),
    "shared": shared,
    "groups a tuple": lambda opt: put(opt, param_groups=tuple(opt.param_groups)),
    "options missing": lambda opt: opt.param_groups[0].pop("lr") and opt,
    "options wrong": lambda opt: opt.param_groups[0].update(lr=-1) or opt,
}


@pytest.mark.parametrize("spoil", STATES.values(), ids=STATES)
@CLASSES
def test_load_into_any_state(cls, options, spoil):
    """A load defines the state, whatever was there before."""
    source, params = make(cls, options, steps=3)
    opt = spoil(make(cls, options, steps=1)[0])
    opt.load_state_dict(source.state_dict())
    for p, q in zip(params_of(opt), params, strict=True):
        p.data[...] = q.data
        p.grad = q.grad
    assert isinstance(opt.param_groups, list)
    go_on(source, opt)


@CLASSES
def test_arrays_that_fit_live_on(cls, options):
    """Users may hold them, and the list of groups."""
    source, _ = make(cls, options, steps=3)
    opt, params = make(cls, options, steps=1)
    for p in params:
        opt.state[p]["slow"] = np.zeros(7)
    for p in params_of(source):
        source.state[p]["slow"] = np.ones(7)
    held = {(p, k): v for p in params for k, v in opt.state[p].items() if isinstance(v, np.ndarray)}
    groups = opt.param_groups
    opt.load_state_dict(source.state_dict())
    assert opt.param_groups is groups
    assert all(opt.state[p][k] is v for (p, k), v in held.items())
    assert values(opt)[0][1] == values(source)[0][1]
    assert all(v.any() or k != "slow" for (_, k), v in held.items())


class Stubborn(np.ndarray):
    def __setitem__(self, key, value):
        raise RuntimeError("not written")


@pytest.mark.parametrize("kind, kept", [(np.memmap, True), (Stubborn, False)])
def test_live_arrays_of_a_subclass(kind, kept, tmp_path):
    """Kept where copying into them runs no code of theirs, which could fail half-way."""
    opt, params = make(SGD, {"momentum": 0.9}, steps=1)
    p = params[2]
    array = p.data.copy().view(Stubborn) if kind is Stubborn else np.memmap(tmp_path / "m", "float32", "w+", shape=5)
    opt.state[p]["momentum_buffer"] = array
    sd = make(SGD, {"momentum": 0.9}, steps=2)[0].state_dict()
    opt.load_state_dict(sd)
    assert (opt.state[p]["momentum_buffer"] is array) is kept
    assert bits(np.asarray(opt.state[p]["momentum_buffer"])) == bits(sd["state"][2]["momentum_buffer"])


def test_a_checkpoint_of_live_arrays_that_change_places():
    """What is copied into may be what is copied from."""
    opt, params = make(Adam, shapes=[(5,), (5,)], steps=2)
    first, second = (opt.state_dict()["state"][i]["exp_avg"] for i in range(2))
    sd = opt.state_dict(copy=False)
    sd["state"] = {0: sd["state"][1], 1: sd["state"][0]}
    opt.load_state_dict(sd)
    assert bits(opt.state[params[0]]["exp_avg"]) == bits(second)
    assert bits(opt.state[params[1]]["exp_avg"]) == bits(first)


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("event", ["call", "line"])
def test_interrupted_at_every_point(event):
    """Everything as it was, or everything loaded."""
    source, _ = make(RMSprop, {"momentum": 0.9, "centered": True, "lr": 0.5}, steps=3)
    sd = source.state_dict()
    outcomes = set()
    for limit in range(100_000):
        opt, _ = make(RMSprop, {"momentum": 0.9, "centered": True}, steps=1)
        old = seen(opt)
        left = limit

        def trace(frame, what, arg):
            nonlocal left
            if what == event:
                left -= 1
                if left < 0:
                    raise Interruption
            return trace

        sys.settrace(trace)
        try:
            opt.load_state_dict(sd)
        except Interruption:
            done = False
        else:
            done = True
        finally:
            sys.settrace(None)
        new = seen(opt)
        loaded = opt.state_dict()["param_groups"][0]["lr"] == 0.5
        outcomes.add((done, loaded))
        if loaded:
            assert [state for _, state in new[0]] == [state for _, state in values(source)]
        else:
            assert new == old
        if done:
            break
    assert (False, False) in outcomes
    assert loaded


def test_deep_copies_that_fail_change_nothing():
    class Unique:
        def __deepcopy__(self, memo):
            raise RuntimeError("no copy of me")

    for where in ("group", "state"):
        opt, _ = make(Adam, steps=1)
        sd = make(Adam, {"lr": 0.5}, steps=3)[0].state_dict()
        (sd["param_groups"][0] if where == "group" else sd["state"][2])["mine"] = Unique()
        before = seen(opt)
        with pytest.raises(RuntimeError, match="no copy"):
            opt.load_state_dict(sd)
        assert seen(opt) == before


@KERNELS
def test_optimizer_without_params_of_a_group(cls):
    opt, _ = make(cls, steps=1)
    sd = opt.state_dict()
    del opt.param_groups[0]["params"]
    with pytest.raises(KeyError, match="the optimizer: param group 0 has no 'params'"):
        opt.load_state_dict(sd)


def test_sam_loads_what_it_saved():
    """A wrapper's key may be called like an option of another optimizer; where it is new, the checkpoint is foreign."""
    opt = SGD([{"params": [random(3)], "rho": 0.05, "adaptive": False}])
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["rho"] == 0.05
    with pytest.raises(ValueError, match=r"another optimizer.*'rho'"):
        SGD([random(3)]).load_state_dict(opt.state_dict())
