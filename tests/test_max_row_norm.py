"""max_row_norm: touched rows are kept to a norm, of rows and arrays, in every type and layout; the others stay."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

import pyopt
import reference
from cases import DTYPES, assert_same_bits
from pyopt import RowSparse, _isa
from test_engine import everything_shared, on_level
from test_rows import BRIEF, IDS, OF_ROWS, gradient, started
from test_short_types import BFLOAT16, FLOAT16, wide

SHAPES = [(50, 64), (7, 3), (100,), (20, 3, 5), (9, 1), (4, 1025), (3, 3000), (30, 65)]
each = pytest.mark.parametrize(("cls", "oracle", "options"), OF_ROWS, ids=IDS)
TAKERS = [pyopt.SGD, pyopt.Adagrad, pyopt.SparseAdam, pyopt.FTRL, pyopt.RowwiseAdagrad, pyopt.LazyAdamW]
takers = pytest.mark.parametrize("cls", TAKERS, ids=lambda cls: cls.__name__)


def stepped(oracle: Any, p: Any, g: RowSparse, state: Any, group: Any, most: float) -> tuple[Any, Any]:
    """The oracle's step in float32 at least, rounded; then the norms of the touched rows, rounded again."""
    with np.errstate(all="ignore"):
        wide_state = {name: wide(x) if isinstance(x, np.ndarray) and x.itemsize < 4 else x for name, x in state.items()}
        after, state = reference.of_rows(oracle, wide(p) if p.itemsize < 4 else p, g, wide_state, group)
        after = after.astype(p.dtype)
        rows = np.unique(g.indices)
        kept = after[rows] if p.itemsize >= 4 else wide(after[rows])
        after[rows] = reference.keep_norms(kept, most).astype(p.dtype)
    return after, state


def check(case: Any, dtype: Any, shape: Any, arrays: bool = False, level: str | None = None, **storage: Any) -> None:
    cls, oracle, options = case
    rng = np.random.default_rng(0)
    table = rng.standard_normal(shape).astype(np.float32).astype(dtype)
    most = 0.5 * math.sqrt(math.prod(shape[1:]))
    optimizer = cls([table], **options, max_row_norm=most, **storage)
    if level is not None:
        optimizer = on_level(optimizer, level)
    expected, state = table.copy(), started(optimizer)
    (group,) = optimizer.param_groups
    assert group["max_row_norm"] == most
    for step, n in enumerate([5, 60, 0, 200]):
        g: Any = gradient(shape, n, rng, dtype)
        if arrays:
            values = rng.standard_normal(shape).astype(np.float32).astype(dtype)
            g = RowSparse(np.arange(shape[0]), values, shape)
        expected, state = stepped(oracle, expected, g, state, group, most)
        optimizer.step(grads=[g.values if arrays else g], max_norm=1e9)
        assert_same_bits(table, expected, f"{cls.__name__} {table.dtype} {shape} step {step + 1}")


@pytest.mark.parametrize("dtype", [*DTYPES, BFLOAT16, FLOAT16], ids=str)
@each
def test_bits_of_the_oracle(cls: Any, oracle: Any, options: dict[str, Any], dtype: Any) -> None:
    storage = {"state_dtype": "float32"} if np.dtype(dtype).itemsize < 4 else {}
    for shape, threads in product(SHAPES, (1, 3)):
        with everything_shared(), pyopt.num_threads(threads):
            check((cls, oracle, options), dtype, shape, **storage)
            if cls is not pyopt.SparseAdam and "dampening" not in options:  # an array's momentum begins undampened
                check((cls, oracle, options), dtype, shape, arrays=True, **storage)


@pytest.mark.parametrize("level", _isa.supported_levels())
def test_every_level(level: str) -> None:
    for case in BRIEF:
        check(case, np.float32, (20, 33), level=level)


def test_what_embeddings_do() -> None:
    """torch's formula: max_norm / (norm + 1e-7); NaN and rows within the bound stay, others too."""
    table = np.array([[3.0, 4.0], [0.3, 0.4], [np.nan, 9.0], [30.0, 40.0]])
    before = table.copy()
    zero = RowSparse([0, 1, 2], np.zeros((3, 2)), (4, 2))
    pyopt.SGD([table], max_row_norm=1.0).step(grads=[zero])
    assert_same_bits(table[0], before[0] * (1 / (5 + 1e-7)), "scaled")
    assert_same_bits(table[1:], before[1:], "others")


@takers
def test_groups_and_checkpoints(cls: Any, tmp_path: Any) -> None:
    """Of a group alone; saved with it; None is no bound and no key."""
    rng = np.random.default_rng(1)
    tables = [rng.standard_normal((20, 4)) for _ in range(2)]
    optimizer = cls([{"params": tables[0], "max_row_norm": 0.5}, {"params": tables[1], "max_row_norm": None}], lr=0.1)
    assert "max_row_norm" not in optimizer.defaults
    for _ in range(3):
        optimizer.step(grads=[gradient((20, 4), 40, rng, np.float64) for _ in range(2)])
    norms = [np.linalg.norm(table, axis=1) for table in tables]
    assert norms[0].max() <= 0.5 * (1 + 1e-15) and norms[1].max() > 1
    copies = [table.copy() for table in tables]
    others = [cls([{"params": [a.copy()]}, {"params": [b.copy()]}]) for a, b in [copies, copies]]
    others[0].load_state_dict(optimizer.state_dict())
    pyopt.save(tmp_path / "file", optimizer)
    pyopt.load(tmp_path / "file", others[1])
    grads = [gradient((20, 4), 40, rng, np.float64) for _ in range(2)]
    optimizer.step(grads=grads)
    for other in others:
        assert [group.get("max_row_norm") for group in other.param_groups] == [0.5, None]
        other.step(grads=grads)
        for group, table in zip(other.param_groups, tables, strict=True):
            assert_same_bits(group["params"][0].data, table, "resumed")
    optimizer.param_groups[0]["max_row_norm"] = 0.25
    optimizer.step(grads=grads)
    assert np.linalg.norm(tables[0][grads[0].indices], axis=1).max() <= 0.25 * (1 + 1e-15)


