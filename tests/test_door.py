"""The C door: the same bits as the optimizers in Python, by the capsule and by libpyopt, for every cut."""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyopt
from door import Door, Doubles, Plan, Row, Slot, Stream
from pyopt import Parameter

ROOT = Path(__file__).parent.parent
SIZES = [3, 1, 0, 700, 1024, 5000]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "AdaBelief": [{}, {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}],
    "Adadelta": [{}, {"rho": 0.8, "weight_decay": 0.1}],
    "Adagrad": [{}, {"lr_decay": 0.01, "initial_accumulator_value": 0.5, "weight_decay": 0.1}],
    "Adam": [
        {},
        {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "update_clip": True},
        {"amsgrad": True, "cautious": True},
        {"betas": (0.0, 0.0)},
    ],
    "AdamW": [{}, {"amsgrad": True}, {"update_clip": True, "cautious": True}],
    "AdamWScheduleFree": [{}, {"warmup_steps": 10, "r": 1.0, "weight_lr_power": 1.5, "weight_decay": 0.1}],
    "Adamax": [{}, {"weight_decay": 0.1, "betas": (0.5, 0.9)}],
    "Adan": [{}, {"betas": (0.9, 0.8, 0.7), "maximize": True}],
    "AdEMAMix": [{}, {"alpha": 5.0, "beta3_warmup": 20, "alpha_warmup": 30, "weight_decay": 0.1}],
    "ADOPT": [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"weight_decay": 0.1}],
    "ASGD": [{}, {"lambd": 0.1, "t0": 5.0, "weight_decay": 0.1}],
    "FTRL": [{}, {"lr": 0.1, "l1": 0.1, "l2": 0.2, "beta": 0.3}],
    "LAMB": [{}, {"weight_decay": 0.1}, {"trust_ratio": False}],
    "LARS": [{}, {"weight_decay": 0.1, "nesterov": True}, {"momentum": 0.0}],
    "Lion": [{}, {"weight_decay": 0.1, "maximize": True}],
    "NAdam": [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.01}],
    "Prodigy": [{}, {"beta3": 0.9, "d_coef": 2.0, "bias_correction": True, "safeguard_warmup": True}],
    "RAdam": [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RMSprop": [{}, {"momentum": 0.9, "centered": True, "alpha": 0.9, "weight_decay": 0.1}, {"centered": True}],
    "Rprop": [{}, {"etas": (0.3, 1.5), "step_sizes": (1e-3, 1.0)}],
    "SGD": [
        {},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True},
    ],
    "SGDScheduleFree": [{}, {"warmup_steps": 10, "weight_decay": 0.1}],
}
CASES = [(name, i) for name, variants in VARIANTS.items() for i in range(len(variants))]


class Pair:
    """The same parameters and gradients, stepped by an optimizer and by a plan."""

    def __init__(self, door: Door, name: str, options: dict[str, Any], dtype: str, sizes: list[int], **kwargs: Any):
        self.rng = np.random.default_rng(0)
        start = [self.rng.standard_normal(n).astype(dtype) for n in sizes]
        self.grads = [np.zeros_like(p) for p in start]
        self.params = [Parameter(p.copy(), grad=g) for p, g in zip(start, self.grads, strict=True)]
        self.copies = [p.copy() for p in start]
        self.optimizer = getattr(pyopt, name)(self.params, **options)
        self.plan = Plan(door, name, self.copies, self.grads, [options], **kwargs)

    def renew(self) -> None:
        for g in self.grads:
            g[:] = self.rng.standard_normal(g.shape)

    def check(self) -> None:
        for p, copy, states in zip(self.params, self.copies, self.plan.states, strict=True):
            assert p.data.tobytes() == copy.tobytes()
            for name, array in states.items():
                assert self.optimizer.state[p][name].tobytes() == array.tobytes(), name
        kept = self.plan.functions.rule(self.plan.rule).contents
        for j in range(kept.n_kept):
            name, value = kept.kept[j].name.decode(), self.plan.kept[0][j]
            group, state = self.optimizer.param_groups[0], self.optimizer.state[self.params[0]]
            assert (group[name] if name in group else state[name]) == value, name


