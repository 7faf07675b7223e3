"""Tables of bfloat16 and float16: their touched rows against the oracles in float32, rounded once; equality of bits."""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyopt
import reference
from cases import assert_same_bits
from pyopt import RowSparse, _isa
from test_engine import everything_shared, on_level
from test_rows import BRIEF, IDS, OF_ROWS, SHAPES, gradient, started
from test_short_types import BFLOAT16, FLOAT16, FLOAT32, wide

# (table, values, state_dtype)
MIXES: list[tuple[Any, Any, str | None]] = [
    (BFLOAT16, BFLOAT16, "float32"),
    (FLOAT16, FLOAT16, "float32"),
    (BFLOAT16, FLOAT32, "float32"),
    (FLOAT16, BFLOAT16, None),
    (FLOAT32, BFLOAT16, None),
    (FLOAT32, FLOAT32, "bfloat16"),
]
each = pytest.mark.parametrize(("cls", "oracle", "options"), OF_ROWS, ids=IDS)
mixes = pytest.mark.parametrize("mix", MIXES, ids=str)


def short_gradient(shape: tuple[int, ...], n: int, rng: np.random.Generator, dtype: Any) -> RowSparse:
    g = gradient(shape, n, rng, np.float32)
    return RowSparse(g.indices, g.values.astype(dtype), shape)


def check(
    case: tuple[Any, Any, dict[str, Any]], mix: tuple[Any, Any, str | None], shape: Any, level: str | None = None
) -> None:
    """Steps of one table side by side with its oracle."""
    (cls, oracle, options), (of_p, of_g, state_dtype) = case, mix
    rng = np.random.default_rng(0)
    table = rng.standard_normal(shape).astype(np.float32).astype(of_p)
    optimizer = cls([table], **options, state_dtype=state_dtype)
    if level is not None:
        optimizer = on_level(optimizer, level)
    expected, state = table.copy(), started(optimizer)
    (group,) = optimizer.param_groups
    for step, n in enumerate([5, 60, 0, 200]):
        g = short_gradient(shape, n, rng, of_g)
        wide_state = {name: wide(x) if isinstance(x, np.ndarray) else x for name, x in state.items()}
        with np.errstate(all="ignore"):
            after, after_state = reference.of_rows(oracle, wide(expected), g, wide_state, group)
            expected = after.astype(of_p)
            state = {
                name: x.astype(state[name].dtype) if isinstance(x, np.ndarray) else x for name, x in after_state.items()
            }
        optimizer.step(grads=[g])
        what = f"{cls.__name__} {mix} {shape} step {step + 1}"
        assert_same_bits(table, expected, what)
        live = optimizer.state.get(group["params"][0], {})
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                assert_same_bits(live[name], value, f"{what} {name}")
            else:
                assert live[name] == value, f"{what} {name}"


@mixes
@each
def test_bits_of_the_oracle(cls: Any, oracle: Any, options: dict[str, Any], mix: Any) -> None:
    for shape, threads in product(SHAPES, (1, 3)):
        with everything_shared(), pyopt.num_threads(threads):
            check((cls, oracle, options), mix, shape)


@pytest.mark.parametrize("level", _isa.supported_levels())
def test_every_level(level: str) -> None:
    for case, mix in product(BRIEF, MIXES[:2]):
        check(case, mix, (20, 33), level)


def test_repeated_rows_are_summed_in_double() -> None:
    """And rounded to float32, not to the type of the values."""
    values = np.array([[1.0], [2**-9], [2**-9], [2**-9], [-1.0]]).astype(BFLOAT16)
    table = np.zeros((2, 1), BFLOAT16)
    g = RowSparse(np.zeros(5, np.int64), values, (2, 1))
    pyopt.SGD([table], lr=1.0).step(grads=[g])
    assert table.astype(np.float32).tolist() == [[-3 * 2**-9], [0.0]]
    assert g.to_dense().tolist() == [[3 * 2**-9], [0.0]] and g.to_dense().dtype == np.float32


