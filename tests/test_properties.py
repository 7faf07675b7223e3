"""Whatever a user does between steps, a step is the oracle's in bits, or it raises and has changed nothing.

PYOPT_EXAMPLES=n plays n games of 50 moves in place of a few; the numbers of steps are printed (pytest -s).
PYOPT_SHRINK=1 makes a failing game short, which may take minutes.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import weakref

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import pyopt
from whole_steps import KINDS, advance, in_place, isolated, params_of, random, snapshot

OVERRIDES = ["check_group", "state_streams", "scalars", "new_state", "initial_value"]


class Stop(Exception):
    """What an override raises."""


def stopping(cls):
    """Its overrides raise at the countdown's end; a class that pickle finds by its name."""

    def override(name):
        def method(self, *args, **kwargs):
            result = getattr(cls, name)(self, *args, **kwargs)
            COUNTDOWN[0] -= 1
            if COUNTDOWN[0] == 0:
                raise Stop
            return result

        return method

    name = f"Stopping{cls.__name__}"
    return type(name, (cls,), {"__module__": __name__, "__qualname__": name, **{n: override(n) for n in OVERRIDES}})


COUNTDOWN = [0]
STOPPING = {cls: stopping(cls) for cls, _ in KINDS}
globals().update({cls.__name__: cls for cls in STOPPING.values()})


class Sub(np.ndarray):
    pass


