"""pyopt.save and pyopt.load: round trips to the bit, all or nothing, whatever is in the file and whoever is killed."""

from __future__ import annotations

import copy
import json
import math
import os
import random as python_random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from contextlib import suppress
from operator import setitem
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyopt
from all_optimizers import CASES, TYPES, Own, bits, go_on, make, params_of, random, values
from apart import apart
from pyopt import LBFGS, SGD, Adafactor, Adam, AdamW, Lion, Muon, Parameter, averaging
from pyopt._xxh64 import xxh64
from pyopt.files import container, plain, replacing
from pyopt.files.container import BEGIN, DIGITS, PIECE, ZEROS, Container
from pyopt.files.inspecting import described
from pyopt.files.progress import Progress
from pyopt.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

STORED = Path(__file__).parent / "stored" / "version_1.safetensors"
KILLS = int(os.environ.get("PYOPT_TEST_KILLS", "30"))


class Average:
    """A stand-in with the interface of pyopt.averaging."""

    def __init__(self, opt, fails=False):
        self.opt, self.fails = opt, fails
        self.n_averaged, self.averages = 0, [p.data.copy() for p in params_of(opt)]

    def update(self):
        self.n_averaged += 1
        for average, p in zip(self.averages, params_of(self.opt), strict=True):
            average += (p.data - average) / self.n_averaged

    def state_dict(self):
        return {"kind": "Average", "n_averaged": self.n_averaged, "averages": list(self.averages)}

    def _check(self, sd):
        if self.fails or sd["kind"] != "Average" or len(sd["averages"]) != len(self.averages):
            raise ValueError("state of another average")

    def load_state_dict(self, sd):
        self._check(sd)
        self.n_averaged = sd["n_averaged"]
        self.averages = [np.array(a) for a in sd["averages"]]


class AverageInTheCommit(Average):
    """One that gives its writes, to be done with all others."""

    def load_state_dict(self, sd):
        raise AssertionError("_load_writes was not used")

    def _load_writes(self, sd):
        self._check(sd)
        return [
            (setattr, self, "n_averaged", sd["n_averaged"]),
            *((setitem, a, ..., b) for a, b in zip(self.averages, sd["averages"], strict=True)),
        ]


def seen(opt, *others):
    """All that a load may change, with the identity of arrays."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    ids = [id(v) for p in params_of(opt) for v in opt.state.get(p, {}).values() if isinstance(v, np.ndarray)]
    return copy.deepcopy((values(opt), groups, ids, [bits_of(other.state_dict()) for other in others]))


def bits_of(x):
    """Nested plain data, to be compared: types, NaNs and arrays to the bit."""
    if isinstance(x, dict):
        return {key: bits_of(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x), [bits_of(item) for item in x]
    if isinstance(x, float):
        return float, x.hex(), math.copysign(1, x)
    return bits(x)


# --- round trips ------------------------------------------------------------------------------------------------------

MATRICES = [
    pytest.param(Adafactor, {}, id="Adafactor"),
    pytest.param(LBFGS, {}, id="LBFGS"),
    pytest.param(pyopt.LAMB, {}, id="LAMB"),
    pytest.param(pyopt.LARS, {"momentum": 0.9}, id="LARS"),
    pytest.param(pyopt.Prodigy, {}, id="Prodigy"),
]
ALL = pytest.mark.parametrize("cls, options", [*CASES.args[1], *MATRICES])


def stepped(cls, options, dtype="float32", steps=0, **kwargs):
    if cls is not LBFGS:
        return make(cls, options, dtype, steps, **kwargs)
    opt, params = make(cls, options, dtype, 0, **kwargs)
    for _ in range(steps):
        opt.step(lambda: closure(params))
    return opt, params


def closure(params):
    for p in params:
        p.grad = 2 * p.data
    return float(sum((p.data**2).sum() for p in params))


@TYPES
@ALL
def test_round_trip(cls, options, dtype, tmp_path):
    """What is loaded is what was saved, to the bit, and both go on alike."""
    path = tmp_path / "run.safetensors"
    opt, _ = stepped(cls, options, dtype, steps=3)
    pyopt.save(path, opt)
    new, others = stepped(cls, options, dtype)
    for q in others:
        q.data[...] = 7
    assert pyopt.load(path, new) is None
    assert bits_of(new.state_dict()) == bits_of(opt.state_dict())
    assert bits_of(values(new)) == bits_of(values(opt))
    assert list(tmp_path.iterdir()) == [path]
    if cls is LBFGS:
        for _ in range(2):
            for o in (opt, new):
                o.step(lambda o=o: closure(params_of(o)))
        assert bits_of(values(new)) == bits_of(values(opt))
    else:
        go_on(opt, new)


@ALL
@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_is_written_in_place(cls, options, order, tmp_path):
    """Parameters always, in their memory order; state where there is a fitting array."""
    if cls is pyopt.RowwiseAdagrad and order == "F":
        pytest.skip("its tables are in C order")
    path = tmp_path / "run"
    opt, _ = stepped(cls, options, steps=3)
    pyopt.save(path, opt)
    new, others = stepped(cls, options, steps=1, order=order)
    held = [(p.data, dict(new.state.get(p, {}))) for p in others]
    pyopt.load(path, new)
    assert bits_of(values(new)) == bits_of(values(opt))
    for p, (data, entry) in zip(others, held, strict=True):
        assert p.data is data
        for name, array in entry.items():
            if isinstance(array, np.ndarray) and array.shape == p.data.shape and cls is not LBFGS:
                assert new.state[p][name] is array


def test_muon(tmp_path):
    opt, _ = make(Muon, {}, steps=2, shapes=((3, 4), (5, 2)))
    pyopt.save(tmp_path / "run", opt)
    new, _ = make(Muon, {}, shapes=((3, 4), (5, 2)))
    pyopt.load(tmp_path / "run", new)
    assert values(new) == values(opt)


def test_saved_again_is_the_same_file(tmp_path):
    opt, _ = make(Adam, steps=3)
    pyopt.save(tmp_path / "a", opt, extra={"x": np.arange(3)})
    new, _ = make(Adam)
    pyopt.save(tmp_path / "b", new, extra=pyopt.load(tmp_path / "a", new))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("layout", [(3 * PIECE + 5,), (2, PIECE // 2 + 3), (3, 1, PIECE // 4 + 1), (PIECE // 8, 5, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays(layout, order, tmp_path):
    """Of several pieces, in any memory order; between small ones."""
    arrays = {"a": random(3), "big": np.array(random(layout), order=order), "z": random((2, 2))}
    opt = SGD(arrays, momentum=0.9)
    opt.step(grads=[random(a.shape, seed=i) for i, a in enumerate(arrays.values())])
    pyopt.save(tmp_path / "run", opt)
    new = SGD({name: np.zeros_like(a) for name, a in arrays.items()}, momentum=0.9)
    pyopt.load(tmp_path / "run", new)
    assert values(new) == values(opt)
    tensors = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "run")
    assert all(bits(tensors[f"parameters.{name}"]) == bits(np.array(a, order="C")) for name, a in arrays.items())


@pytest.mark.parametrize("cls, options", [(Adam, {"amsgrad": True}), (Own, {}), (Lion, {})])
def test_resumed_run_is_the_uninterrupted_one(cls, options, tmp_path):
    """Schedule, average and extra too, resumed at each step in a new optimizer."""

    def run():
        opt, _ = make(cls, options)
        warmup = LinearLR(opt, total_iters=3)
        return opt, SequentialLR(opt, [warmup, CosineAnnealingLR(opt, T_max=9)], [3]), Average(opt)

    def go(opt, schedule, average, rng):
        for p in params_of(opt):
            p.grad = rng.standard_normal(p.data.shape).astype(p.data.dtype)
        opt.step()
        schedule.step()
        average.update()

    whole, rng = run(), np.random.default_rng(3)
    parts, other = run(), np.random.default_rng(3)
    for _ in range(8):
        opt, schedule, average = parts
        pyopt.save(tmp_path / "run", opt, schedulers=[schedule], averages=[average], extra=other.bit_generator.state)
        parts, other = run(), np.random.default_rng()
        opt, schedule, average = parts
        other.bit_generator.state = pyopt.load(tmp_path / "run", opt, schedulers=[schedule], averages=[average])
        go(*whole, rng)
        go(*parts, other)
        assert seen(*whole)[0::3] == seen(*parts)[0::3]
        assert whole[0].param_groups[0]["lr"] == parts[0].param_groups[0]["lr"]


# --- what is in the file ----------------------------------------------------------------------------------------------


def test_library_reads_it(tmp_path):
    """The safetensors library takes the file, by names that people understand."""
    library = pytest.importorskip("safetensors")
    opt = Adam({"w": random((3, 4), "float64"), "head": {"b": random(5)}})
    opt.step(grads=[random((3, 4), "float64"), random(5)])
    extra = {"flag": np.array([True]), "ids": np.arange(3, dtype=np.uint8), "": np.zeros((0, 3), np.int16)}
    pyopt.save(tmp_path / "run", opt, extra=extra, averages=[Average(opt)])
    with library.safe_open(tmp_path / "run", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["format"] == "pyopt"
        assert file.metadata()["version"] == "1"
    assert tensors.keys() == {
        *("parameters.w", "state.w.exp_avg", "state.w.exp_avg_sq", "averages.0.averages.0"),
        *("parameters.head.b", "state.head.b.exp_avg", "state.head.b.exp_avg_sq", "averages.0.averages.1"),
        *("extra.flag", "extra.ids", "extra."),
    }
    for name, p in zip(("w", "head.b"), params_of(opt), strict=True):
        assert bits(tensors[f"parameters.{name}"]) == bits(p.data)
        assert bits(tensors[f"state.{name}.exp_avg_sq"]) == bits(opt.state[p]["exp_avg_sq"])
    file = Container(tmp_path / "run")
    assert all((file.start + place.begin) % place.dtype.itemsize == 0 for place in file.places.values())


EXTRAS = [
    *(
        None,
        True,
        0,
        -1,
        2**200,
        0.1,
        -0.0,
        5e-324,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
        "",
        "é\n\0\ud800",
        [],
        (),
        {},
    ),
    *([1, [2.0, (3, None)]], (1, (2, [])), {"a": {"b": 1}, "$float": "nan"}, {1: "a", None: 2, (3, 4): 5, False: 6}),
    *(np.arange(3), np.float32(1.5), np.int64(7), {"$array": 3}, {"": {"": [np.zeros((2, 0))]}}, np.array(3.5)),
    *(np.array([1, 2], ">i4"), np.arange(6.0).reshape(2, 3).T, np.array([1 + 2j], np.complex64), np.array([True])),
    *(np.arange(10)[::-3], np.float16([1.5, math.nan]), OrderedDict(b=1, a=2), {"same": np.ones(2), "sa.me": 3}),
]


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda x: repr(x)[:30].encode("ascii", "replace").decode())
def test_extra(extra, tmp_path):
    """Numbers exactly, NaN and inf, tuples, keys that are no strings; arrays of any layout."""
    opt, _ = make(Adam)
    pyopt.save(tmp_path / "run", opt, extra=extra)
    loaded = pyopt.load(tmp_path / "run", opt)
    expected = extra
    if isinstance(extra, np.generic):
        expected = extra.item()
    elif isinstance(extra, np.ndarray):
        expected = np.array(extra, extra.dtype.newbyteorder("="), order="C")
        assert loaded.flags.writeable
        assert loaded.flags.owndata or loaded.base is not None
    elif type(extra) is OrderedDict:
        expected = dict(extra)
    assert bits_of(loaded) == bits_of(expected)
    assert list(loaded) == list(expected) if type(expected) is dict else True


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8) | st.integers() | st.none(), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=200)
@given(PLAIN)
def test_any_plain_data(value):
    encoder = plain.Encoder(lambda where, value: None)
    text = container.dumped(encoder.encode(value, "extra"))
    assert bits_of(plain.decoded(json.loads(text), None)) == bits_of(value)


def circle():
    x = []
    x.append(x)
    return x


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"f": len}, r"extra\.f is a builtin_function_or_method, must be numbers, strings"),
        ([1, {2}], r"extra\.1 is a set"),
        (b"x", "extra is a bytes"),
        (1j, "extra is a complex"),
        (np.array(["a"]), "extra has dtype <U1, which safetensors has not"),
        (np.array([None]), "extra has dtype object"),
        (np.array([1j]), "extra has dtype complex128"),
        (np.ma.zeros(3), "extra is a MaskedArray"),
        (circle(), "extra is nested too deep, or contains itself"),
        ({(1, len): 1}, "a key of extra"),
    ],
)
def test_extra_that_is_no_plain_data(extra, message, tmp_path):
    """An error that says where it stands; no file is made, and one that was there stays."""
    opt, _ = make(Adam)
    path = tmp_path / "run"
    for before in (None, b"before"):
        if before:
            path.write_bytes(before)
        with pytest.raises((TypeError, ValueError), match=message):
            pyopt.save(path, opt, extra=extra)
        assert list(tmp_path.iterdir()) == ([path] if before else [])
        assert before is None or path.read_bytes() == before


def test_options_survive_exactly(tmp_path):
    """Of the user's own optimizer and keys: NaN, inf, tuples, ints, keys that are no strings."""
    own = {"nan": math.nan, "inf": -math.inf, "pair": (0.1, (1, 2)), 7: {1: [2]}, "none": None, "big": 2**70, "f": 1.0}
    opt = Own([{"params": [Parameter(random(3))], **own}], lr=0.1 + 0.2)
    opt.state["rounds"] = {"n": (1, math.inf), "x": np.arange(2)}
    pyopt.save(tmp_path / "run", opt)
    new = Own([Parameter(random(3))])
    pyopt.load(tmp_path / "run", new)
    assert bits_of(new.state_dict()) == bits_of(opt.state_dict())
    assert type(new.param_groups[0]["f"]) is float
    assert type(new.param_groups[0]["pair"]) is tuple


