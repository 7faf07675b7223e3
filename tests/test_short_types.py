"""float16 and bfloat16 against the oracles in float32, rounded once to nearest: equality of bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyopt
import reference
from cases import BRIEF, Case, assert_same_bits
from pyopt import _isa
from pyopt.storage import dynamic_map as map_of_kernels
from reference import dynamic_map
from test_engine import everything_shared, on_level

STORED = [case for case in BRIEF if case.optimizer.short_types]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
SHORT = [BFLOAT16, FLOAT16]
# (parameter, gradient, state_dtype): Adam steps the first, third and fourth without conversion in memory.
MIXES = [
    (BFLOAT16, BFLOAT16, None),
    (FLOAT16, FLOAT16, None),
    (BFLOAT16, BFLOAT16, "float32"),
    (FLOAT32, FLOAT32, "bfloat16"),
    (FLOAT16, FLOAT16, "float32"),
    (FLOAT32, FLOAT32, "float16"),
    (BFLOAT16, FLOAT32, None),
    (FLOAT32, BFLOAT16, None),
    (FLOAT16, FLOAT32, "bfloat16"),
    (FLOAT16, BFLOAT16, None),
]
SIZES = [0, 1, 3, 15, 16, 17, 31, 33, 63, 65, 255, 511, 512, 513, 1023, 1025, 2049]


def values(rng: np.random.Generator, size: Any, dtype: np.dtype, spread: float = 2) -> np.ndarray:
    return (rng.standard_normal(size) * 10.0 ** rng.uniform(-spread, spread / 2, size)).astype(dtype)


def wide(x: Any) -> Any:
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x


class Rounded:
    """The oracle: the steps of a case in float32, each array rounded to its own type when it is stored."""

    def __init__(self, case: Case, params: list[np.ndarray], state_dtype: np.dtype | None):
        self.case = case
        self.types = [(p.dtype, state_dtype or p.dtype) for p in params]
        self.params = [(wide(p), {}) for p in params]

    def step(self, grads: list[np.ndarray], group: dict[str, Any]) -> None:
        state_dtype = self.types[0][1]
        group = {**group, "stored": lambda x: wide(x.astype(state_dtype))}
        with np.errstate(all="ignore"):
            after, _ = self.case.step(self.params, [wide(g) for g in grads], group)
            self.params = [
                (
                    wide(p.astype(of_p)),
                    {k: wide(x.astype(of_s)) if isinstance(x, np.ndarray) else x for k, x in state.items()},
                )
                for (p, state), (of_p, of_s) in zip(after, self.types, strict=True)
            ]

    def check(self, params: list[pyopt.Parameter], optimizer: pyopt.Optimizer, what: str) -> None:
        for p, (data, state), (of_p, of_s) in zip(params, self.params, self.types, strict=True):
            assert p.data.dtype == of_p
            with np.errstate(all="ignore"):
                assert_same_bits(p.data, data.astype(of_p), f"{what} {p.data.shape}")
                for name, value in state.items():
                    if isinstance(value, np.ndarray):
                        got = optimizer.state[p][name]
                        assert_same_bits(got, value.astype(of_s), f"{what} {p.data.shape} {name}")


def run(case: Case, mix: tuple, sizes: list, level: str | None = None, threads: int = 1, steps: int = 3) -> None:
    of_p, of_g, state_dtype = mix
    rng = np.random.default_rng(7)
    params = [pyopt.Parameter(values(rng, size, of_p)) for size in sizes]
    optimizer = case.optimizer(params, **case.options, state_dtype=state_dtype)
    if level is not None:
        optimizer = on_level(optimizer, level)
    of_state = None if state_dtype is None else {"bfloat16": BFLOAT16}.get(state_dtype) or np.dtype(state_dtype)
    oracle = Rounded(case, [p.data for p in params], of_state)
    with pyopt.num_threads(threads):
        for _ in range(steps):
            grads = [values(rng, p.data.shape, of_g) for p in params]
            oracle.step(grads, optimizer.param_groups[0])
            optimizer.step(grads=grads)
    oracle.check(params, optimizer, f"{case} {mix}")


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("case", STORED, ids=str)
def test_every_rule_and_size(case: Case, mix: tuple) -> None:
    run(case, mix, SIZES)


@pytest.mark.parametrize("level", _isa.supported_levels())
@pytest.mark.parametrize("mix", MIXES[:4], ids=str)
def test_every_level(mix: tuple, level: str) -> None:
    for case in STORED:
        run(case, mix, [1025, 33, (3, 5)], level)


@pytest.mark.parametrize("mix", MIXES[:7], ids=str)
def test_threads(mix: tuple) -> None:
    with everything_shared():
        for case in STORED:
            run(case, mix, [5000, 1, 65, 1500], threads=2)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


def in_codes(x: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The codes of float32 numbers and the scale of each 256: bitsandbytes', whose maps and rounding these are."""
    numbers = dynamic_map(signed)
    bounds = (numbers[:-1] + numbers[1:]) / np.float32(2)
    codes, scales = [], []
    for begin in range(0, x.size, 256):
        block = x.ravel()[begin : begin + 256]
        scales.append(np.abs(block).max())
        inverse = np.float32(1) / max(scales[-1], np.float32(1e-38))
        codes.append(np.searchsorted(bounds, np.clip(block * inverse, -1, 1), side="left"))
    return np.concatenate(codes).astype(np.uint8).reshape(x.shape), np.array(scales, np.float32)


