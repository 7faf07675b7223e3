"""The C door on all that pyopt.Storage allows: the bits of the optimizers in Python, whole and in chunks."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import pyopt
from cases import Case, assert_same_bits
from door import DTYPES, Door, Plan, Row, Slot, dtype_of
from test_short_types import BFLOAT16, FLOAT16, FLOAT32, MIXES, SIZES, STORED, values

FLOAT64 = np.dtype(np.float64)
LENGTHS = [*SIZES, 4097, 40_001]  # the last is cut into chunks, and shared among threads
# (parameter, gradient, options of storage)
STORAGES: list[tuple[Any, Any, dict[str, Any]]] = [
    *[(p, g, {"state_dtype": state}) for p, g, state in MIXES],
    (BFLOAT16, BFLOAT16, {"master": "split"}),
    (BFLOAT16, FLOAT32, {"master": "split", "state_dtype": "float32"}),
    (BFLOAT16, BFLOAT16, {"master": "kahan"}),
    (FLOAT16, FLOAT32, {"master": "kahan", "state_dtype": "bfloat16"}),
    (BFLOAT16, BFLOAT16, {"rounding": "stochastic", "seed": 3}),
    (FLOAT16, FLOAT16, {"rounding": "stochastic", "seed": 2**52, "state_dtype": "float32"}),
]
CODES: list[tuple[Any, Any, dict[str, Any]]] = [
    (FLOAT32, FLOAT32, {"state_dtype": "8bit"}),
    (BFLOAT16, BFLOAT16, {"state_dtype": "8bit", "master": "split"}),
    (FLOAT16, FLOAT32, {"state_dtype": "8bit", "master": "kahan"}),
    (BFLOAT16, FLOAT32, {"state_dtype": "8bit", "rounding": "stochastic"}),
]
SIDE_BY_SIDE = (pyopt.Adam, pyopt.LAMB, pyopt.Prodigy)
AT_DOOR = [case for case in STORED if case.optimizer is not pyopt.RowwiseAdagrad]


def check(optimizer: pyopt.Optimizer, params: list[Any], copies: list[np.ndarray], plan: Plan, what: str) -> None:
    for p, copy, states in zip(params, copies, plan.states, strict=True):
        assert_same_bits(copy, p.data, f"{what} {p.data.size}")
        for name, array in states.items():
            assert_same_bits(array, optimizer.state[p][name], f"{what} {p.data.size} {name}")
    about = plan.functions.rule(plan.rule).contents
    for j in range(about.n_kept):
        group, state = optimizer.param_groups[0], optimizer.state[params[0]]
        name = about.kept[j].name.decode()
        number = group[name] if name in group else state[name]
        assert np.array_equal(number, plan.kept[0][j], equal_nan=True), f"{what} {name}"


def compare(door: Door, case: Case, types: list[tuple[Any, Any]], stored: dict[str, Any]) -> None:
    """3 steps by the optimizer, and by the door: in one thread, in three of ours, and chunk by chunk."""
    rng = np.random.default_rng(5)
    params = [pyopt.Parameter(values(rng, n, of_p)) for n, (of_p, _) in zip(LENGTHS, types, strict=True)]
    grads = [np.zeros(n, of_g) for n, (_, of_g) in zip(LENGTHS, types, strict=True)]
    copies = [[p.data.copy() for p in params] for _ in range(3)]
    name, options = case.optimizer.__name__, dict(case.options)
    optimizer = case.optimizer(params, **options, **stored)
    plans = [Plan(door, name, copy, grads, [options], stored=stored) for copy in copies]
    assert plans[0].chunks() > 3
    for i in range(3):
        for g in grads:
            g[:] = values(rng, g.shape, g.dtype)
        optimizer.step(grads=grads)
        plans[0].step()
        plans[1].step(3)
        plans[2].step_in_chunks(i)
    for copy, plan, what in zip(copies, plans, ["whole", "threads", "chunks"], strict=True):
        check(optimizer, params, copy, plan, what)


@pytest.mark.parametrize("of_p, of_g, stored", STORAGES, ids=str)
@pytest.mark.parametrize("case", AT_DOOR, ids=str)
def test_every_rule_and_size(door: Door, case: Case, of_p: Any, of_g: Any, stored: dict[str, Any]) -> None:
    compare(door, case, [(of_p, of_g)] * len(LENGTHS), stored)


@pytest.mark.parametrize("of_p, of_g, stored", CODES, ids=str)
@pytest.mark.parametrize("case", [c for c in AT_DOOR if c.optimizer.unsigned_states is not None], ids=str)
def test_codes(door: Door, case: Case, of_p: Any, of_g: Any, stored: dict[str, Any]) -> None:
    compare(door, case, [(of_p, of_g)] * len(LENGTHS), stored)


@pytest.mark.parametrize("case", [c for c in AT_DOOR if c.optimizer in SIDE_BY_SIDE], ids=str)
def test_types_side_by_side(door: Door, case: Case) -> None:
    """Rows of one plan, each of other types; those of float64 have nothing to do with what is stored."""
    kinds = [(FLOAT32, BFLOAT16), (BFLOAT16, FLOAT16), (FLOAT16, FLOAT32), (FLOAT64, FLOAT64)]
    types = [kinds[i % 4] for i in range(len(LENGTHS))]
    codes = {"state_dtype": "8bit"} if case.optimizer.unsigned_states is not None else {"state_dtype": "bfloat16"}
    for stored in ({}, {"master": "kahan"}, codes, {"master": "split", **codes}, {"rounding": "stochastic", **codes}):
        compare(door, case, types, stored)


def test_query(door: Door) -> None:
    """What the streams of a rule may be is what its class takes, and what the door then accepts."""
    floats = {"float32", "float64", "bfloat16", "float16"}
    for name, rule in door.rules().items():
        cls = getattr(pyopt, name)
        found = [{DTYPES[i] for i in range(32) if rule.dtypes[j] >> i & 1} for j in range(2 + rule.n_states)]
        assert found[0] == {x for x in DTYPES if "8bit" not in x} and found[1] == floats
        for j in range(rule.n_states):
            codes = set()
            if cls.unsigned_states is not None:
                state = rule.states[j].name.decode()
                codes = {"unsigned_8bit" if state in cls.unsigned_states else "signed_8bit"}
            assert found[2 + j] == floats | codes, name


def test_place_and_rounding_step(door: Door) -> None:
    """Rows of two groups in two plans, of which one has joined later: chance is that of the optimizer."""
    rng = np.random.default_rng(0)
    start = [values(rng, n, BFLOAT16) for n in (700, 2000, 300)]
    grads = [np.zeros(p.shape, np.float32) for p in start]
    params = [pyopt.Parameter(p.copy()) for p in start]
    stored = {"rounding": "stochastic", "seed": 11}
    optimizer = pyopt.Adam([{"params": [params[0], params[1]]}, {"params": [params[2]]}], **stored)
    copies = [p.copy() for p in start]
    plans = [Plan(door, "Adam", copies[i:j], grads[i:j], [{}], stored=stored) for i, j in ((0, 2), (2, 3))]
    plans[1].close()
    plans[1].rows[0].place = 2
    plans[1].check(door.functions.create(plans[1].rows, 1, 0, ctypes.byref(plans[1].handle), plans[1].message, 300))
    for i in range(4):
        for g in grads:
            g[:] = rng.standard_normal(g.shape) / 1000
        late = i < 2  # the third has no gradient in the first two steps, but its group's count goes on
        optimizer.step(grads=[*grads[:2], None if late else grads[2]])
        plans[0].step()
        if not late:
            plans[1].slots[0].rounding_step = i
            plans[1].step()
    assert int(optimizer.param_groups[1]["rounding_step"]) == 4 and plans[1].slots[0].step == 2
    for p, copy in zip(params, copies, strict=True):
        assert_same_bits(copy, p.data, str(p.data.size))


def test_short_rows_of_codes(door: Door) -> None:
    """The door has no least size: 512 elements alone are as the first 512 of many."""
    rng = np.random.default_rng(0)
    start, g = values(rng, 5000, FLOAT32), values(rng, 5000, FLOAT32)
    whole, part = start.copy(), start[:512].copy()
    plan = Plan(door, "Adam", [whole], [g], [{}], stored={"state_dtype": "8bit"})
    arrays = {"exp_avg": np.full(512, 127, np.uint8), "exp_avg_sq": np.zeros(512, np.uint8)}
    scales = [np.zeros(2, np.float32) for _ in arrays]
    small = Plan(door, "Adam", [part], [g], [{}])
    small.close()
    for j, array in enumerate(arrays.values()):
        small.rows[0].state[j].data, small.rows[0].state[j].dtype = array.ctypes.data, 9 + j
        small.rows[0].beside[1 + j] = scales[j].ctypes.data
    small.check(door.functions.create(small.rows, 1, 0, ctypes.byref(small.handle), small.message, 300))
    for _ in range(3):
        plan.step()
        small.step()
    assert_same_bits(part, whole[:512], "parameter")
    for array, (name, scale) in zip(arrays.values(), zip(arrays, scales, strict=True), strict=True):
        assert_same_bits(array, plan.states[0][name][:512], name)
        assert_same_bits(scale, plan.states[0][f"{name}_absmax"][:2], name)


def test_what_is_behind_a_struct_is_not_read(door: Door) -> None:
    """Structs of version 1.0, and in the memory behind them what later fields could not be."""
    found = []
    for old in (False, True):
        p, g = np.ones(3000, BFLOAT16), np.full(3000, 0.01, np.float32)
        plan = Plan(door, "Adam", [p], [g], [{}], stored={"rounding": "stochastic"})
        if old:
            plan.close()
            row, slot = plan.rows[0], plan.slots[0]
            row.size, row.beside[0], row.beside[4], row.place = Row.beside.offset, 1, 1, -9
            slot.size, slot.seed, slot.rounding_step = Slot.seed.offset, 77, -9
            plan.check(door.functions.create(plan.rows, 1, 0, ctypes.byref(plan.handle), plan.message, 300))
        for _ in range(3):
            plan.step()
        found.append(p.tobytes())
    assert found[0] == found[1]


# --- bad input --------------------------------------------------------------------------------------------------------


BAD = {  # what is done to a row of Adam: bfloat16, split, with state in 8 bits; `room` is free memory
    "row.gradient.dtype = 9": r"row 0: dtype == 9 of its gradient, must be one of PYOPT_FLOAT32 \(0\), ",
    "row.gradient.dtype = 4": r"row 0: dtype == 4 of its gradient, must be one of PYOPT_FLOAT32 \(0\), ",
    "row.state[1].dtype = 9": r"row 0: dtype == 9 of its exp_avg_sq, must be one of .*, PYOPT_UNSIGNED_8BIT \(10\)$",
    "row.beside[0] = None": r"row 0: beside its parameter is NULL, must be the address of what PYOPT_BFLOAT16_SPLIT",
    "row.beside[2] = None": r"row 0: beside its exp_avg_sq is NULL, must be the address of what PYOPT_UNSIGNED_8BIT",
    "row.parameter.dtype = 2": r"row 0: beside its parameter is 0x\w+, must be NULL: PYOPT_BFLOAT16 has nothing there",
    "row.beside[1] = room + 2": r"row 0: beside its exp_avg is at 0x\w+, must be aligned to 4 bytes",
    "row.parameter.data += 1": r"row 0: its parameter is at 0x\w+, must be aligned to 2 bytes",
    "row.beside[0] = row.parameter.data + 8": "row 0: what is beside its parameter overlaps the parameter of row 0, ",
    "row.state[0].data = row.beside[0] + 4": "row 0: its exp_avg overlaps the memory beside the parameter of row 0, ",
    "row.beside[1] = row.state[1].data + 4": "row 0: what is beside its exp_avg overlaps the exp_avg_sq of row 0, must",
    "row.beside[2] = row.beside[1] + 64": "row 0: what is beside its exp_avg_sq overlaps the memory beside the ",
    "row.beside[3] = room": "row 0: its max_exp_avg_sq is NULL, must be an address",
    "row.beside[4] = room": "row 0: it has state 3, but Adam has 3",
    "row.place = -2": r"row 0: place == -2, must be >= 0 and <= 2\*\*52, or -1",
}


@pytest.mark.parametrize("change, message", BAD.items())
def test_bad_rows(door: Door, change: str, message: str) -> None:
    p, g, room = np.ones(4097, BFLOAT16), np.ones(4097, np.float32), np.zeros(64, np.float32)  # 17 scales
    plan = Plan(door, "Adam", [p], [g], [{}], stored={"state_dtype": "8bit", "master": "split"})
    assert plan.rows[0].size == ctypes.sizeof(Row) and plan.rows[0].parameter.dtype == dtype_of(p, "split")
    plan.close()
    exec(change, {"row": plan.rows[0], "room": room.ctypes.data})
    with pytest.raises(ValueError, match=message):
        plan.check(door.functions.create(plan.rows, 1, 0, ctypes.byref(plan.handle), plan.message, 300))
    assert not plan.handle


@pytest.mark.parametrize("steps", [-2, 2**52 + 1])
def test_bad_rounding_step(door: Door, steps: int) -> None:
    p, g = np.ones(10, BFLOAT16), np.ones(10, BFLOAT16)
    plan = Plan(door, "Adam", [p], [g], [{}], stored={"rounding": "stochastic"})
    plan.slots[0].rounding_step = steps
    with pytest.raises(ValueError, match=rf"slot 0: rounding_step == {steps}, must be >= 0 and <= 2\*\*52, or -1"):
        plan.step()
    assert (p == 1).all()