@pytest.mark.parametrize(
    "names", [["a", "a"], [None, "b"], ["\ud800", "\\ud800"], ["x", "x (2)"], ["__metadata__", ""]]
)
def test_any_names(names, tmp_path):
    """Not unique, missing or strange: the arrays stay apart."""

    def new():
        return SGD([Parameter(random(3, seed=i), random(3), name=name) for i, name in enumerate(names)], momentum=0.5)

    opt = new()
    opt.step()
    opt.state[params_of(opt)[0]]["0.momentum_buffer"] = np.ones(2)
    pyopt.save(tmp_path / "run", opt)
    other = new()
    pyopt.load(tmp_path / "run", other)
    assert values(other) == values(opt)
    described(tmp_path / "run").encode("ascii")


def test_counters(tmp_path):
    opt, _ = make(Adam)
    opt.skipped_steps = 5
    pyopt.save(tmp_path / "run", opt)
    new, _ = make(Adam)
    new.skipped_steps = 0
    pyopt.load(tmp_path / "run", new)
    assert new.skipped_steps == 5


def test_stored_file_of_version_1():
    """A file of each version stays loadable."""
    opt = Adam({"w": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)})
    schedule, average = CosineAnnealingLR(opt, T_max=5), Average(opt)
    extra = pyopt.load(STORED, opt, schedulers=[schedule], averages=[average])
    expected_opt, expected_schedule, expected_average, expected_extra = stored_run()
    assert bits_of(extra) == bits_of(expected_extra)
    assert seen(opt, schedule, average)[0::3] == seen(expected_opt, expected_schedule, expected_average)[0::3]
    assert bits_of(opt.state_dict()) == bits_of(expected_opt.state_dict())


def stored_run():
    """What is in the stored file: `python tests/test_files.py` writes it, which only a new version should need."""
    w = np.array([[1, -2, 0.5], [1e30, 3, -0.0]], np.float32)
    opt = Adam({"w": w, "b": np.array(0.25, np.float32)}, lr=0.5, betas=(0.75, 0.5))
    schedule, average = CosineAnnealingLR(opt, T_max=5), Average(opt)
    for step in range(2):
        opt.step(grads=[np.full((2, 3), step + 0.5, np.float32), np.array(-1, np.float32)])
        schedule.step()
        average.update()
    return opt, schedule, average, {"epoch": 2, "best": math.nan, "pair": (1, 2.5), "ids": np.arange(3)}


# --- all or nothing ---------------------------------------------------------------------------------------------------


def saved(path, cls=Adam, options=None, **kwargs):
    opt, _ = make(cls, options, steps=2, **kwargs)
    schedule = CosineAnnealingLR(opt, T_max=9)
    schedule.step()
    average = Average(opt)
    average.update()
    pyopt.save(path, opt, schedulers=[schedule], averages=[average], extra={"x": np.arange(3)})
    return opt