def out_of_codes(codes: np.ndarray, scales: np.ndarray, signed: bool) -> np.ndarray:
    return dynamic_map(signed)[codes] * np.repeat(scales, 256)[: codes.size].reshape(codes.shape)


CODES = [
    Case(pyopt.Adam, reference.adam, {"weight_decay": 0.1}),
    Case(pyopt.AdamW, reference.adam, {"amsgrad": True}),
    Case(pyopt.Lion, reference.lion, {"weight_decay": 0.1}),
    Case(pyopt.SGD, reference.sgd, {"momentum": 0.9}),
    Case(pyopt.AdEMAMix, reference.ademamix),
]


def check_codes(case: Case, of_p: np.dtype, shape: Any, level: str | None = None, threads: int = 1) -> None:
    rng = np.random.default_rng(11)
    p = pyopt.Parameter(values(rng, shape, of_p))
    optimizer = case.optimizer([p], **case.options, state_dtype="8bit")
    optimizer = optimizer if level is None else on_level(optimizer, level)
    data, state = wide(p.data.copy()), {}
    for _ in range(4):
        g = values(rng, shape, np.dtype(np.float32), 4)
        g.ravel()[:300] = 0  # a whole group of zeros
        ((data, state),), _ = case.step([(data, state)], [g], optimizer.param_groups[0])
        data = wide(data.astype(of_p))
        with pyopt.num_threads(threads):
            optimizer.step(grads=[g])
        assert_same_bits(p.data, data.astype(of_p), f"{case}")
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                signed = name not in ("exp_avg_sq", "max_exp_avg_sq")
                codes, scales = in_codes(value, signed)
                assert_same_bits(optimizer.state[p][f"{name}_absmax"], scales, f"{case} {name}")
                assert_same_bits(optimizer.state[p][name], codes, f"{case} {name}")
                state[name] = out_of_codes(codes, scales, signed)


@pytest.mark.parametrize("level", _isa.supported_levels())
@pytest.mark.parametrize("case", CODES, ids=str)
def test_codes(case: Case, level: str) -> None:
    for of_p, shape in ((FLOAT32, 4096), (BFLOAT16, (70, 61)), (FLOAT32, 5001)):
        check_codes(case, of_p, shape, level)


def test_codes_on_two_threads() -> None:
    with everything_shared():
        for case in CODES:
            check_codes(case, FLOAT32, 9001, threads=2)


def test_every_code_stays_and_each_bound_goes_down() -> None:
    """Lion with both betas near 1 does not move its state: what is stored is found again."""
    for signed in (True, False):
        numbers = dynamic_map(signed)
        assert_same_bits(map_of_kernels(signed), numbers, "map")
        assert (np.diff(numbers) > 0).all() and numbers[-1] == 1 and numbers.dtype == np.float32
        codes, _ = in_codes(np.tile(numbers, 16), signed)
        assert (codes.reshape(16, 256) == np.arange(256)).all()
    p = pyopt.Parameter(np.zeros(4096, np.float32))
    optimizer = pyopt.Lion([p], betas=(0.5, 0.0), state_dtype="8bit")
    numbers = dynamic_map(True)
    bounds = (numbers[:-1] + numbers[1:]) / np.float32(2)
    for g in (
        np.tile(numbers, 16),
        np.resize(np.append(bounds, np.float32(1)), 4096),
        np.nextafter(np.tile(numbers, 16), 0),
    ):
        optimizer.step(grads=[g])
        assert_same_bits(optimizer.state[p]["exp_avg"], in_codes(g, True)[0], "codes")


def test_small_and_other_tensors_have_float32() -> None:
    shapes = [(4095,), (64, 64), (64, 64)]
    params = [pyopt.Parameter(np.ones(shape, np.float32)) for shape in shapes]
    params[2].data = np.asfortranarray(params[2].data)
    params.append(pyopt.Parameter(np.ones(5000)))
    optimizer = pyopt.Adam(params, state_dtype="8bit")
    optimizer.step(grads=[np.ones_like(p.data) for p in params])
    assert [optimizer.state[p]["exp_avg"].dtype.name for p in params] == ["float32", "uint8", "float32", "float64"]
    for cls in (pyopt.RMSprop, pyopt.LAMB):
        with pytest.raises(ValueError, match="state_dtype == '8bit', which"):
            cls([np.ones(3, np.float32)], state_dtype="8bit")