def test_names_and_defaults(door: Door) -> None:
    """The catalogue says what the signatures and the classes say."""
    assert sorted(door.rules()) == sorted(VARIANTS)
    for name, rule in door.rules().items():
        cls = getattr(pyopt, name)
        expected = {}
        for option, parameter in list(inspect.signature(cls.__init__).parameters.items())[2:]:
            if parameter.kind is parameter.VAR_KEYWORD:  # the door has no short types
                continue
            usual = parameter.default
            named = [(f"{option}[{i}]", x) for i, x in enumerate(usual)] if isinstance(usual, tuple) else []
            expected.update(dict(named) or {option: usual})
        found = {rule.options[i].name.decode(): rule.options[i].usual for i in range(rule.n_options)}
        assert list(found) == list(expected), name
        for option, x in found.items():
            assert x == expected[option] or (expected[option] is None and np.isnan(x)), (name, option)
        states = {rule.states[i].name.decode(): rule.states[i].needed_by for i in range(rule.n_states)}
        assert list(states) == list(cls.state_names)
        for state, needed_by in states.items():
            assert cls.state_names[state] == (None if needed_by < 0 else list(found)[needed_by])
        kept = [rule.kept[i].name.decode() for i in range(rule.n_kept)]
        assert kept == [*cls.number_states, *cls.shared_numbers]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name, variant", CASES)
def test_bits(door: Door, name: str, variant: int, dtype: str) -> None:
    """30 steps of tensors of many sizes: parameters, states and kept numbers."""
    pair = Pair(door, name, VARIANTS[name][variant], dtype, SIZES)
    for _ in range(30):
        pair.renew()
        pair.optimizer.step()
        pair.plan.step()
    pair.check()


@pytest.mark.parametrize("name, variant", CASES)
def test_numbers_of_many_steps(door: Door, name: str, variant: int) -> None:
    """What follows from the count of the step: of 3000 steps, and of counts far away."""
    pair = Pair(door, name, VARIANTS[name][variant], "float64", [2])
    for _ in range(300 if name == "Prodigy" else 3000):  # on noise its d grows without end
        pair.renew()
        pair.optimizer.step()
        pair.plan.step()
    pair.check()
    if pair.optimizer.counts_steps:
        for step in (10**5, 10**7 + 1, 2**40, 2**52 - 1):
            pair.optimizer.state[pair.params[0]]["step"] = step - 1
            pair.plan.slots[0].step = step - 1
            pair.optimizer.step()
            pair.plan.step()
        pair.check()