def with_document(path, change, arrays=None):
    """Change the document of a file, its checksum right."""
    file = Container(path)
    arrays = file.arrays(lambda n: None) if arrays is None else arrays
    arrays = {name: np.array(array) for name, array in arrays.items()}
    document = json.loads(json.dumps(file.document))
    changed = change(document)
    del file  # Windows replaces no file that is mapped
    container.write(path, document if changed is None else changed, arrays, lambda n: None)


def set_in(*keys, value):
    def change(document):
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


WRONG = {
    "optimizer": (set_in("optimizer", value="AdamW"), "is of the optimizer AdamW, optimizer is a Adam"),
    "lr": (set_in("groups", 0, "lr", value=-1), "param group 0: lr == -1"),
    "lr nan": (set_in("groups", 0, "lr", value={"$float": "nan"}), "lr == nan"),
    "betas": (set_in("groups", 0, "betas", value={"$tuple": [0.9, 1.5]}), r"betas\[1\] == 1.5"),
    "flag": (set_in("groups", 0, "amsgrad", value=3), "amsgrad == 3"),
    "option": (lambda d: d["groups"][0].pop("eps") and None, "eps"),
    "groups": (set_in("groups", value=[]), "0 param groups, must have 1"),
    "group": (set_in("groups", value=[1]), "param group 0 is a int, must be a dict"),
    "indices": (set_in("groups", 0, "params", value=[0, 1, 3]), r"has parameters \[0, 1, 3\]"),
    "step": (set_in("state", 0, 1, "step", value=-2), "step == -2"),
    "step text": (set_in("state", 0, 1, "step", value="a"), "step == 'a'"),
    "step huge": (set_in("state", 0, 1, "step", value=10**400), "step == 1"),
    "no state": (lambda d: d["state"][1][1].pop("exp_avg") and None, "has no 'exp_avg'"),
    "state is none": (set_in("state", 0, 1, value=None), "is a NoneType, must be a dict"),
    "other shape": (
        set_in("state", 0, 1, "exp_avg", value={"$array": "state.2.exp_avg"}),
        r"has shape \(5,\), must be",
    ),
    "no array": (set_in("state", 0, 1, "exp_avg", value={"$array": "x"}), "has no array 'x'"),
    "number for array": (set_in("state", 0, 1, "exp_avg", value=1.5), "is a float, must be a numpy.ndarray"),
    "index": (set_in("state", 0, 0, value=3), "state of parameter 3, must be an int from 0 to 2"),
    "twice": (set_in("state", 0, 0, value=1), "has a key twice"),
    "unhashable": (set_in("state", 0, 0, value=[]), "has a key that cannot be one: unhashable"),
    "parameters": (lambda d: d["parameters"].pop() and None, "has 2 parameters, optimizer has 3"),
    "parameter": (set_in("parameters", 0, value="parameters.2"), r"parameter 0 has shape \(5,\) in the file"),
    "no parameter": (set_in("parameters", 0, value="y"), "has no array 'y'"),
    "parameter list": (set_in("parameters", value=3), "document without valid 'parameters'"),
    "tag": (set_in("extra", value={"$evil": 1}), "stands for nothing"),
    "tag twice": (set_in("extra", value={"$array": "x", "y": 1}), "stands for nothing"),
    "float": (set_in("extra", value={"$float": "1"}), "stands for nothing"),
    "keys": (set_in("extra", value={"$dict": [[1, 2], [1, 3]]}), "has a key twice"),
    "extra": (lambda d: d.pop("extra") and None, "document without valid 'extra'"),
    "schedulers": (set_in("schedulers", value=[]), "has schedulers none, given are CosineAnnealingLR"),
    "scheduler": (set_in("schedulers", 0, "state", "T_max", value=0), "T_max == 0"),
    "scheduler list": (set_in("schedulers", 0, "state", value=[]), "state_dict is a list, must be a dict"),
    "scheduler class": (set_in("schedulers", 0, "class", value="StepLR"), "has schedulers StepLR, given are Cos"),
    "averages": (set_in("averages", 0, "state", "averages", value=[]), "state of another average"),
    "averages form": (set_in("averages", 0, value=3), "document without valid 'averages'"),
    "counters": (set_in("counters", value={"skipped_steps": -1}), "skipped_steps == -1"),
    "deep": (lambda d: d.update(extra=json.loads("[" * 900 + "]" * 900)), "is nested too deep"),
}


def fresh():
    new, params = make(Adam, steps=1)
    new.skipped_steps = 0
    for p in params:
        p.data[...] = 3
    return new, CosineAnnealingLR(new, T_max=4), Average(new)


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_wrong_document(change, message, tmp_path):
    """Checksums right, content not: an error that names the file and the thing, and nothing has changed."""
    path = tmp_path / "run"
    saved(path)
    with_document(path, change)
    new, schedule, average = fresh()
    before = seen(new, schedule, average)
    with pytest.raises((KeyError, TypeError, ValueError), match=message) as caught:
        pyopt.load(path, new, schedulers=[schedule], averages=[average])
    assert str(path) in str(caught.value)
    assert seen(new, schedule, average) == before


@pytest.mark.parametrize(
    "cls, kwargs, message",
    [
        (AdamW, {}, "is of the optimizer Adam, optimizer is a AdamW"),
        (SGD, {}, "is of the optimizer Adam, optimizer is a SGD"),
        (Adam, {"shapes": ((3, 4), ())}, "has 3 parameters, optimizer has 2"),
        (Adam, {"shapes": ((4, 3), (), (5,))}, r"parameter 0 has shape \(3, 4\) in the file, must be \(4, 3\)"),
        (Adam, {"dtype": "float64"}, "parameter 0 has dtype float32 in the file, must be float64"),
    ],
)
def test_other_optimizer(cls, kwargs, message, tmp_path):
    saved(tmp_path / "run")
    new, _ = make(cls, steps=1, **kwargs)
    schedule, average = CosineAnnealingLR(new, T_max=4), Average(new)
    before = seen(new, schedule, average)
    with pytest.raises((TypeError, ValueError), match=message):
        pyopt.load(tmp_path / "run", new, schedulers=[schedule], averages=[average])
    assert seen(new, schedule, average) == before


def test_other_names(tmp_path):
    pyopt.save(tmp_path / "run", SGD({"a": random(3), "b": random(3)}))
    new = SGD({"b": np.zeros(3, np.float32), "c": np.zeros(3, np.float32)})
    message = r"has other parameters than optimizer: not \['c'\] and \['a'\], which optimizer has not"
    with pytest.raises(ValueError, match=message):
        pyopt.load(tmp_path / "run", new)
    assert not params_of(new)[0].data.any()


def test_read_only_parameter(tmp_path):
    saved(tmp_path / "run")
    new, schedule, average = fresh()
    params_of(new)[2].data.flags.writeable = False
    before = seen(new, schedule, average)
    with pytest.raises(ValueError, match="parameter 2 is read-only"):
        pyopt.load(tmp_path / "run", new, schedulers=[schedule], averages=[average])
    assert seen(new, schedule, average) == before


@pytest.mark.parametrize("kind", [Average, AverageInTheCommit])
def test_last_of_several_fails(kind, tmp_path):
    """The second scheduler or average: then the first has not changed either."""
    path = tmp_path / "run"
    opt, _ = make(SGD, {"momentum": 0.9}, steps=2)
    schedulers = [LambdaLR(opt, lambda step: 0.5**step)]
    averages = [kind(opt), kind(opt)]
    averages[0].update()
    pyopt.save(path, opt, schedulers=schedulers, averages=averages)
    new, _ = make(SGD, {"momentum": 0.9})
    for p in params_of(new):
        p.data[...] = 3
    objects = [LambdaLR(new, lambda step: 0.5**step), kind(new), kind(new, fails=True)]
    before = seen(new, *objects)
    with pytest.raises(ValueError, match="state of another average"):
        pyopt.load(path, new, schedulers=objects[:1], averages=objects[1:])
    assert seen(new, *objects) == before
    objects[2].fails = False
    pyopt.load(path, new, schedulers=objects[:1], averages=objects[1:])
    assert seen(new, *objects)[0::3] == seen(opt, *schedulers, *averages)[0::3]