@pytest.mark.parametrize("dtype", [*DTYPES, BFLOAT16], ids=str)
def test_lazy_adamw(dtype: Any) -> None:
    """A row that is stepped, by rows or an array; one that is caught up waits for its next step."""
    rng = np.random.default_rng(2)
    table = rng.standard_normal((12, 5)).astype(np.float32).astype(dtype)
    twin = table.copy()
    kept, free = pyopt.LazyAdamW([table], lr=0.1, max_row_norm=0.75), pyopt.LazyAdamW([twin], lr=0.1)
    for step in range(20):
        g: Any = gradient((12, 5), 4, rng, np.float32 if dtype == BFLOAT16 else dtype)
        g = g if step % 5 else g.to_dense()
        twin[...] = table
        kept.step(grads=[g])
        free.step(grads=[g])
        rows = np.unique(g.indices) if isinstance(g, RowSparse) else np.arange(12)
        if dtype != BFLOAT16:
            twin[rows] = reference.keep_norms(twin[rows], 0.75)
            assert_same_bits(table, twin, f"step {step}")
        assert np.linalg.norm(table[rows].astype(np.float64), axis=1).max() <= 0.75 * (
            1 + np.finfo(dtype).eps if dtype != BFLOAT16 else 1.01
        )
    kept.catch_up()


def test_with_what_is_kept_beside() -> None:
    """Split weights are scaled with both halves; the others ride along."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((20, 9)).astype(np.float32).astype(BFLOAT16)
    long = table.astype(np.float32)
    short = pyopt.Adagrad([table], lr=0.1, master="split", state_dtype="float32", max_row_norm=1.0)
    full = pyopt.Adagrad([long], lr=0.1, max_row_norm=1.0)
    ema = pyopt.averaging.EMA(full, decay=0.0)
    for _ in range(10):
        g = rng.standard_normal((20, 9)).astype(np.float32)
        short.step(grads=[g])
        full.step(grads=[g])
        assert_same_bits(ema.averages[0], long, "average")
    low = next(iter(short.state.values()))["low_bits"]
    together = (table.view(np.uint16).astype(np.uint32) << 16) + low.astype(np.int32).view(np.uint32)
    assert_same_bits(together.view(np.float32), long, "both halves")
    assert np.linalg.norm(long, axis=1).max() <= 1 + 1e-6


# --- what is refused --------------------------------------------------------------------------------------------------

BAD: list[tuple[Any, type[Exception]]] = [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError)]
BAD += [(math.inf, ValueError), ("1", TypeError), (True, TypeError), ([1.0], TypeError)]


@pytest.mark.parametrize(("value", "error"), BAD, ids=str)
@takers
def test_bad_values(cls: Any, value: Any, error: Any) -> None:
    """In the constructor, in a group, and later, where nothing has changed."""
    table = np.ones((4, 3))
    with pytest.raises(error, match="max_row_norm"):
        cls([table], max_row_norm=value)
    with pytest.raises(error, match="max_row_norm"):
        cls([{"params": [table], "max_row_norm": value}])
    optimizer = cls([table])
    before = str(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["max_row_norm"] = value
    with pytest.raises(error, match="max_row_norm"):
        optimizer.step(grads=[RowSparse([1], np.ones((1, 3)), (4, 3))])
    assert (table == 1).all() and str(optimizer.state_dict()["state"]) == before


OTHERS = [pyopt.Adam, pyopt.AdamW, pyopt.Lion, pyopt.LAMB, pyopt.Muon, pyopt.LBFGS]


@pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)
def test_those_that_take_no_rows_have_it_not(cls: Any) -> None:
    words = f"{cls.__name__} has no option 'max_row_norm', as it takes no gradients of rows"
    with pytest.raises(TypeError, match=words):
        cls([{"params": [np.ones((4, 3))], "max_row_norm": 1.0}])
    if cls.rule is not None:
        with pytest.raises(TypeError, match=words):
            cls([np.ones((4, 3))], max_row_norm=1.0)


def test_memory_order() -> None:
    """Rows must lie one behind the other, also for arrays."""
    table = np.ones((4, 3), order="F")
    for cls in (pyopt.SGD, pyopt.Adagrad, pyopt.FTRL, pyopt.RowwiseAdagrad, pyopt.LazyAdamW):
        optimizer = cls([table], max_row_norm=1.0)
        with pytest.raises(
            ValueError, match=r"parameter 0 has shape \(4, 3\) and strides \(8, 32\), must be in C order"
        ):
            optimizer.step(grads=[np.ones((4, 3))])
        assert (table == 1).all()