@pytest.mark.parametrize("how", [{"max_norm": 1e9}, {"nonfinite": "skip"}])
def test_a_norm_leaves_codes_as_they_are(how: dict[str, Any]) -> None:
    """The map has no -1: codes that are read and stored again are of other numbers."""
    found = []
    for asked in ({}, how):
        w = np.zeros(4096, np.float32)
        optimizer = pyopt.Adam([w], lr=0.01, state_dtype="8bit")
        rng = np.random.default_rng(0)
        for _ in range(3):
            optimizer.step(grads=[rng.standard_normal(4096).astype(np.float32)], **asked)
        if asked:
            with pytest.raises(ValueError, match="NaN or inf"):
                optimizer.step(grads=[np.full(4096, np.nan, np.float32)], nonfinite="raise")
            optimizer.step(grads=[np.full(4096, np.nan, np.float32)], nonfinite="skip")
        found.append([w, *optimizer.state_dict()["state"][0].values()])
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a, b)


def test_what_has_no_gradient_stays_to_the_bit() -> None:
    """An average that rides along reads the parameter with what is kept beside it, and changes neither."""
    p = pyopt.Parameter(np.full(3, 1 + 2**-7, BFLOAT16), grad=np.zeros(3, BFLOAT16))
    optimizer = pyopt.SGD([p], lr=0.1, master="kahan")
    average = pyopt.averaging.EMA(optimizer, decay=0.5)
    optimizer.step()
    optimizer.state[p]["compensation"][:] = [2**-8, 1.25 * 2**-30, -(2**-8)]
    before = p.data.copy(), optimizer.state[p]["compensation"].copy()
    p.grad = None
    optimizer.step()
    assert_same_bits(p.data, before[0], "data")
    assert_same_bits(optimizer.state[p]["compensation"], before[1], "compensation")
    assert average.steps == 2


@pytest.mark.parametrize("given", [np.dtype(np.float16), np.float16, BFLOAT16, "float32", "8bit"])
def test_files(tmp_path: Any, given: Any) -> None:
    """Arrays come back in their types, and the type of the state may be given in any way."""
    params = [np.ones(4096, dtype) for dtype in (BFLOAT16, FLOAT16, FLOAT32)]
    optimizer = pyopt.Adam(params, lr=0.01, state_dtype=given, master="kahan")
    assert type(optimizer.param_groups[0]["state_dtype"]) is str
    optimizer.step(grads=[np.ones_like(p) for p in params])
    pyopt.save(tmp_path / "run", optimizer)
    expected = [p.copy() for p in params], optimizer.state_dict()
    others = [np.zeros_like(p) for p in params]
    for into, arrays in ((optimizer, params), (pyopt.Adam(others), others)):
        for array in arrays:
            array[...] = 0
        pyopt.load(tmp_path / "run", into)
        for got, p in zip(arrays, expected[0], strict=True):
            assert_same_bits(got, p, "parameter")
        for i, entry in expected[1]["state"].items():
            for name, value in entry.items():
                got = into.state_dict()["state"][i][name]
                if isinstance(value, np.ndarray):
                    assert got.dtype == value.dtype
                    assert_same_bits(got, value, name)
        into.step(grads=[np.ones_like(p) for p in params])
    for got, p in zip(others, params, strict=True):
        assert_same_bits(got, p, "after another step")


def test_the_first_bfloat16_of_a_process_is_that_of_the_state() -> None:
    program = """
import sys
import numpy as np
import pyopt
w = np.ones(3, np.float32)
pyopt.Adam([w], lr=0.5, state_dtype="bfloat16").step(grads=[np.ones(3, np.float32)])
print(w.tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[0.5, 0.5, 0.5]", result.stderr


def test_nan_in_codes() -> None:
    """No code stands for it: the scale does, for its 256 elements."""
    p = pyopt.Parameter(np.zeros(4096, np.float32))
    optimizer = pyopt.Adam([p], state_dtype="8bit")
    g = np.ones(4096, np.float32)
    g[300] = np.nan
    optimizer.step(grads=[g])
    assert np.flatnonzero(np.isnan(p.data)).tolist() == [300]
    optimizer.step(grads=[np.ones(4096, np.float32)])
    assert np.flatnonzero(np.isnan(p.data)).tolist() == [*range(256, 512)]


def test_first_in_a_process() -> None:
    """What imports ml_dtypes is the state of the first step."""
    program = """
import sys
import numpy as np
import pyopt

assert "ml_dtypes" not in sys.modules
table = np.zeros(3, np.float32)
pyopt.Adam([table], lr=0.5, state_dtype="bfloat16").step(grads=[np.ones_like(table)])
assert (table == -0.5).all(), table
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