def test_schedulers_of_all_kinds(tmp_path):
    """Compositions keep their parts, functions stay the user's, lr is that of the file."""

    def run():
        opt, _ = make(SGD, {"momentum": 0.9}, shapes=((2,), (3,)))
        parts = [LinearLR(opt, total_iters=2), ExponentialLR(opt, gamma=0.9)]
        return opt, [ChainedScheduler(parts)], parts

    opt, schedulers, _ = run()
    for _ in range(3):
        opt.step()
        schedulers[0].step()
    pyopt.save(tmp_path / "run", opt, schedulers=schedulers)
    new, others, parts = run()
    pyopt.load(tmp_path / "run", new, schedulers=others)
    assert others[0].schedulers == parts
    assert all(each.optimizer is new for each in [*others, *parts])
    for _ in range(3):
        for o, s in ((opt, schedulers), (new, others)):
            o.step()
            s[0].step()
        assert seen(new, *others)[0::3] == seen(opt, *schedulers)[0::3]
        assert [g["lr"] for g in new.param_groups] == [g["lr"] for g in opt.param_groups]


@pytest.mark.parametrize("make_scheduler", [lambda o: OneCycleLR(o, 0.5, total_steps=9), ReduceLROnPlateau])
def test_schedulers_that_set_more(make_scheduler, tmp_path):
    def run():
        opt, _ = make(SGD, {"momentum": 0.9})
        return opt, make_scheduler(opt)

    opt, scheduler = run()
    for loss in (3, 4):
        opt.step()
        scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    pyopt.save(tmp_path / "run", opt, schedulers=[scheduler])
    new, other = run()
    pyopt.load(tmp_path / "run", new, schedulers=[other])
    assert other.state_dict() == scheduler.state_dict()
    assert bits_of(new.state_dict()) == bits_of(opt.state_dict())


def test_scheduler_of_another_optimizer(tmp_path):
    saved(tmp_path / "run")
    new, _, average = fresh()
    other = CosineAnnealingLR(make(Adam)[0], T_max=4)
    with pytest.raises(ValueError, match=r"schedulers\[0\] is a CosineAnnealingLR of another optimizer"):
        pyopt.load(tmp_path / "run", new, schedulers=[other], averages=[average])


@pytest.mark.parametrize("what", ["schedulers", "averages"])
def test_arguments(what, tmp_path):
    opt, _ = make(Adam)
    with pytest.raises(TypeError, match=f"{what} is a Adam, must be a list: one alone as"):
        pyopt.save(tmp_path / "run", opt, **{what: opt})
    with pytest.raises(TypeError, match=rf"{what}\[0\] is a int, must have state_dict"):
        pyopt.save(tmp_path / "run", opt, **{what: [3]})
    with pytest.raises(TypeError, match="optimizer is a list, must be one of pyopt or"):
        pyopt.save(tmp_path / "run", [])
    with pytest.raises(TypeError, match="progress is a int, must be True, False or None"):
        pyopt.save(tmp_path / "run", opt, progress=1)
    assert not list(tmp_path.iterdir())


def test_hooks_run(tmp_path):
    opt, _ = make(Adam, steps=1)
    ran = []
    opt.register_state_dict_post_hook(lambda o, sd: ran.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda o, sd: {**sd, "param_groups": [{**sd["param_groups"][0], "lr": 0.25}]})
    opt.register_load_state_dict_post_hook(lambda o: ran.append("loaded"))
    pyopt.save(tmp_path / "run", opt)
    pyopt.load(tmp_path / "run", opt)
    assert ran == ["saved", "loaded"]
    assert opt.param_groups[0]["lr"] == 0.25


# --- what matches what ------------------------------------------------------------------------------------------------


def of_names(*groups, cls=Adam, seed=0, steps=0, own_names=False, **options):
    """An optimizer with groups of named parameters: {name: shape}, and the group's options."""

    def params(shapes):
        made = {name: random(shape, seed=sum(map(ord, name)) + seed) for name, shape in shapes.items()}
        return [Parameter(a, name=name) for name, a in made.items()] if own_names else made

    opt = cls([{"params": params(shapes), **each} for shapes, each in groups], **options)
    for i in range(steps):
        for p in params_of(opt):
            p.grad = random(p.data.shape, seed=sum(map(ord, p.name)) + i)
        opt.step()
    return opt


def by_name(opt):
    return {p.name: value for p, value in zip(params_of(opt), values(opt), strict=True)}


FILE = ({"a": (3, 4), "b": (2,)}, {"lr": 0.5}), ({"c": ()}, {"lr": 0.25, "mine": 1})


@pytest.mark.parametrize("cls", [Adam, Lion, Adafactor, pyopt.Prodigy])
@pytest.mark.parametrize("own_names", [False, True])
def test_parameters_are_matched_by_name(cls, own_names, tmp_path):
    """In any order of parameters and groups, and the run goes on as it would have."""
    pyopt.save(tmp_path / "run", opt := of_names(*FILE, cls=cls, steps=2, own_names=own_names))
    new = of_names(({"c": ()}, {}), ({"b": (2,), "a": (3, 4)}, {}), cls=cls, seed=1, own_names=own_names)
    assert pyopt.load(tmp_path / "run", new) is None
    assert by_name(new) == by_name(opt)
    assert [(g["lr"], g.get("mine")) for g in new.param_groups] == [(0.25, 1), (0.5, None)]
    for o in (opt, new):
        for p in params_of(o):
            p.grad = random(p.data.shape, seed=ord(p.name))
        o.step()
    assert by_name(new) == by_name(opt)


def test_names_that_are_numbers(tmp_path):
    """Names all the same."""
    opt = SGD([Parameter(np.full(2, 5.0), name="0"), Parameter(np.full(2, 6.0), name="1")])
    pyopt.save(tmp_path / "run", opt)
    new = SGD([Parameter(np.zeros(2), name="1"), Parameter(np.zeros(2), name="0")])
    pyopt.load(tmp_path / "run", new)
    assert [p.data[0] for p in params_of(new)] == [6, 5]


@pytest.mark.parametrize("named_file", [True, False])
def test_by_place_where_only_one_has_names(named_file, tmp_path):
    named, numbered = SGD({"b": np.full(2, 5.0), "a": np.full(2, 6.0)}), SGD([np.full(2, 7.0), np.full(2, 8.0)])
    first, second = (named, numbered) if named_file else (numbered, named)
    pyopt.save(tmp_path / "run", first)
    pyopt.load(tmp_path / "run", second)
    assert values(second) == values(first)


@pytest.mark.parametrize(
    "groups, message",
    [
        (
            [({"a": (3, 4)}, {}), ({"c": (), "b": (2,)}, {})],
            "param group 0: 'a' and 'b', which is in another here, stand",
        ),
        ([({"a": (3, 4), "b": (2,), "c": ()}, {})], "param group 0: 'a' and 'c' stand in param groups 0 and 1 of the"),
        ([*FILE, ({"d": ()}, {})], r"has other parameters than optimizer: not \['d'\]$"),
        ([FILE[0]], r"has other parameters than optimizer: \['c'\], which optimizer has not"),
        ([*FILE, ({}, {})], "has no param group 2"),
        ([({"c": ()}, {}), ({"a": (4, 3), "b": (2,)}, {})], r"parameter 'a' has shape \(3, 4\) in the file"),
    ],
)
def test_what_does_not_match_is_an_error(groups, message, tmp_path):
    """With its name, and nothing has changed."""
    pyopt.save(tmp_path / "run", of_names(*FILE, steps=2))
    new = of_names(*groups, seed=1, steps=1, own_names=not groups[-1][0])
    before = seen(new)
    with pytest.raises(ValueError, match=message):
        pyopt.load(tmp_path / "run", new)
    assert seen(new) == before


def test_schedulers_know_groups_by_place(tmp_path):
    opt = of_names(*FILE)
    pyopt.save(tmp_path / "run", opt, schedulers=[CosineAnnealingLR(opt, T_max=9)])
    new = of_names(*FILE[::-1])
    schedule = CosineAnnealingLR(new, T_max=4)
    before = seen(new, schedule)
    with pytest.raises(ValueError, match=r"schedulers.0: it has numbers for each param group"):
        pyopt.load(tmp_path / "run", new, schedulers=[schedule])
    assert seen(new, schedule) == before
    result = pyopt.load(tmp_path / "run", new, schedulers=[schedule], strict=False)
    assert list(result.mismatched) == ["schedulers.0"]
    assert schedule.T_max == 4
    assert [g["lr"] for g in new.param_groups] == [0.25, 0.5]