class Foreign:
    """An array of another library."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def misaligned(g):
    return np.frombuffer(bytearray(b"x" + g.tobytes()), g.dtype, offset=1).reshape(g.shape)


def frozen(g):
    g = g.copy()
    g.flags.writeable = False
    return g


def other(dtype):
    return {"float32": "float64", "float64": "float32"}.get(np.dtype(dtype).name, "float32")


# name: the gradient, of a fresh array of the parameter's shape and dtype, the parameter, and all parameters
GOOD = {
    "plain": lambda g, p, all_: g,
    "F": lambda g, p, all_: laid(g, "F"),
    "strided": lambda g, p, all_: np.repeat(g, 2, axis=-1)[..., ::2] if g.ndim else g,
    "negative": lambda g, p, all_: np.flip(g),
    "one axis negative": lambda g, p, all_: np.flip(g, 0) if g.ndim else g,
    "broadcast": lambda g, p, all_: np.broadcast_to(g.dtype.type(0.5), g.shape),
    "broadcast rows": lambda g, p, all_: np.broadcast_to(g[:1], g.shape) if g.ndim else g,
    "read-only": lambda g, p, all_: frozen(g),
    "subclass": lambda g, p, all_: g.view(Sub),
    "foreign": lambda g, p, all_: Foreign(g),
    "misaligned": lambda g, p, all_: misaligned(g),
    "scalar": lambda g, p, all_: g.dtype.type(0.25) if not g.ndim else g,
    "zeros": lambda g, p, all_: np.zeros_like(g),
    "its parameter": lambda g, p, all_: p.data,
    "its parameter, reversed": lambda g, p, all_: np.flip(p.data),
    "its parameter, transposed": lambda g, p, all_: p.data.T if p.data.shape == p.data.T.shape else p.data,
    "a broadcast element of its parameter": lambda g, p, all_: (
        np.broadcast_to(p.data.reshape(-1)[:1].reshape(()), g.shape) if g.size else g
    ),
    "another parameter": lambda g, p, all_: next(
        (q.data for q in all_ if q is not p and q.data.shape == g.shape and q.data.dtype == g.dtype), g
    ),
}
BAD = {
    "another dtype": lambda g, p, all_: g.astype(other(g.dtype)),
    "ints": lambda g, p, all_: g.astype("int32"),
    "big-endian": lambda g, p, all_: g.astype(g.dtype.newbyteorder()),
    "one more": lambda g, p, all_: np.zeros((*g.shape, 1), g.dtype),
    "longer": lambda g, p, all_: np.zeros(g.size + 1, g.dtype),
    "list": lambda g, p, all_: g.tolist(),
    "number": lambda g, p, all_: 1.0,
}
KIND_OF_GRADIENT = st.one_of(
    st.sampled_from([*GOOD]),
    st.sampled_from(["plain", "plain", "none", "stored", "same as the first", *(f"state {i}" for i in range(3))]),
)
SHAPES = st.sampled_from([(), (1,), (5,), (3, 4), (4, 4), (2, 3, 4), (0,), (0, 3), (1, 3), (17,), (40, 50)])
ORDERS = st.sampled_from(["C", "F", "rolled"])
INDEX = st.integers(0, 30)
BAD_NUMBERS = [-1.0, math.nan, "x", 1e39, 1e-60]


def laid(array, order):
    if order == "rolled":
        return np.moveaxis(np.array(np.moveaxis(array, 0, -1), order="C"), -1, 0) if array.ndim else array
    return np.array(array, order=order)


def effective(array):
    """Strides of the axes that have a second element."""
    return [(n, s) for n, s in zip(array.shape, array.strides, strict=True) if n > 1] if array.size else []


def dense(array):
    expected = array.itemsize
    for n, stride in sorted(effective(array), key=lambda x: x[1]):
        if stride != expected:
            return False
        expected *= n
    return True


def sound(array):
    return (
        type(array) is np.ndarray
        and array.dtype in (np.dtype("float32"), np.dtype("float64"))
        and array.flags.writeable
        and array.flags.aligned
        and dense(array)
    )


def faults(opt, grads):
    """What makes a step illegal, and what may: two lists of (parameter, what)."""
    wrong, doubtful, seen = [], [], []
    for i, (p, g) in enumerate(zip(params_of(opt), grads, strict=True)):
        state = opt.state.get(p) or {}
        arrays = {k: v for k, v in state.items() if isinstance(v, np.ndarray)}
        found = wrong if g is not None else doubtful
        if not sound(p.data):
            found.append((i, "is not sound"))
        for key, value in arrays.items():
            if not (sound(value) and value.shape == p.data.shape and value.dtype == p.data.dtype):
                found.append((i, f"{key} is not sound"))
            elif effective(value) != effective(p.data):
                found.append((i, f"{key} lies in another order"))
            elif value.strides != p.data.strides:
                doubtful.append((i, f"{key} has other strides of no effect"))
        for key, a in {"its data": p.data, **arrays}.items():
            for other_key, b, active in seen:
                if a.size and b.size and np.may_share_memory(a, b):
                    (wrong if active and g is not None else doubtful).append((i, f"{key} overlaps {other_key}"))
            seen.append((f"{key} of {i}", a, g is not None))
    return wrong, doubtful


def canonical(shot):
    """In bits, any NaN as good as another."""
    out = []
    for _, data, state in shot:
        arrays = {"": data, **{k: v for k, v in state.items() if isinstance(v, np.ndarray)}}
        numbers = {
            k: (v.dtype, v.shape, np.where(np.isnan(v), np.nan, v).astype(v.dtype).tobytes() if v.dtype.kind == "f"
                else v.tobytes())
            for k, v in arrays.items()
        }  # fmt: skip
        out.append((numbers, {k: (type(v), v) for k, v in state.items() if not isinstance(v, np.ndarray)}))
    return out


DONE = {"steps": 0, "refused": 0, "doubtful": 0, "stopped": 0, "games": 0, "copies": 0}


class Game(RuleBasedStateMachine):
    """An optimizer and what a user may do to it."""

    opt = None
    seed = 0

    def fresh(self, shape, dtype, order="C"):
        self.seed += 1
        return laid(random(shape, dtype, self.seed), order)

    def pick(self, i):
        params = params_of(self.opt)
        return params[i % len(params)]

    def arrays(self, p):
        return {k: v for k, v in (self.opt.state.get(p) or {}).items() if isinstance(v, np.ndarray)}

    @initialize(
        kind=st.sampled_from(range(len(KINDS))),
        shapes=st.lists(SHAPES, min_size=1, max_size=4),
        dtype=st.sampled_from(["float32", "float64"]),
        order=ORDERS,
    )
    def begin(self, kind, shapes, dtype, order):
        cls, options = KINDS[kind]
        self.dtype = dtype
        COUNTDOWN[0] = 0
        params = [pyopt.Parameter(self.fresh(s, dtype, order)) for s in shapes]
        self.opt = STOPPING[cls](
            [{"params": params[:2]}, {"params": params[2:], "lr": 0.25}] if params[2:] else params, **options
        )
        DONE["games"] += 1

    # --- steps

    def gradient(self, kind, p, first):
        if kind == "none":
            return None
        if kind == "stored":
            return p.grad
        if kind == "same as the first" and isinstance(first, np.ndarray) and first.shape == p.data.shape:
            return first if first.dtype == p.data.dtype else None
        if kind.startswith("state"):
            values = [v for v in self.arrays(p).values() if v.shape == p.data.shape and v.dtype == p.data.dtype]
            return values[int(kind[-1]) % len(values)] if values else None
        g = self.fresh(p.data.shape, p.data.dtype if p.data.dtype.kind == "f" else "float32")
        return (GOOD | BAD).get(kind, GOOD["plain"])(g, p, params_of(self.opt))

    @rule(
        kinds=st.lists(KIND_OF_GRADIENT, min_size=1, max_size=8),
        bad=st.one_of(st.none(), st.none(), st.none(), st.sampled_from([*BAD])),
        given=st.booleans(),
        stop=st.one_of(st.just(0), st.just(0), st.integers(1, 30)),
        times=st.integers(1, 3),
    )
    def step(self, kinds, bad, given, stop, times):
        params = params_of(self.opt)
        grads = []
        for i, p in enumerate(params):
            grads.append(self.gradient(kinds[i % len(kinds)], p, grads[0] if grads else None))
        where = None
        if bad is not None and params:
            where = len(kinds) % len(params)
            grads[where] = self.gradient(bad, params[where], None)
        for p, g in zip(params, grads, strict=True):
            if not given:
                p.grad = g
        for _ in range(times):
            self.one_step(grads, where, given, stop)
            stop = 0

    @rule(kinds=st.lists(st.sampled_from([*GOOD, "none"]), min_size=1, max_size=8), times=st.integers(1, 3))
    def mend_and_step(self, kinds, times):
        self.mend("C")
        self.step(kinds, None, True, 0, times)

    @rule(kinds=st.lists(st.sampled_from([*GOOD, "none"]), min_size=1, max_size=8), stop=st.integers(1, 20))
    def mend_and_stop(self, kinds, stop):
        self.mend("F")
        self.step(kinds, None, False, stop, 2)

    def one_step(self, grads, bad, given, stop):
        arrays = []
        for p, g in zip(params_of(self.opt), grads, strict=True):
            g = g.array if isinstance(g, Foreign) else g
            fits = g is None or (getattr(g, "shape", None) == p.data.shape and getattr(g, "dtype", 0) == p.data.dtype)
            bad = bad if fits else 0
            arrays.append(np.array(g) if fits and g is not None else g)
        wrong, doubtful = faults(self.opt, grads)
        before = snapshot(self.opt)
        noted = canonical(before)
        COUNTDOWN[0] = stop
        try:
            self.opt.step(grads=grads) if given else self.opt.step()
        except Stop:
            assert stop
            DONE["stopped"] += 1
            assert canonical(snapshot(self.opt)) == noted, "stopped, and something has changed"
        except (TypeError, ValueError, KeyError) as error:
            assert canonical(snapshot(self.opt)) == noted, "refused, and something has changed"
            assert wrong or doubtful or bad is not None, f"a legal step is refused: {error!r}"
            assert "parameter" in str(error), f"which parameter? {error!r}"
            DONE["refused"] += 1
        else:
            assert not wrong and bad is None, f"must be refused: {wrong}, gradient {bad}"
            expected = canonical(advance(self.opt, before, arrays))
            now = canonical(snapshot(self.opt))
            if doubtful:
                active = [i for i, g in enumerate(grads) if g is not None]
                assert [now[i] for i in active] == [expected[i] for i in active] or any(
                    "overlaps" in d for d in doubtful
                )
                DONE["doubtful"] += 1
            else:
                assert now == expected, "the step is not the oracle's"
            DONE["steps"] += 1
        finally:
            COUNTDOWN[0] = 0

    # --- groups

    @rule(shapes=st.lists(SHAPES, max_size=3), order=ORDERS, lr=st.sampled_from([0.1, 0.5]))
    def add_group(self, shapes, order, lr):
        if len(params_of(self.opt)) < 8:
            params = [pyopt.Parameter(self.fresh(s, self.dtype, order)) for s in shapes]
            try:
                self.opt.add_param_group({"params": params, "lr": lr})
            except (TypeError, ValueError, KeyError):
                assert any(faults(self.opt, [None] * len(params_of(self.opt)))), "a good group is refused"

    @rule(i=INDEX)
    def remove_group(self, i):
        groups = self.opt.param_groups
        if len(groups) > 1:
            group = groups.pop(i % len(groups))
            refs = []
            for p in group["params"]:
                refs += [weakref.ref(a) for a in [p, p.data, *self.arrays(p).values()]]
                self.opt.state.pop(p, None)
            p = None
            del group, p
            self.are_freed(refs)
        if not params_of(self.opt):
            self.opt.param_groups[0]["params"].append(pyopt.Parameter(self.fresh((3,), self.dtype)))

    @rule(shape=SHAPES, dtype=st.sampled_from(["float32", "float64"]), i=INDEX)
    def append_parameter(self, shape, dtype, i):
        if len(params_of(self.opt)) < 8:
            groups = self.opt.param_groups
            groups[i % len(groups)]["params"].append(pyopt.Parameter(self.fresh(shape, dtype)))

    @rule(i=INDEX)
    def remove_parameter(self, i):
        params = self.opt.param_groups[i % len(self.opt.param_groups)]["params"]
        if len(params_of(self.opt)) > 1 and params:
            p = params.pop(i % len(params))
            self.opt.state.pop(p, None)

    @rule(i=INDEX)
    def swap_groups(self, i):
        self.opt.param_groups.append(self.opt.param_groups.pop(i % len(self.opt.param_groups)))

    @rule(i=INDEX, lr=st.sampled_from([0.0, 0.01, 0.1, 1, np.float32(0.3)]), maximize=st.booleans())
    def change_options(self, i, lr, maximize):
        group = self.opt.param_groups[i % len(self.opt.param_groups)]
        group["lr"], group["maximize"], group["note"] = lr, maximize, f"{lr}"
        if "betas" in group and maximize:
            group["betas"] = (0.5, 0.75)

    @rule(
        i=INDEX, key=st.sampled_from(["lr", "weight_decay"]), value=st.sampled_from([-1.0, math.nan, "x", 1e39, 1e-60])
    )
    def spoil_options(self, i, key, value):
        group = self.opt.param_groups[i % len(self.opt.param_groups)]
        good, group[key] = group[key], value
        noted = canonical(snapshot(self.opt))
        grads = [random(p.data.shape, p.data.dtype, 3) if p.data.dtype.kind == "f" else None for p in group["params"]]
        types = {p.data.dtype for p, g in zip(group["params"], grads, strict=True) if g is not None}
        given = [grads.pop(0) if any(p is q for q in group["params"]) else None for p in params_of(self.opt)]
        if isinstance(value, str) or not value > 0 or types == {np.dtype("float32")}:
            for _ in range(2):
                try:
                    self.opt.step(grads=given)
                    raise AssertionError(f"{key}={value} must be refused")
                except (TypeError, ValueError, KeyError):
                    assert canonical(snapshot(self.opt)) == noted
        group[key] = good

    # --- arrays: rebound

    @rule(i=INDEX, order=ORDERS)
    def rebind_data(self, i, order):
        """In the order that its state has, or without state in any."""
        p = self.pick(i)
        ref = weakref.ref(p.data)
        if not self.arrays(p):
            p.data = self.fresh(p.data.shape, self.dtype, order)
        elif p.data.dtype.kind == "f":  # not while it is set to another type
            new = np.empty_like(p.data)
            new[...] = p.data
            p.data = new
        del p
        self.are_freed([ref])

    @rule(i=INDEX, shape=SHAPES, dtype=st.sampled_from(["float32", "float64"]), keep=st.booleans())
    def rebind_data_to_another_form(self, i, shape, dtype, keep):
        p = self.pick(i)
        p.data = self.fresh(shape, dtype)
        if not keep:
            self.opt.state.pop(p, None)

    @rule(i=INDEX)
    def rebind_state(self, i):
        p = self.pick(i)
        for key, value in self.arrays(p).items():
            new = np.empty_like(value)
            new[...] = np.square(random(value.shape, seed=i)) + (5 if "sq" in key else 0)
            self.opt.state[p][key] = new

    @rule(i=INDEX, how=st.sampled_from(["F", "strided", "shape", "dtype", "length", "misaligned", "copy", "broadcast"]))
    def spoil_state(self, i, how):
        p = self.pick(i)
        for key, v in list(self.arrays(p).items())[:1]:
            self.opt.state[p][key] = {
                "F": lambda v: laid(v, "F"),
                "strided": lambda v: np.repeat(v, 2, -1)[..., ::2] if v.ndim else v.copy(),
                "shape": lambda v: np.zeros((*v.shape, 1), v.dtype),
                "dtype": lambda v: v.astype(other(v.dtype)),
                "length": lambda v: np.zeros(v.size + 1, v.dtype),
                "misaligned": misaligned,
                "copy": lambda v: v.copy("K"),
                "broadcast": lambda v: np.broadcast_to(np.zeros((), v.dtype), v.shape),
            }[how](v)

    # --- arrays: in place

    @rule(i=INDEX, with_state=st.booleans())
    def transpose_in_place(self, i, with_state):
        p = self.pick(i)
        for array in [p.data, *(self.arrays(p).values() if with_state else ())]:
            if array.ndim == 2 and array.shape[0] == array.shape[1]:
                in_place(array, strides=array.strides[::-1])

    @rule(i=INDEX, how=st.sampled_from(["flat", "extra axis", "column"]), with_state=st.booleans())
    def reshape_in_place(self, i, how, with_state):
        p = self.pick(i)
        for array in [p.data, *(self.arrays(p).values() if with_state else ())]:
            shape = {"flat": (array.size,), "extra axis": (1, *array.shape), "column": (array.size, 1)}[how]
            if array.flags.c_contiguous and len(shape) < 6:
                in_place(array, shape=shape)

    @rule(i=INDEX, size=st.sampled_from([0, 1, 4, 100, 5000]), with_state=st.booleans())
    def resize_in_place(self, i, size, with_state):
        p = self.pick(i)
        for array in [p.data, *(self.arrays(p).values() if with_state else ())]:
            if array.flags.owndata and array.flags.c_contiguous and array.flags.writeable and not self.is_viewed(array):
                array.resize(size, refcheck=False)

    def is_viewed(self, array):
        """Whether another array of the game lies in its memory, which a resize frees."""
        params = params_of(self.opt)
        others = [a for p in params for a in (p.data, p.grad, *self.arrays(p).values())]
        others = [getattr(a, "array", a) for a in others]
        return any(
            a is not array and np.may_share_memory(a, array) for a in others if isinstance(a, np.ndarray) and a.size
        )

    @rule(i=INDEX, with_state=st.booleans())
    def retype_in_place(self, i, with_state):
        p = self.pick(i)
        if not with_state:
            in_place(p.data, dtype="int32" if p.data.itemsize == 4 else "int64")
        for array in self.arrays(p).values() if with_state else ():
            in_place(array, dtype=f"i{array.itemsize}")

    @rule(i=INDEX, value=st.sampled_from([-1.0, 0.5]))
    def write_in_place(self, i, value):
        p = self.pick(i)
        if p.data.flags.writeable and p.data.dtype.kind == "f":
            p.data[...] = value

    @rule(i=INDEX, state=st.booleans())
    def make_read_only(self, i, state):
        p = self.pick(i)
        for array in list(self.arrays(p).values())[:1] if state else [p.data]:
            array.flags.writeable = False

    # --- arrays: shared, freed

    @rule(i=INDEX, j=INDEX, part=st.booleans())
    def alias_data(self, i, j, part):
        p, q = self.pick(i), self.pick(j)
        data = q.data.reshape(-1)[1:] if part and q.data.flags.c_contiguous and q.data.size > 1 else q.data
        if p is not q and data.flags.writeable and data.dtype.kind == "f":
            p.data = data
            self.opt.state.pop(p, None)

    @rule(i=INDEX, j=INDEX)
    def alias_state(self, i, j):
        p, q = self.pick(i), self.pick(j)
        for key in list(self.arrays(p))[:1]:
            self.opt.state[p][key] = [*self.arrays(q).values(), q.data][-1]

    @rule(i=INDEX)
    def neighbours(self, i):
        """Parameters side by side in one array: legal."""
        params = [p for p in params_of(self.opt) if p.data.dtype == self.dtype and sound(p.data)]
        memory = self.fresh((sum(p.data.size for p in params) + 1,), self.dtype)
        at = i % 2
        for p in params:
            if self.arrays(p) and not p.data.flags.c_contiguous:
                continue
            p.data = memory[at : at + p.data.size].reshape(p.data.shape)
            at += p.data.size

    @rule(i=INDEX)
    def drop_state(self, i):
        p = self.pick(i)
        refs = [weakref.ref(a) for a in self.arrays(p).values()]
        self.opt.state.pop(p, None)
        self.are_freed(refs)

    @rule()
    def drop_all_state(self):
        refs = [weakref.ref(a) for p in params_of(self.opt) for a in self.arrays(p).values()]
        self.opt.state.clear()
        self.are_freed(refs)

    @rule()
    def drop_gradients(self):
        refs = [weakref.ref(p.grad) for p in params_of(self.opt) if type(p.grad) is np.ndarray]
        self.opt.zero_grad()
        self.are_freed(refs)

    def are_freed(self, refs):
        """What lives on is held by what the optimizer itself shows: a parameter, a gradient, a state."""
        if any(ref() is not None for ref in refs):
            gc.collect()
        shown = []
        for p in params_of(self.opt):
            for a in [p, p.data, p.grad, *self.arrays(p).values()]:
                while a is not None:
                    shown.append(a)
                    a = getattr(a, "base", getattr(a, "array", None))
        for ref in refs:
            array = ref()
            assert array is None or any(array is a for a in shown), "the optimizer holds what was let go"

    # --- the rest

    @rule(n=st.integers(1, 4))
    def set_threads(self, n):
        pyopt.set_num_threads(n)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "save and load", "load into another"]))
    def copies(self, how):
        wrong, doubtful = faults(self.opt, [np.ones(1)] * len(params_of(self.opt)))
        if wrong or doubtful:  # a damaged optimizer need not be saved
            return
        noted = canonical(snapshot(self.opt))
        if how == "deepcopy":
            self.opt = copy.deepcopy(self.opt)
        elif how == "pickle":
            self.opt = pickle.loads(pickle.dumps(self.opt))
        elif how == "save and load":
            saved = self.opt.state_dict()
            for p in params_of(self.opt):
                for array in self.arrays(p).values():
                    array += 1
            self.opt.load_state_dict(saved)
        else:
            groups = [
                {**g, "params": [pyopt.Parameter(p.data.copy("K"), p.grad) for p in g["params"]]}
                for g in self.opt.param_groups
            ]
            new = type(self.opt)(groups)
            new.load_state_dict(self.opt.state_dict())
            self.opt = new
        assert canonical(snapshot(self.opt)) == noted
        DONE["copies"] += 1

    def mended(self):
        params = params_of(self.opt)
        wrong, doubtful = faults(self.opt, [np.ones(1)] * len(params))
        return not (wrong or doubtful)

    @rule(order=ORDERS)
    def mend(self, order):
        """What is not sound, or overlaps, is replaced, and begins anew."""
        for _ in range(len(params_of(self.opt)) + 1):
            wrong, doubtful = faults(self.opt, [np.ones(1)] * len(params_of(self.opt)))
            for i in sorted({i for i, _ in wrong + doubtful}):
                p = params_of(self.opt)[i]
                p.data = self.fresh(p.data.shape if p.data.size < 1000 else (7,), self.dtype, order)
                self.opt.state.pop(p, None)
        assert self.mended()

    def teardown(self):
        COUNTDOWN[0] = 0
        path = os.environ.get("PYOPT_PROPERTY_LOG")
        if path:
            with open(path, "w") as file:
                file.write(", ".join(f"{n} {what}" for what, n in DONE.items()))


EXAMPLES = int(os.environ.get("PYOPT_EXAMPLES", 0))


def test_steps_are_the_oracles_or_change_nothing(tmp_path, monkeypatch):
    path = tmp_path / "done"
    monkeypatch.setenv("PYOPT_PROPERTY_LOG", str(path))
    isolated(play, 120 if not EXAMPLES else 36_000)()
    print(path.read_text())
    done = {what: int(n) for n, what in (part.split() for part in path.read_text().split(", "))}
    assert done["steps"] > 100 and done["refused"] and done["stopped"] and done["copies"], done


def play():
    before = pyopt.get_num_threads()
    try:
        run_state_machine_as_test(
            Game,
            settings=settings(
                max_examples=EXAMPLES or 100,
                stateful_step_count=50,
                deadline=None,
                derandomize=not EXAMPLES,
                database=None,
                phases=[Phase.generate, Phase.shrink] if os.environ.get("PYOPT_SHRINK") else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        pyopt.set_num_threads(before)


@pytest.mark.parametrize("kind", range(len(KINDS)))
@isolated
def test_a_long_plain_game(kind):
    """Every kind of gradient in turn, without anything else: all steps are the oracle's."""
    game = Game()
    game.begin(kind, [(4, 4), (5,), (3, 4), (), (4, 4)], "float32", "F")
    for name in [*GOOD, *GOOD]:
        before = DONE["steps"]
        game.step([name, "plain", "F"], None, True, 0, 2)
        assert DONE["steps"] == before + 2