@pytest.mark.parametrize(
    "storage",
    [
        {"state_dtype": "float32"},
        {"master": "kahan"},
        {"master": "split", "state_dtype": "float32"},
        {"rounding": "stochastic", "seed": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("cls", [pyopt.SGD, pyopt.Adagrad, pyopt.FTRL, pyopt.RowwiseAdagrad])
def test_all_rows_once_are_the_dense_step(cls: Any, dtype: Any, storage: dict[str, Any]) -> None:
    """In any order, with whatever is kept beside the table."""
    rng = np.random.default_rng(1)
    start = rng.standard_normal((30, 33)).astype(np.float32).astype(dtype)
    tables = [start.copy(), start.copy()]
    opts = [cls([table], lr=0.01, **storage) for table in tables]
    for step in range(5):
        g = rng.standard_normal((30, 33)).astype(np.float32).astype(dtype)
        order = rng.permutation(30)
        opts[0].step(grads=[g], max_norm=20.0)
        opts[1].step(grads=[g if step == 0 else RowSparse(order, g[order], g.shape)], max_norm=20.0)
        assert_same_bits(tables[1], tables[0], f"step {step}")
        assert opts[1].last_grad_norm == pytest.approx(opts[0].last_grad_norm, rel=1e-12)


def test_split_is_training_in_float32() -> None:
    """Of the touched rows, bit for bit; the others keep all that they have."""
    rng = np.random.default_rng(2)
    table = rng.standard_normal((40, 20)).astype(np.float32).astype(BFLOAT16)
    long = table.astype(np.float32)
    short, full = pyopt.Adagrad([table], master="split", state_dtype="float32"), pyopt.Adagrad([long])
    for _ in range(30):
        g = short_gradient((40, 20), 10, rng, BFLOAT16)
        short.step(grads=[g])
        full.step(grads=[g])
    low = next(iter(short.state.values()))["low_bits"]
    together = (table.view(np.uint16).astype(np.uint32) << 16) + low.astype(np.int32).view(np.uint32)
    assert_same_bits(together.view(np.float32), long, "both halves")


def test_mixed_model() -> None:
    """Tables of three types and dense parameters, clipped together."""
    rng = np.random.default_rng(3)
    dtypes = [BFLOAT16, FLOAT32, FLOAT16, BFLOAT16]
    shapes = [(30, 7), (30, 7), (20, 3), (11,)]
    arrays = [rng.standard_normal(s).astype(np.float32).astype(t) for s, t in zip(shapes, dtypes, strict=True)]
    twins = [array.copy() for array in arrays]
    ours, dense = (pyopt.Adagrad(each, state_dtype="float32") for each in (arrays, twins))
    for _ in range(5):
        grads: list[Any] = [
            short_gradient(s, 20, rng, t) if len(s) > 1 else rng.standard_normal(s).astype(np.float32)
            for s, t in zip(shapes, dtypes, strict=True)
        ]
        ours.step(grads=grads, max_norm=1.0, gradient_factor=0.5, nonfinite="raise")
        dense.step(
            grads=[g.to_dense() if isinstance(g, RowSparse) else g for g in grads], max_norm=1.0, gradient_factor=0.5
        )
        assert ours.last_grad_norm == pytest.approx(dense.last_grad_norm, rel=1e-12)
        for a, b in zip(arrays, twins, strict=True):
            assert_same_bits(a, b, "mixed")


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@each
def test_checkpoints(cls: Any, oracle: Any, options: dict[str, Any], dtype: Any, tmp_path: Any) -> None:
    rng = np.random.default_rng(4)
    table = rng.standard_normal((20, 6)).astype(np.float32).astype(dtype)
    gradients = [short_gradient((20, 6), 15, rng, dtype) for _ in range(6)]
    optimizer = cls({"table": table}, **options, state_dtype="float32")
    for g in gradients[:3]:
        optimizer.step(grads=[g])
    copies = [table.copy() for _ in range(2)]
    others = [cls({"table": copy}, **options, state_dtype="float32") for copy in copies]
    others[0].load_state_dict(optimizer.state_dict())
    pyopt.save(tmp_path / "file", optimizer)
    pyopt.load(tmp_path / "file", others[1])
    for g in gradients[3:]:
        for each_one in (optimizer, *others):
            each_one.step(grads=[g])
    for copy in copies:
        assert_same_bits(copy, table, "resumed")


# --- LazyAdamW --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [None, FLOAT32], ids=["short values", "float32 values"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_lazy_adamw(dtype: Any, values: Any, tmp_path: Any) -> None:
    """What rows have missed and their step, in float32; rounded where they are written. Its state is float32."""
    rng = np.random.default_rng(5)
    table = rng.standard_normal((12, 5)).astype(np.float32).astype(dtype)
    long = wide(table)
    lazy, full = pyopt.LazyAdamW([table], lr=0.1, weight_decay=0.1), pyopt.LazyAdamW([long], lr=0.1, weight_decay=0.1)
    again = None
    for step in range(40):
        g: Any = short_gradient((12, 5), 3, rng, values or dtype)
        if step % 7 == 3:
            g = wide(rng.standard_normal((12, 5)).astype(values or dtype))
        for optimizer in (lazy, full):
            optimizer.step(grads=[g], max_norm=5.0)
        assert lazy.last_grad_norm == full.last_grad_norm
        rows = np.unique(g.indices) if isinstance(g, RowSparse) else slice(None)
        long[rows] = wide(long[rows].astype(dtype))
        assert_same_bits(table, long.astype(dtype), f"step {step}")
        if again is not None:
            again.step(grads=[g], max_norm=5.0)
        elif step == 20:
            other = table.copy()
            again = pyopt.LazyAdamW([other])
            pyopt.save(tmp_path / "file", lazy)
            pyopt.load(tmp_path / "file", again)
    for name, value in next(iter(lazy.state.values())).items():
        if isinstance(value, np.ndarray):
            assert_same_bits(value, next(iter(full.state.values()))[name], name)
    lazy.catch_up(rows=[1, 2])
    full.catch_up(rows=[1, 2])
    lazy.catch_up()
    full.catch_up()
    again.catch_up(rows=[1, 2])
    again.catch_up()
    assert_same_bits(table, long.astype(dtype), "caught up")
    assert_same_bits(other, table, "resumed")


def test_lazy_adamw_of_dense_short_gradients() -> None:
    """A table of float32 with gradients of a shorter type: their numbers, not their bits."""
    tables = [np.ones((4, 3), np.float32) for _ in range(2)]
    g = np.full((4, 3), 0.5)
    for table, dtype in zip(tables, (np.float16, np.float32), strict=True):
        pyopt.LazyAdamW([table], lr=0.1).step(grads=[g.astype(dtype)])
    assert_same_bits(tables[0], tables[1], "gradients")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_bad_values() -> None:
    """Nothing has changed then."""
    for dtype, values, message in (
        (BFLOAT16, np.ones((1, 64)), "values has dtype float64, must be float32, float16 or bfloat16 with bfloat16"),
        (np.float64, np.ones((1, 64), BFLOAT16), "values has dtype bfloat16, must be float64 like the parameter"),
    ):
        table = pyopt.Parameter(np.ones((100, 64), dtype), name="table")
        for cls in (pyopt.SGD, pyopt.SparseAdam, pyopt.RowwiseAdagrad, pyopt.LazyAdamW):
            optimizer = cls([table])
            with pytest.raises(TypeError, match=f"parameter 'table': gradient: {message}"):
                optimizer.step(grads=[RowSparse([1], values, (100, 64))])
            assert (table.data == 1).all() and not optimizer.state_dict()["state"]
    for values in (np.ones((1, 3), ml_dtypes.float8_e4m3fn), np.ones((1, 3), ">f4")):
        with pytest.raises(
            TypeError, match=r"RowSparse: values has dtype .*, must be native float32 or float64, float16"
        ):
            RowSparse([1], values, (4, 3))
    g = RowSparse([1, 1], np.ones((2, 3), BFLOAT16), (4, 3))
    for clip in (pyopt.get_total_norm, lambda grads: pyopt.clip_grad_norm_(grads, 0.1)):
        with pytest.raises(TypeError, match="gradient 0 is bfloat16, must be float32 or float64"):
            clip([g])
    assert (g.values == 1).all()


def test_eight_bits() -> None:
    """Their scales are those of 256 elements, whatever rows these are."""
    table = pyopt.Parameter(np.ones((100, 64), np.float32), name="table")
    optimizer = pyopt.SGD([table], momentum=0.9, state_dtype="8bit")
    optimizer.step(grads=[np.ones((100, 64), np.float32)])
    before = str(optimizer.state_dict()), table.data.tobytes()
    with pytest.raises(
        TypeError, match="parameter 'table': gradient is row-sparse, must be an array where the state is"
    ):
        optimizer.step(grads=[RowSparse([1], np.ones((1, 64), np.float32), (100, 64))])
    assert before == (str(optimizer.state_dict()), table.data.tobytes())
    for cls in (pyopt.SparseAdam, pyopt.RowwiseAdagrad):
        with pytest.raises(ValueError, match=f"state_dtype == '8bit', which {cls.__name__} has not"):
            cls([table], state_dtype="8bit")
    with pytest.raises(TypeError, match="LazyAdamW has no option 'state_dtype'"):
        pyopt.LazyAdamW([{"params": [table], "state_dtype": "float32"}])


def test_lazy_adamw_state_of_another_type() -> None:
    table = np.ones((4, 3), BFLOAT16)
    optimizer = pyopt.LazyAdamW([table])
    g = RowSparse([1], np.ones((1, 3), BFLOAT16), (4, 3))
    optimizer.step(grads=[g])
    good = optimizer.state_dict()
    bad = optimizer.state_dict()
    bad["state"][0]["exp_avg"] = bad["state"][0]["exp_avg"].astype(BFLOAT16)
    before = table.tobytes()
    with pytest.raises(TypeError, match="parameter 0: state 'exp_avg' has dtype bfloat16, must be float32"):
        optimizer.load_state_dict(bad)
    entry = next(iter(optimizer.state.values()))
    kept, entry["exp_avg_sq"] = entry["exp_avg_sq"], entry["exp_avg_sq"].astype(BFLOAT16)
    with pytest.raises(TypeError, match="parameter 0: state 'exp_avg_sq' has dtype bfloat16, must be float32"):
        optimizer.step(grads=[g])
    entry["exp_avg_sq"] = kept
    assert table.tobytes() == before
    optimizer.load_state_dict(good)


def test_no_warnings() -> None:
    """A number beyond float16 becomes inf, as in every step, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = np.full((2, 3), 6e4, np.float16)
        optimizer = pyopt.LazyAdamW([table], lr=1e4)
        optimizer.step(grads=[RowSparse([1], np.full((1, 3), -1, np.float16), (2, 3))])
        assert np.isinf(table[1]).all() and (table[0] == np.float16(6e4)).all()