def test_lbfgs_has_one_state(tmp_path):
    """Of all parameters in their order: it is not put together anew."""

    def run(*names):
        opt = LBFGS({name: random(3, seed=ord(name)) for name in names})
        opt.step(lambda: closure(params_of(opt)))
        return opt

    pyopt.save(tmp_path / "run", opt := run("a", "b"))
    new = run("b", "a")
    before, state = bits_of((values(new), new.state_dict())), new.state[params_of(new)[0]]
    with pytest.raises(ValueError, match="the state of LBFGS is one of all parameters in their order"):
        pyopt.load(tmp_path / "run", new)
    assert bits_of((values(new), new.state_dict())) == before
    assert list(pyopt.load(tmp_path / "run", new, strict=False).mismatched) == ["state"]
    assert new.state[params_of(new)[0]] is state
    assert bits(params_of(new)[1].data) == bits(params_of(opt)[0].data)


def test_not_strict(tmp_path):
    """What matches is loaded, and what does not is told and has stayed, state and all."""
    opt = of_names(({"a": (3, 4), "b": (2,), "head": (5,)}, {"lr": 0.5}), ({"c": ()}, {"lr": 0.25}), steps=2)
    opt.state["rounds"] = 3
    schedulers = [CosineAnnealingLR(opt, T_max=9), ExponentialLR(opt, gamma=0.5)]
    pyopt.save(tmp_path / "run", opt, schedulers=schedulers, averages=[Average(opt)], extra="x")
    new = of_names(({"c": ()}, {}), ({"new": (3,), "b": (2,), "head": (6,), "a": (3, 4)}, {}), ({"d": ()}, {}), steps=1)
    new.state["others"] = 4
    mine = [LinearLR(new), ExponentialLR(new, gamma=0.7)]
    kept = {p.name: (new.state[p], bits(p.data)) for p in params_of(new) if p.name in ("new", "head", "d")}
    group = new.param_groups[2]
    before = [bits_of(scheduler.state_dict()) for scheduler in mine]
    average = Average(new)
    result = pyopt.load(tmp_path / "run", new, schedulers=mine, averages=[average], strict=False)
    assert result.extra == "x"
    assert result.missing == ["parameters.new", "parameters.d", "groups.2", "schedulers.0"]
    assert result.unexpected == ["schedulers.0"]
    assert list(result.mismatched) == ["parameters.head", "schedulers.1", "averages.0"]
    assert result.mismatched["parameters.head"] == "has shape (5,) in the file, must be (6,)"
    assert [bits_of(scheduler.state_dict()) for scheduler in mine] == before
    assert {name: by_name(new)[name] for name in "abc"} == {name: by_name(opt)[name] for name in "abc"}
    for p in params_of(new):
        if p.name in kept:
            assert new.state[p] is kept[p.name][0]
            assert bits(p.data) == kept[p.name][1]
    assert [g["lr"] for g in new.param_groups] == [0.25, 0.5, group["lr"]]
    assert new.param_groups[2] is group
    assert (new.state["rounds"], new.state["others"]) == (3, 4)
    for p in params_of(new):
        p.grad = np.ones_like(p.data)
    new.step()


def test_not_strict_where_all_matches(tmp_path):
    """It is as with strict."""
    opt = saved(tmp_path / "run")
    new, schedule, average = fresh()
    result = pyopt.load(tmp_path / "run", new, schedulers=[schedule], averages=[average], strict=False)
    assert bits_of(result._asdict()) == bits_of(
        {"extra": {"x": np.arange(3)}, "missing": [], "unexpected": [], "mismatched": {}}
    )
    assert schedule.T_max == 9
    assert average.n_averaged == 1
    assert bits_of(new.state_dict()) == bits_of(opt.state_dict())
    assert values(new) == values(opt)


def test_not_strict_by_place(tmp_path):
    opt = saved(tmp_path / "run")
    new, _ = make(Adam, steps=1, shapes=((3, 4), (2,), (5,), (6,)))
    before = values(new)
    result = pyopt.load(tmp_path / "run", new, strict=False)
    assert result.missing == ["parameters.3"]
    assert result.unexpected == ["schedulers.0", "averages.0"]
    assert list(result.mismatched) == ["parameters.1"]
    assert values(new) == [values(opt)[0], before[1], values(opt)[2], before[3]]


def test_not_strict_and_other_groups(tmp_path):
    """Options stay; the state of a parameter too where it is none for them."""
    pyopt.save(tmp_path / "run", opt := of_names(({"a": 2, "b": 3}, {}), cls=SGD, steps=2, lr=0.5))
    new = of_names(({"a": 2}, {"momentum": 0.9}), ({"b": 3}, {}), cls=SGD, steps=1, seed=1, lr=0.1)
    before = by_name(new)["a"][1]
    result = pyopt.load(tmp_path / "run", new, strict=False)
    assert list(result.mismatched)[:2] == ["groups.0", "groups.1"]
    assert [g["lr"] for g in new.param_groups] == [0.1, 0.1]
    assert [by_name(new)[name][0] for name in "ab"] == [by_name(opt)[name][0] for name in "ab"]
    assert by_name(new)["a"][1] == (before if "state.a" in result.mismatched else {})
    adam = of_names(({"a": 2, "b": 3}, {}), steps=2)
    pyopt.save(tmp_path / "run", adam)
    new = of_names(({"a": 2}, {"amsgrad": True}), ({"b": 3}, {}), steps=1, seed=1)
    state = new.state[params_of(new)[0]]
    result = pyopt.load(tmp_path / "run", new, strict=False)
    assert list(result.mismatched) == ["groups.0", "groups.1", "state.a"]
    assert "max_exp_avg_sq" in result.mismatched["state.a"]
    assert new.state[params_of(new)[0]] is state
    assert by_name(new)["b"] == by_name(adam)["b"]


def test_not_strict_numbers_of_all_groups(tmp_path):
    """Prodigy's d stands in each group, and is one: that of the file."""
    pyopt.save(tmp_path / "run", opt := of_names(({"a": 2}, {}), ({"b": 3}, {}), cls=pyopt.Prodigy, steps=5))
    new = of_names(({"c": 2}, {}), ({"a": 2}, {}), cls=pyopt.Prodigy, seed=1)
    result = pyopt.load(tmp_path / "run", new, strict=False)
    assert result[1:] == (["parameters.c", "groups.0"], ["parameters.b", "groups.1"], {})
    assert [g["d"] for g in new.param_groups] == [g["d"] for g in opt.param_groups] != [1e-6, 1e-6]
    new.step(grads=[np.ones_like(p.data) for p in params_of(new)])


def test_not_strict_and_another_mode(tmp_path):
    """A parameter that a schedule-free optimizer has saved in evaluation is not taken for one in training."""
    opt = of_names(({"a": 2, "b": 3}, {}), cls=pyopt.SGDScheduleFree, steps=2, lr=0.1)
    opt.eval()
    pyopt.save(tmp_path / "run", opt)
    for train in (True, False):
        new = of_names(({"a": 2}, {}), ({"b": 3}, {}), cls=pyopt.SGDScheduleFree, steps=1, seed=1, lr=0.1)
        if not train:
            new.eval()
        before = by_name(new)
        result = pyopt.load(tmp_path / "run", new, strict=False)
        assert by_name(new) == (before if train else by_name(opt))
        reason = "has train_mode False in the file, must be True"
        assert result.mismatched.get("parameters.a") == (reason if train else None)


DAMAGED = [name for name in WRONG if name not in ("schedulers", "scheduler class", "parameter")]


@pytest.mark.parametrize("change", [WRONG[name][0] for name in DAMAGED], ids=DAMAGED)
def test_damage_is_an_error_not_strict_too(change, tmp_path):
    path = tmp_path / "run"
    saved(path)
    with_document(path, change)
    new, schedule, average = fresh()
    before = seen(new, schedule, average)
    with pytest.raises((KeyError, TypeError, ValueError)) as caught:
        pyopt.load(path, new, schedulers=[schedule], averages=[average], strict=False)
    assert str(path) in str(caught.value)
    assert seen(new, schedule, average) == before