@pytest.mark.parametrize("name, variant", [("Adam", 0), ("Adam", 2), ("LAMB", 0), ("Prodigy", 0), ("SGD", 1)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cuts(door: Door, name: str, variant: int, threads: int) -> None:
    """Ranges of chunks of random lengths, in random order, on threads of the caller's."""
    pair = Pair(door, name, VARIANTS[name][variant], "float32", [100_000, 7, 0, 40_001, 64])
    plan, functions = pair.plan, pair.plan.functions
    n = plan.chunks()
    assert n == 9
    random = np.random.default_rng(threads)

    def everywhere(function: Any, pool: ThreadPoolExecutor) -> None:
        cuts = sorted({0, n, *random.integers(0, n, 4)})
        ranges = list(pairwise(cuts))
        random.shuffle(ranges)
        list(pool.map(lambda r: function(plan.handle, int(r[0]), int(r[1])), ranges))

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            pair.renew()
            pair.optimizer.step()
            plan.prepare()
            if functions.has_sums(plan.handle):
                everywhere(functions.sum, pool)
                functions.combine(plan.handle, plan.slots)
            everywhere(functions.run, pool)
    pair.check()


@pytest.mark.parametrize("name, variant", [("Adam", 0), ("LAMB", 0)])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_own_threads(door: Door, name: str, variant: int, threads: int) -> None:
    pair = Pair(door, name, VARIANTS[name][variant], "float32", [100_000, 7, 40_001])
    for _ in range(5):
        pair.renew()
        pair.optimizer.step()
        pair.plan.step(threads)
    pair.check()


def test_slots(door: Door) -> None:
    """Groups with options and counts of their own, and gradients that count times a factor."""
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(500) for _ in range(3)]
    grads = [rng.standard_normal(500) for _ in range(3)]
    params = [Parameter(p.copy(), grad=g) for p, g in zip(start, grads, strict=True)]
    options: list[dict[str, Any]] = [{"lr": 0.1}, {"lr": 0.2, "update_clip": True}]
    optimizer = pyopt.Adam([{"params": [params[0], params[2]], **options[0]}, {"params": [params[1]], **options[1]}])
    copies = [p.copy() for p in start]
    plan = Plan(door, "Adam", copies, grads, options, slots=[0, 1, 0])
    for _ in range(5):
        for slot in plan.slots:
            slot.gradient_factor = 0.25
        optimizer.step(gradient_factor=0.25)
        plan.step()
    assert [p.data.tobytes() for p in params] == [p.tobytes() for p in copies]
    optimizer.param_groups[1].update(update_clip=False, lr=0.5)  # without sums from here on
    for key in ("update_clip", "lr"):
        plan.options[1][door.functions.find_option(plan.rule, key.encode())] = optimizer.param_groups[1][key]
    optimizer.step(gradient_factor=0.25)
    plan.step()
    assert not plan.functions.has_sums(plan.handle)
    assert [p.data.tobytes() for p in params] == [p.tobytes() for p in copies]


# --- bad input --------------------------------------------------------------------------------------------------------


def plan_with(door: Door, change: Any, name: str = "Adam", options: dict[str, Any] | None = None) -> Any:
    """Make a plan of two rows that `change` has spoilt; returns the arrays."""
    arrays = [np.ones(10, np.float32) for _ in range(8)]
    plan = Plan(door, name, arrays[:2], arrays[2:4], [options or {}])
    plan.close()
    change(plan.rows)
    plan.check(plan.functions.create(plan.rows, 2, 0, ctypes.byref(plan.handle), plan.message, 300))
    return plan


def put(field: str, value: Any) -> Any:
    def change(rows: Any) -> None:
        setattr(rows[1], field, value(rows) if callable(value) else value)

    return change


ROWS = {
    "size": (put("size", 8), r"row 1: size == 8, must be sizeof\(pyopt_row\), \d+"),
    "n": (put("n", -1), r"row 1: n == -1, must be >= 0 and <= 2\*\*56"),
    "rule": (put("rule", 99), r"row 1: rule == 99, must be one that find_rule returned"),
    "slot": (put("slot", -1), r"row 1: slot == -1, must be >= 0"),
    "far slot": (put("slot", 2), r"slot == 2 of a row, must be below the number of rows, 2"),
    "other rule": (put("rule", 1), r"row 1: its rule is Adadelta, must be Adam, as of the rows before it in slot 0"),
    "no gradient": (put("gradient", Stream(None, 0)), r"row 1: its gradient is NULL, must be an address"),
    "dtype": (put("parameter", Stream(64, 11)), r"row 1: dtype == 11 of its parameter, must be one of PYOPT_FLOAT32 "),
    "negative dtype": (
        put("parameter", Stream(64, -1)),
        r"row 1: dtype == -1 of its parameter, must be one of PYOPT_F",
    ),
    "mixed": (
        put("gradient", Stream(64, 1)),
        r"row 1: dtype == 1 of its gradient, must be one of PYOPT_FLOAT32 \(0\), PYOPT_BFLOAT16 \(2\), PYOPT_FLOAT16",
    ),
    "unaligned": (put("gradient", Stream(65, 0)), r"row 1: its gradient is at 0x41, must be aligned to 4 bytes"),
    "twice": (
        put("parameter", lambda rows: Stream(rows[0].parameter.data + 36, 0)),
        r"row 1: its parameter overlaps the parameter of row 0, must have memory of its own",
    ),
    "gradient": (
        put("gradient", lambda rows: Stream(rows[0].state[1].data - 36, 0)),
        r"row 0: its exp_avg_sq overlaps the gradient of row 1, must have memory of its own",
    ),
}


@pytest.mark.parametrize("change, message", ROWS.values(), ids=ROWS)
def test_bad_rows(door: Door, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_with(door, change)


def test_shared_gradients(door: Door) -> None:
    """Gradients are only read: several rows may have the same."""
    plan_with(door, put("gradient", lambda rows: rows[0].gradient)).step()


def test_unchecked(door: Door) -> None:
    plan = plan_with(door, lambda rows: None)
    plan.close()
    plan.rows[1].parameter = plan.rows[0].parameter
    plan.check(plan.functions.create(plan.rows, 2, 1, ctypes.byref(plan.handle), plan.message, 300))


SLOTS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("Adam", {}, {"size": 8}, r"slot 0: size == 8, must be sizeof\(pyopt_slot\), \d+"),
    ("Adam", {}, {"step": 0}, r"slot 0: step == 0, must be >= 1 and <= 2\*\*52"),
    ("Adam", {}, {"step": 2**52 + 1}, r"slot 0: step == 4503599627370497, must be >= 1"),
    ("Adam", {}, {"gradient_factor": np.inf}, r"slot 0: gradient_factor == inf, must be finite"),
    ("Adam", {}, {"options": None}, r"slot 0: its options is NULL, must be an address"),
    ("NAdam", {}, {"kept": None}, r"slot 0: its kept is NULL, must be an address"),
    ("Adam", {"lr": -1.0}, {}, r"slot 0: lr == -1, must be >= 0"),
    ("Adam", {"lr": np.nan}, {}, r"slot 0: lr == nan, must be finite"),
    ("Adam", {"lr": 1e39}, {}, r"slot 0: lr == .*e\+3[89], must be a number of float32"),
    ("Adam", {"eps": 1e-50}, {}, r"slot 0: eps == .*e-5[01], must be a number of float32"),
    ("Adam", {"betas": (0.9, 1.0)}, {}, r"slot 0: betas\[1\] == 1, must be >= 0 and < 1"),
    ("Adam", {"amsgrad": 2}, {}, r"slot 0: amsgrad == 2, must be 0 or 1"),
    ("Adadelta", {"rho": 1.5}, {}, r"slot 0: rho == 1.5, must be >= 0 and <= 1"),
    ("FTRL", {"lr": 0.0}, {}, r"slot 0: lr == 0, must be > 0"),
    ("Rprop", {"etas": (0.5, 1.0)}, {}, r"slot 0: etas\[1\] == 1, must be > 1"),
    ("Rprop", {"step_sizes": (1.0, 0.5)}, {}, r"slot 0: step_sizes\[1\] == 0.5, must be >= step_sizes\[0\], 1"),
    ("SGD", {"nesterov": True}, {}, r"slot 0: nesterov == 1 with momentum == 0 and dampening == 0, must have"),
    ("SGDScheduleFree", {"warmup_steps": 1.5}, {}, r"slot 0: warmup_steps == 1.5, must be an integer from 0"),
    ("SGDScheduleFree", {"momentum": 1.0}, {}, r"slot 0: momentum == 1, must be > 0 and < 1"),
    ("AdEMAMix", {"alpha_warmup": 0.0}, {}, r"slot 0: alpha_warmup == 0, must be > 0"),
    ("Adam", {"lr": 3e38, "betas": (0.99, 0.9)}, {}, r"slot 0: number 1 of its rule is 3e\+40 in this step, must be"),
    ("Adam", {"late": "amsgrad"}, {}, r"row 0: its max_exp_avg_sq is NULL, must be an address: amsgrad needs it"),
]


@pytest.mark.parametrize("name, options, fields, message", SLOTS, ids=[f"{s[0]}-{[*s[1], *s[2]][0]}" for s in SLOTS])
def test_bad_slots(door: Door, name: str, options: Any, fields: Any, message: str) -> None:
    """An error of a step: nothing has changed, and the next one is as if it had not been."""
    start, g = np.ones(10, np.float32), np.ones(10, np.float32)
    p = start.copy()
    plan = Plan(door, name, [p], [g], [{}])
    kept, states = bytes(plan.kept[0]), {key: value.copy() for key, value in plan.states[0].items()}
    options = {options["late"]: 1} if "late" in options else options
    changed, before = door.options(name, options), bytes(plan.slots[0])
    plan.slots[0].options = ctypes.cast(changed, Doubles)
    for field, value in fields.items():
        setattr(plan.slots[0], field, value if field != "step" else value - 1)
    with pytest.raises(ValueError, match=message):
        plan.step()
    assert p.tobytes() == start.tobytes() and bytes(plan.kept[0]) == kept
    assert all(plan.states[0][key].tobytes() == value.tobytes() for key, value in states.items())
    ctypes.memmove(ctypes.byref(plan.slots[0]), before, len(before))
    plan.step()
    assert p.tobytes() != start.tobytes() or name == "ADOPT"


def test_too_few_slots_and_threads(door: Door) -> None:
    plan = plan_with(door, lambda rows: None)
    functions, message = plan.functions, plan.message
    assert functions.prepare(plan.handle, plan.slots, 0, message, 300) == -1
    assert message.value == b"count == 0 slots, must be 1: the rows have slots up to 0"
    assert functions.step(plan.handle, plan.slots, 1, 0, message, 300) == -1
    assert message.value == b"threads == 0, must be >= 1"


def test_short_and_missing_messages(door: Door) -> None:
    """A message is cut to the room that it has; without any there is the status."""
    plan = plan_with(door, lambda rows: None)
    message = ctypes.create_string_buffer(b"x" * 20, 20)
    assert plan.functions.step(plan.handle, plan.slots, 1, 0, message, 8) == -1
    assert message.raw == b"threads\0" + b"x" * 12
    assert plan.functions.step(plan.handle, plan.slots, 1, 0, None, 0) == -1


def test_nulls(door: Door) -> None:
    plan = plan_with(door, lambda rows: None)
    functions, message = plan.functions, plan.message
    for call in (functions.prepare, lambda *given: functions.step(*given[:3], 1, *given[3:])):
        assert call(None, plan.slots, 1, message, 300) == -1 and message.value == b"plan is NULL, must be an address"
        assert call(plan.handle, None, 1, message, 300) == -1 and message.value == b"slots is NULL, must be an address"
        assert call(plan.handle, None, 1, None, 300) == -1
    assert functions.step(plan.handle, plan.slots, 1, 0, None, 300) == -1
    assert functions.create(None, 1, 0, ctypes.byref(plan.handle), None, 300) == -1


@pytest.mark.parametrize("name", ["Adam", "LAMB"])
def test_what_runs_before_it_is_prepared_does_nothing(door: Door, name: str) -> None:
    params, grads = [np.ones(5)], [np.ones(5)]
    plan = Plan(door, name, params, grads, [{}])
    plan.functions.sum(plan.handle, 0, 1)
    plan.functions.combine(plan.handle, plan.slots)
    plan.functions.run(plan.handle, 0, 1)
    assert params[0].tolist() == [1] * 5
    plan.step()
    assert params[0].tolist() != [1] * 5


def test_one_d_of_prodigy(door: Door) -> None:
    arrays = [np.ones(10) for _ in range(4)]
    plan = Plan(door, "Prodigy", arrays[:2], arrays[2:], [{}, {"d_coef": 2.0}], slots=[0, 1])
    with pytest.raises(ValueError, match="slot 1: its d_coef must be as in slot 0: Prodigy has one d"):
        plan.step()


def test_longer_structs_of_later_callers(door: Door) -> None:
    """A struct that is longer than the one known here is walked by its own size."""

    class LongerRow(ctypes.Structure):
        _fields_ = [("row", Row), ("later", ctypes.c_double * 3)]

    class LongerSlot(ctypes.Structure):
        _fields_ = [("slot", Slot), ("later", ctypes.c_double)]

    grads = [np.ones(4), np.ones(3)]
    first, second = [[np.zeros(4), np.zeros(3)] for _ in range(2)]
    plain = Plan(door, "SGD", first, grads, [{"lr": 0.5}, {"lr": 0.25}], slots=[0, 1])
    plain.step()
    other = Plan(door, "SGD", second, grads, [{"lr": 0.5}, {"lr": 0.25}], slots=[0, 1])
    other.close()
    rows, slots = (LongerRow * 2)(), (LongerSlot * 2)()
    for i in range(2):
        rows[i].row, slots[i].slot = other.rows[i], other.slots[i]
        rows[i].row.size, slots[i].slot.size = ctypes.sizeof(LongerRow), ctypes.sizeof(LongerSlot)
        slots[i].slot.step = 1
    functions = door.functions
    other.check(functions.create(rows, 2, 0, ctypes.byref(other.handle), other.message, 300))
    given = ctypes.cast(slots, ctypes.POINTER(Slot))
    other.check(functions.step(other.handle, given, 2, 1, other.message, 300))
    assert [p.tobytes() for p in first] == [p.tobytes() for p in second]


def test_query_of_nothing(door: Door) -> None:
    functions = door.functions
    assert functions.find_rule(b"adam") == functions.find_rule(None) == functions.find_option(0, b"x") == -1
    assert not functions.rule(-1) and not functions.rule(functions.count_rules())
    functions.destroy(None)


def test_no_rows(door: Door) -> None:
    handle, message = ctypes.c_void_p(), ctypes.create_string_buffer(100)
    functions = door.functions
    assert functions.create(None, 0, 0, ctypes.byref(handle), message, 100) == 0
    assert functions.chunks(handle) == 0
    assert functions.step(handle, None, 0, 2, message, 100) == 0
    functions.destroy(handle)
    assert functions.create(None, 1, 0, ctypes.byref(handle), message, 100) == -1
    assert message.value == b"rows is NULL, must be an address"


def test_cython_sees_the_header() -> None:
    """Every constant and every field is in api.pxd."""
    header = (Path(pyopt.get_include()) / "pyopt.h").read_text()
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    names = set(re.findall(r"\bPYOPT_\w+", header)) - {"PYOPT_H", "PYOPT_LIBRARY"}
    for body in re.findall(r"^typedef struct \w+ \{(.*?)^\}", header, re.M | re.S):
        names |= set(re.findall(r"\w+(?=\[|,|;|\)\()", body))
    declared = set(re.findall(r"\w+", (Path(pyopt.__file__).parent / "api.pxd").read_text()))
    assert {"PYOPT_BFLOAT16_KAHAN", "beside", "rounding_step", "dtypes", "n_kept"} <= names
    assert names <= declared, names - declared


# --- compiled users ---------------------------------------------------------------------------------------------------

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1"]


@pytest.mark.parametrize("compiler, standard", [("gcc", "c99"), ("gcc", "c17"), ("g++", "c++11"), ("g++", "c++20")])
def test_c(door: Door, compiler: str, standard: str, tmp_path: Path) -> None:
    """The tests in C, compiled as a library that is given the table, whichever it is."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    language = ["-x", "c++"] if compiler == "g++" else []
    flags = [f"-std={standard}", *WARNINGS, "-fPIC", "-shared", f"-I{pyopt.get_include()}", *language]
    command = [compiler, *flags, ROOT / "tests/door.c", "-o", tmp_path / "door.so", "-lm", "-pthread"]
    subprocess.run(command, check=True)
    check = ctypes.PyDLL(str(tmp_path / "door.so")).check_door  # with the GIL all the while
    check.restype, check.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    assert check(ctypes.addressof(door.functions)) is None


def build(library: Path, source: str, program: Path, link: str = "static", *more: str | Path) -> None:
    """Compile a program on libpyopt, with a sanitizer where libpyopt has it: see CONTRIBUTING.md."""
    given = [library / "libpyopt.a", "-fopenmp"] if link == "static" else [f"-L{library}", "-lpyopt"]
    flags = ["-std=c99", "-D_DEFAULT_SOURCE", *WARNINGS, *more, f"-I{library}"]
    flags += [f"-fsanitize={names}"] if (names := os.environ.get("PYOPT_SANITIZE")) else []
    given = given if link else []
    command = ["gcc", *flags, ROOT / "tests" / source, *given, "-lm", "-ldl", "-pthread", "-o", program]
    subprocess.run(command, check=True)


def run(*command: str | Path) -> None:
    """Run a program that says nothing where all is right."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("link", ["static", "shared"])
def test_program_without_python(library: Path, link: str, tmp_path: Path) -> None:
    """The same as a program on libpyopt, in which there is no Python."""
    build(library, "door.c", tmp_path / "door", link, "-DWITH_MAIN", f"-Wl,-rpath,{library}")
    run(tmp_path / "door")


def test_caller_of_version_1_0(library: Path, tmp_path: Path) -> None:
    """A program that was compiled with the header of 1.0, whose structs are shorter."""
    build(library, "door.c", tmp_path / "door", "static", "-DWITH_MAIN", f"-I{ROOT / 'tests/stored/pyopt_1_0'}")
    run(tmp_path / "door")


OUT_OF_MEMORY = "-Wl,--wrap=malloc,--wrap=calloc,--wrap=free"


def test_bad_use(library: Path, tmp_path: Path) -> None:
    build(library, "door_bad_use.c", tmp_path / "bad_use", "static", OUT_OF_MEMORY)
    run(tmp_path / "bad_use")


def test_bad_use_under_valgrind(library: Path, tmp_path: Path) -> None:
    """No read or write where nothing is, and no block that is lost."""
    if not shutil.which("valgrind") or os.environ.get("PYOPT_SANITIZE"):
        pytest.skip("no valgrind, or a sanitizer in its place")
    build(library, "door_bad_use.c", tmp_path / "bad_use", "static", OUT_OF_MEMORY, "-g")
    looks_for = ["--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=definite"]
    run("valgrind", "-q", *looks_for, "--errors-for-leak-kinds=definite", tmp_path / "bad_use")


def test_two_copies_and_unloading(library: Path, tmp_path: Path) -> None:
    copies = [tmp_path / "first.so", tmp_path / "second.so"]
    for copy in copies:
        shutil.copy(library / "libpyopt.so", copy)
    build(library, "door_unload.c", tmp_path / "unload", "")
    run(tmp_path / "unload", *copies)


FORK = """
import ctypes, os, signal, sys
import numpy as np
from door import Door, Plan, from_capsule

p, g = np.zeros(50_000, np.float32), np.ones(50_000, np.float32)
plan = Plan(Door(from_capsule()), "Adam", [p], [g], [{}])
plan.step(3)
child = ctypes.PyDLL(None).fork()
signal.alarm(60)
plan.step(3)
if child == 0:
    os._exit(7 if (p < -0.0019).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_fork_from_c() -> None:
    """One that Python does not know of, in a process whose steps have had threads: the child does not wait for them."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    run(sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}{FORK}")


def test_library_needs_no_python(library: Path) -> None:
    for command in (["nm", library / "libpyopt.a"], ["nm", "-D", library / "libpyopt.so"]):
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert " T pyopt_api" in names and "Py" not in names
    command = ["objdump", "-p", library / "libpyopt.so"]
    needed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "NEEDED" in needed and "python" not in needed