def of_average(average):
    """The averages by name, with the number of their updates."""
    held = average.state_dict()
    params = params_of(average.optimizer)
    return {
        p.name: (bits(a), held["n_averaged"] - n)
        for p, a, n in zip(params, held["averages"], held["joined"], strict=True)
    }


@pytest.mark.parametrize("kind", [averaging.EMA, averaging.SWA])
def test_averages_follow_their_parameters(kind, tmp_path):
    """In another order, and in part: the rest keeps its average, or begins with a copy."""
    opt = of_names(*FILE)
    average = kind(opt)
    for i in range(3):
        opt.step(grads=[random(p.data.shape, seed=i) for p in params_of(opt)])
    pyopt.save(tmp_path / "run", opt, averages=[average])
    new = of_names(*FILE[::-1], seed=1)
    other = kind(new)
    pyopt.load(tmp_path / "run", new, averages=[other])
    assert of_average(other) == of_average(average)
    for updates in (0, 1, 5):
        new = of_names(({"new": (3,), "b": (2,), "a": (3, 4)}, {}), seed=1)
        other = kind(new)
        for i in range(updates):
            new.step(grads=[random(p.data.shape, seed=i) for p in params_of(new)])
        before = of_average(other)
        result = pyopt.load(tmp_path / "run", new, averages=[other], strict=False)
        assert (result.missing, result.mismatched) == (["parameters.new"], {})
        found = of_average(other)
        assert {name: found[name] for name in "ab"} == {name: of_average(average)[name] for name in "ab"}
        assert found["new"] == (before["new"][0], min(updates, 3))
        new.step(grads=[random(p.data.shape) for p in params_of(new)])
        if not updates:
            assert bits(other.averages[0]) == bits(params_of(new)[0].data)


@pytest.mark.parametrize("kind", [averaging.EMA, averaging.SWA])
def test_averages_of_pyopt(kind, tmp_path):
    """All or nothing with the rest, and the run goes on as the uninterrupted one."""

    def run(steps):
        opt, params = make(Adam)
        average = kind(opt, every=2)
        for i in range(steps):
            opt.step(grads=[random(p.data.shape, seed=i) for p in params])
        return opt, average

    opt, average = run(5)
    pyopt.save(tmp_path / "run", opt, averages=[average, Average(opt)])
    new, other = run(1)
    before = seen(new, other)
    with pytest.raises(ValueError, match="state of another average"):
        pyopt.load(tmp_path / "run", new, averages=[other, Average(new, fails=True)])
    assert seen(new, other) == before
    with other.swapped(), pytest.raises(RuntimeError, match="leave the block of swapped"):
        pyopt.load(tmp_path / "run", new, averages=[other, Average(new)])
    assert seen(new, other) == before
    pyopt.load(tmp_path / "run", new, averages=[other, Average(new)])
    assert seen(new, other)[0::3] == seen(opt, average)[0::3]
    for o in (opt, new):
        o.step(grads=[random(p.data.shape) for p in params_of(o)])
    assert seen(new, other)[0::3] == seen(opt, average)[0::3]


def test_strict_is_a_bool(tmp_path):
    saved(tmp_path / "run")
    with pytest.raises(TypeError, match="strict is a int, must be True or False"):
        pyopt.load(tmp_path / "run", fresh()[0], strict=0)


class Interrupted(BaseException):
    """What the handler of a signal raises, as Ctrl-C does."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file not yet in its `with`
@pytest.mark.parametrize("kind", [Average, AverageInTheCommit])
def test_interrupted_load(kind, tmp_path):
    """By a signal at any moment: all is old, or all is new."""

    def run(value):
        opt = Adam({"w": np.full(400_000, value, np.float32), "b": np.full(3, value, np.float32)}, lr=value)
        for p in params_of(opt):
            opt.state[p] = {"step": int(value), "exp_avg": p.data.copy(), "exp_avg_sq": p.data.copy()}
        schedule, average = LambdaLR(opt, lambda step: 1.0), kind(opt)
        schedule.last_epoch = average.n_averaged = int(value)
        return opt, schedule, average

    def found(opt, schedule, average):
        params = params_of(opt)
        values = {schedule.last_epoch, average.n_averaged, opt.param_groups[0]["lr"]}
        for array in [*(p.data for p in params), *average.averages]:
            values |= {array.flat[0], array.flat[-1], array.flat[array.size // 2]}
        for p in params:
            values |= {opt.state[p]["step"], *(opt.state[p][name].flat[-1] for name in ("exp_avg", "exp_avg_sq"))}
        return values

    def stop(*_):
        raise Interrupted

    saved_run = run(2.0)
    pyopt.save(tmp_path / "run", saved_run[0], schedulers=[saved_run[1]], averages=[saved_run[2]])
    new = run(1.0)
    begin = time.perf_counter()
    pyopt.load(tmp_path / "run", new[0], schedulers=[new[1]], averages=[new[2]])
    seconds = time.perf_counter() - begin
    rng = python_random.Random(0)
    outcomes = []
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(60):
            new = run(1.0)
            assert found(*new) == {1}
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1.2 * seconds))
                pyopt.load(tmp_path / "run", new[0], schedulers=[new[1]], averages=[new[2]])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                pass
            outcomes.append(found(*new))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert [outcome for outcome in outcomes if outcome not in ({1}, {2})] == []
    assert {1} in outcomes


# --- damaged files ----------------------------------------------------------------------------------------------------


def refused(data, path, message=None):
    path.write_bytes(data)
    new, schedule, average = fresh()
    before = seen(new, schedule, average)
    with pytest.raises(ValueError, match=message):
        pyopt.load(path, new, schedulers=[schedule], averages=[average])
    assert seen(new, schedule, average) == before


def resealed(header, data=b"", digits=True):
    """A file of a header, with its checksum."""
    if digits:
        header = header[: DIGITS.start] + ZEROS.encode() + header[DIGITS.stop :]
        header = header[: DIGITS.start] + f"{xxh64(header):016x}".encode() + header[DIGITS.stop :]
    return len(header).to_bytes(8, "little") + header + data


def header_of(table='"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', version="1", document="{}", sums=None):
    digits = ("0" * 16 if sums is None else sums) if table else ""
    text = f'"format":"pyopt","version":"{version}","checksums":"{digits}","document":{json.dumps(document)}'
    return BEGIN + ZEROS.encode() + b'",' + text.encode() + b"}" + (b"," if table else b"") + table.encode() + b"}"


BYTES = {
    "empty": (b"", "no safetensors file"),
    "short": (b"\x08\0\0", "no safetensors file"),
    "zip": (b"PK\x03\x04" * 100, "no safetensors file"),
    "header too long": ((10**9).to_bytes(8, "little") + b"{}", "no safetensors file, or cut off in its header"),
    "header of 2**63": ((2**63).to_bytes(8, "little") + b"{}" * 99, "no safetensors file"),
    "another's": ((100).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}' + b" " * 100, "not a file of pyopt"),
    "no checksum": (resealed(header_of(), b"abcd", digits=False), "header does not have its checksum"),
    "data": (resealed(header_of(), b"abcd"), "the data of 'a' do not have their checksum"),
    "version": (resealed(header_of(version="2"), b"abcd"), "has format version 2, this pyopt reads 1"),
    "gap": (resealed(header_of('"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}'), b"ab"), "begins at byte 1"),
    "overlap": (
        resealed(
            header_of(
                '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}',
                sums="0" * 32,
            ),
            b"abc",
        ),
        "'b' begins at byte 1 of the data, must at 2",
    ),
    "longer": (resealed(header_of(), b"abcde"), "has 5 bytes of data, must have 4"),
    "cut off": (resealed(header_of(), b"abc"), "has 3 bytes of data, must have 4"),
    "dtype": (resealed(header_of('"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}'), b"abcd"), "dtype 'F4'"),
    "dtype list": (resealed(header_of('"a":{"dtype":[],"shape":[1],"data_offsets":[0,4]}'), b"abcd"), r"dtype \[\]"),
    "shape": (resealed(header_of('"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}'), b"abcd"), r"shape \[-1\]"),
    "shape bool": (resealed(header_of('"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}'), b"a"), "shape"),
    "shape float": (resealed(header_of('"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}'), b"a"), "shape"),
    "shape huge": (
        resealed(header_of(f'"a":{{"dtype":"U8","shape":[0,{2**47},{2**47}],"data_offsets":[0,0]}}')),
        "more than an array can have",
    ),
    "dimensions": (
        resealed(header_of(f'"a":{{"dtype":"U8","shape":{[1] * 65},"data_offsets":[0,1]}}'), b"a"),
        "more than an array can have",
    ),
    "offsets": (resealed(header_of('"a":{"dtype":"F32","shape":[1],"data_offsets":[4]}'), b"abcd"), "must be two"),
    "size": (resealed(header_of('"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}'), b"abcd"), "8 bytes apart"),
    "keys": (
        resealed(header_of('"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}'), b"abcd"),
        "the entry of",
    ),
    "entry": (resealed(header_of('"a":3'), b"abcd"), "the entry of 'a' must have"),
    "twice": (resealed(header_of('"a":3,"a":3'), b"abcd"), "a key stands in it twice"),
    "nan": (resealed(header_of('"a":NaN'), b"abcd"), "it holds NaN"),
    "no json": (resealed(header_of()[:-1], b"abcd"), "its header is no valid JSON"),
    "utf-8": (resealed(header_of()[:-1] + b"\xff}", b"abcd"), "its header is no valid JSON"),
    "deep": (resealed(header_of("a" and '"a":' + "[" * 100_000), b"abcd"), "its header is no valid JSON"),
    "document": (resealed(header_of("", document="[]")), "its document is a list, must be a dict"),
    "no document": (resealed(header_of("", document="")), "its document is no valid JSON"),
    "empty document": (resealed(header_of("")), "a document without valid 'optimizer'"),
    "checksums": (resealed(header_of(sums="0" * 15), b"abcd"), "'checksums' has 15 characters"),
    "checksums form": (resealed(header_of(sums="0" * 15 + "G"), b"abcd"), "'checksums' has 16 characters"),
    "number": (resealed(header_of('"a":' + "1" * 5000), b"abcd"), "its header is no valid JSON"),
}


@pytest.mark.parametrize("data, message", BYTES.values(), ids=BYTES)
def test_hostile_file(data, message, tmp_path):
    refused(data, tmp_path / "run", message)


def test_every_cut(tmp_path):
    path = tmp_path / "run"
    saved(path)
    data = path.read_bytes()
    rng = python_random.Random(0)
    for n in [*range(0, 60), *rng.sample(range(len(data)), 100), *range(len(data) - 20, len(data))]:
        refused(data[:n], path)
    refused(data + b"\0", path, "something was added")


def test_every_flipped_bit(tmp_path):
    path = tmp_path / "run"
    saved(path)
    data = path.read_bytes()
    rng = python_random.Random(0)
    for i in [*range(70), *rng.sample(range(len(data)), 200)]:
        changed = bytearray(data)
        changed[i] ^= 1 << rng.randrange(8)
        refused(bytes(changed), path)


def test_missing_file_and_folder(tmp_path):
    opt, _ = make(Adam)
    with pytest.raises(FileNotFoundError, match="nothing"):
        pyopt.load(tmp_path / "nothing", opt)
    with pytest.raises(IsADirectoryError):
        pyopt.load(tmp_path, opt)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "run"
    saved(path)
    return path, path.read_bytes()


MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 2**16), st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("insert"), st.integers(0, 2**16), st.binary(max_size=8)),
        st.tuples(st.just("delete"), st.integers(0, 2**16), st.integers(1, 16)),
        st.tuples(st.just("swap"), st.integers(0, 2**16), st.integers(0, 2**16)),
    ),
    max_size=5,
)


def mutated(data, mutations):
    data = bytearray(data)
    for kind, at, what in mutations:
        at %= len(data) or 1
        if kind == "set":
            data[at : at + len(what)] = what
        elif kind == "insert":
            data[at:at] = what
        elif kind == "delete":
            del data[at : at + what]
        elif data:
            other = what % len(data)
            data[at], data[other] = data[other], data[at]
    return bytes(data)


@settings(deadline=None, max_examples=300)
@given(mutations=MUTATIONS)
def test_mutated_file(mutations, content):
    """An error, and nothing has changed, or the very same content."""
    path, data = content
    changed = mutated(data, mutations)
    if changed != data:
        refused(changed, path.with_name("mutated"))


@settings(deadline=None, max_examples=300)
@given(mutations=MUTATIONS, where=st.sampled_from(["header", "document"]))
def test_mutated_header_with_its_checksum(mutations, where, content):
    """By somebody who wants to do harm: an error and nothing has changed, or a file that is valid."""
    path, data = content
    other = path.with_name("mutated")
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if where == "header":
        header = header[: DIGITS.stop] + mutated(header[DIGITS.stop :], mutations)
    else:
        parsed = json.loads(header)
        document = mutated(parsed["__metadata__"]["document"].encode(), mutations).decode("utf-8", "replace")
        parsed["__metadata__"]["document"] = document
        header = json.dumps(parsed, separators=(",", ":")).encode()
    other.write_bytes(resealed(header, data[8 + length :]))
    new, schedule, average = fresh()
    before = seen(new, schedule, average)
    try:
        pyopt.load(other, new, schedulers=[schedule], averages=[average])
    except (KeyError, TypeError, ValueError):
        assert seen(new, schedule, average) == before
    else:
        new.step()
        schedule.step()
    with suppress(ValueError):
        described(other)


# --- the file system --------------------------------------------------------------------------------------------------


def test_permissions(tmp_path):
    """Those that open() would leave: by the umask, or of the file that was there."""
    path = tmp_path / "run"
    opt, _ = make(Adam)
    mask = os.umask(0o027)
    try:
        pyopt.save(path, opt)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        pyopt.save(path, opt)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(mask)


def test_link_is_followed(tmp_path):
    target, link, dangling = tmp_path / "target", tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "new")
    target.write_bytes(b"before")
    opt, _ = make(Adam)
    for path in (link, dangling):
        pyopt.save(path, opt)
        assert path.is_symlink()
        pyopt.load(path, opt)
    assert target.stat().st_size > 100


def test_places_that_cannot_be_written(tmp_path):
    opt, _ = make(Adam)
    with pytest.raises(FileNotFoundError) as caught:
        pyopt.save(tmp_path / "no" / "run", opt)
    assert caught.value.filename == str(tmp_path / "no" / "run")
    with pytest.raises(IsADirectoryError):
        pyopt.save(tmp_path, opt)
    with pytest.raises(OSError, match="is a device or pipe, must be a file"):
        pyopt.save("/dev/null", opt)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a device or pipe"):
        pyopt.save(tmp_path / "pipe", opt)
    with pytest.raises(OSError, match="File name too long"):
        pyopt.save(tmp_path / ("x" * 300), opt)
    pyopt.save(tmp_path / ("é" * 120), opt)
    pyopt.load(tmp_path / ("é" * 120), opt)


def test_vanished_folder(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    opt, _ = make(Adam)
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        pyopt.save("run", opt)


@apart
def test_read_only_folder_and_file():
    opt, _ = make(Adam)
    tmp_path = Path(tempfile.mkdtemp())  # which another user can reach
    path = tmp_path / "run"
    path.write_bytes(b"before")
    if os.geteuid() == 0:
        os.chown(tmp_path, 65534, 65534)
        os.chown(path, 65534, 65534)
        os.seteuid(65534)
    path.chmod(0o444)
    with pytest.raises(PermissionError):
        pyopt.save(path, opt)
    path.chmod(0o644)
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        pyopt.save(path, opt)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    tmp_path.chmod(0o755)
    shutil.rmtree(tmp_path)


@apart
def test_full_disk(tmp_path):
    """At any byte: an error, the old file, nothing beside."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "run"
    opt, _ = make(Adam, steps=2)
    pyopt.save(path, opt)
    before, size = path.read_bytes(), path.stat().st_size
    for limit in [0, 1, 7, 8, 100, size // 2, size - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            pyopt.save(path, opt)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_interrupted_save(tmp_path, monkeypatch):
    """An exception in the middle, such as Ctrl-C: the old file, nothing beside."""
    path = tmp_path / "run"
    opt = saved(path)
    before = path.read_bytes()

    def stop(data):
        raise KeyboardInterrupt

    monkeypatch.setattr(container, "xxh64", stop)
    with pytest.raises(KeyboardInterrupt):
        pyopt.save(path, opt)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_stray_files(tmp_path):
    """What a killed save has left goes; what a running one writes, another path's, and the user's stay."""
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "run"
    opt, _ = make(Adam)
    stray, running = tmp_path / ".run.0123abcd.tmp", tmp_path / ".run.89abcdef.tmp"
    others = [tmp_path / ".run.tmp", tmp_path / ".run2.0123abcd.tmp", tmp_path / "run.0123abcd.tmp"]
    for each in (stray, running, *others):
        each.write_bytes(b"x")
    with open(running, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pyopt.save(path, opt)
        assert sorted(tmp_path.iterdir()) == sorted([path, running, *others])
    pyopt.save(path, opt)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_stray_files_without_locks(tmp_path, monkeypatch):
    """On Windows what is old goes; a new one may be closed and about to take its place."""
    monkeypatch.setattr(replacing, "fcntl", None)
    path = tmp_path / "run"
    opt, _ = make(Adam)
    old, new = tmp_path / ".run.0123abcd.tmp", tmp_path / ".run.89abcdef.tmp"
    for each in (old, new):
        each.write_bytes(b"x")
    long_ago = time.time() - 2 * replacing.STRAY
    os.utime(old, (long_ago, long_ago))
    pyopt.save(path, opt)
    assert sorted(tmp_path.iterdir()) == sorted([path, new])
    assert pyopt.load(path, make(Adam)[0]) is None


def test_flushed_in_order(tmp_path, monkeypatch):
    """The file before it takes the place of the old one, the folder after it."""
    done = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), replace(*names)))
    pyopt.save(tmp_path / "run", make(Adam)[0])
    assert done == ["file", "replace", "folder"]


SAVES = """
import os, sys
import numpy as np
import pyopt
path, seed = sys.argv[1], int(sys.argv[2])
opt = pyopt.Adam({"w": np.zeros(200_000, np.float32), "b": np.zeros(3, np.float32)})
opt.step(grads=[np.ones(200_000, np.float32), np.ones(3, np.float32)])
print("ready", flush=True)
n = 0
while True:
    n += 1
    opt.param_groups[0]["note"] = n
    for p in opt.param_groups[0]["params"]:
        p.data[...] = n
    pyopt.save(path, opt, extra={"n": n})
"""


def test_killed_at_any_moment(tmp_path):
    """The file is always a whole one; the next save removes what was left. PYOPT_TEST_KILLS sets how many kills."""
    path = tmp_path / "run"
    rng = python_random.Random(os.getpid())
    opt = Adam({"w": np.zeros(200_000, np.float32), "b": np.zeros(3, np.float32)})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    strays = absent = 0
    for kill in range(KILLS):
        command = [sys.executable, "-c", SAVES, str(path), str(kill)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
            child.stdout.readline()
            time.sleep(rng.random() * 0.05)
            child.send_signal(signal.SIGKILL)
        if not path.exists():  # killed in the first save of all
            absent += 1
            continue
        n = pyopt.load(path, opt)["n"]
        assert opt.param_groups[0]["note"] == n
        assert all((p.data == n).all() for p in params_of(opt))
        strays += len(list(tmp_path.iterdir())) - 1
        pyopt.save(path, opt, extra={"n": n})
        assert list(tmp_path.iterdir()) == [path]
    print(f"{KILLS} kills, {strays} stray files removed, {absent} before the first file")


def test_two_processes_save_to_one_path(tmp_path):
    """Each finds the file whole at any time, neither hurts the other's."""
    path = tmp_path / "run"
    command = [sys.executable, "-c", SAVES, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    try:
        for child in children:
            child.stdout.readline()
        opt = Adam({"w": np.zeros(200_000, np.float32), "b": np.zeros(3, np.float32)})
        end = time.monotonic() + 2
        while time.monotonic() < end:
            if path.exists():
                n = pyopt.load(path, opt)["n"]
                assert all((p.data == n).all() for p in params_of(opt))
        assert [child.poll() for child in children] == [None, None]
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()


@apart
def test_no_second_copy(tmp_path):
    """Memory beyond what is there stays below 64 MB, for state of 400 MB, saved and loaded."""
    n = 25_000_000
    opt = Adam({"w": np.ones(n, np.float32), "v": np.ones((n // 4, 1), np.float32)})
    opt.step(grads=[np.ones(n, np.float32), np.ones((n // 4, 1), np.float32)])
    for work in (pyopt.save, pyopt.load):
        peak = peak_beyond(lambda work=work: work(tmp_path / "run", opt))
        assert peak < 64e6, (work.__name__, peak)


def peak_beyond(work):
    """By how many bytes the resident memory rises at most while it works."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmHWM")
    work()
    return memory("VmHWM") - before


def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# --- inspect and progress ---------------------------------------------------------------------------------------------


def run_module(*arguments):
    return subprocess.run([sys.executable, "-m", "pyopt", *arguments], capture_output=True, text=True, timeout=60)


def test_inspect(tmp_path):
    opt = Adam([{"params": {"w": random((3, 4))}}, {"params": {"b\x1b[31m": random(())}, "lr": 0.5}])
    opt.step(grads=[random((3, 4)), random(())])
    schedule = CosineAnnealingLR(opt, T_max=9)
    path = tmp_path / "run"
    pyopt.save(path, opt, schedulers=[schedule], averages=[Average(opt)], extra={"epoch": 3, "x": np.zeros((2, 3))})
    result = run_module("inspect", str(path))
    assert (result.returncode, result.stderr) == (0, "")
    words = " ".join(result.stdout.split())
    for text in (
        "Adam, step 1, ",
        "group 1: lr=0.5, betas=(0.9, 0.999)",
        "w 0 3x4 float32 48 B step exp_avg exp_avg_sq 96 B",
        "b\\x1b[31m 1 () float32 4 B step exp_avg exp_avg_sq 8 B",
        "schedulers[0]: CosineAnnealingLR {T_max: 9",
        "averages[0]: Average {kind: Average, n_averaged: 0, averages: [float32[3, 4], float32[]]}",
        "extra: {epoch: 3, x: float64[2, 3]}",
        "2 parameters of 13 elements; 9 arrays of 256 B",
    ):
        assert text in words, text


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["inspect", "nothing"], 1, "error: [Errno 2] No such file or directory: 'nothing'\n"),
        (["inspect", __file__], 1, f"error: {__file__}: no safetensors file, or cut off in its header\n"),
        (["inspect", "."], 1, "error: [Errno 21] Is a directory: '.'\n"),
        (["inspect"], 2, "the following arguments are required: file\n"),
        (["look"], 2, "invalid choice"),
    ],
)
def test_inspect_what_is_none(arguments, code, message):
    result = run_module(*arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert code == 2 or result.stderr == message


class Terminal:
    def __init__(self, tty=True):
        self.text, self.tty, self.encoding = "", tty, "utf-8"

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.tty


@pytest.mark.parametrize("has_tqdm", [True, False])
@pytest.mark.parametrize(
    "shown, tty, seconds, expected",
    [
        (None, True, 0.5, False),
        (None, True, 2, True),
        (None, False, 9, False),
        (True, False, 0, True),
        (False, True, 9, False),
    ],
)
def test_progress(has_tqdm, shown, tty, seconds, expected, monkeypatch):
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    terminal = Terminal(tty)
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = iter([0, seconds, seconds, seconds])
    monkeypatch.setattr("pyopt.files.progress.time", type("Clock", (), {"monotonic": lambda: next(clock)}))
    with Progress("save run", 100, shown) as bar:
        bar.step(50)
        bar.step(50)
    assert ("save run" in terminal.text and "100%" in terminal.text) == expected
    assert bool(terminal.text) == expected


def test_progress_of_save_and_load(tmp_path, capsys):
    opt, _ = make(Adam, steps=1)
    pyopt.save(tmp_path / "run", opt, progress=True)
    pyopt.load(tmp_path / "run", opt, progress=True)
    err = capsys.readouterr().err
    assert "save run" in err
    assert "load run" in err
    assert err.count("100%") == 2


# --- checksums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, digits",
    [(b"", "ef46db3751d8e999"), (b"a", "d24ec4f1a98c6e5b"), (b"abc", "44bc2cf5ad770999")],
)
def test_xxh64_of_known_texts(data, digits):
    assert f"{xxh64(data):016x}" == digits


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_xxh64(data):
    assert xxh64(data) == pytest.importorskip("xxhash").xxh64_intdigest(data)


if __name__ == "__main__":
    run = stored_run()
    STORED.parent.mkdir(exist_ok=True)
    pyopt.save(STORED, run[0], schedulers=[run[1]], averages=[run[2]], extra=run[3])
