"""LazyAdamW: at the cost of the touched rows what AdamW makes of the whole table, with gradients of zero elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pyopt
from cases import DTYPES, assert_same_bits
from pyopt import RowSparse
from pyopt.optimizers import lazy_adamw


def touched(shape: tuple[int, ...], n: int, rng: np.random.Generator, dtype: Any = np.float64) -> RowSparse:
    return RowSparse(rng.integers(0, shape[0], n), rng.standard_normal((n, *shape[1:])).astype(dtype), shape)


class Pair:
    """LazyAdamW and dense AdamW on tables that begin alike."""

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.float64, **options: Any) -> None:
        self.rng = np.random.default_rng(0)
        self.table = self.rng.standard_normal(shape).astype(dtype)
        self.dense_table = self.table.copy()
        self.lazy = pyopt.LazyAdamW([self.table], **options)
        self.dense = pyopt.AdamW([self.dense_table], **options)

    def step(self, n: int, **asked: Any) -> RowSparse:
        g = touched(self.table.shape, n, self.rng, self.table.dtype)
        self.lazy.step(grads=[g], **asked)
        self.dense.step(grads=[g.to_dense()], **asked)
        return g

    def states(self) -> list[tuple[Any, Any]]:
        entries = [next(iter(opt.state.values())) for opt in (self.lazy, self.dense)]
        names = ("exp_avg", "exp_avg_sq")
        return [(self.table, self.dense_table), *((entries[0][name], entries[1][name]) for name in names)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "weight_decay": 0.5, "maximize": True}], ids=str)
def test_bits_of_dense_training(options: dict[str, Any], dtype: Any) -> None:
    """Rows that come back within the window: each missed step by the rule itself, so nothing differs, to the bit."""
    pair = Pair((12, 5), dtype, **options)
    for step in range(60):
        g = pair.step(3 if step % 7 else 0)
        for ours, dense in pair.states():
            rows = np.unique(g.indices)
            assert_same_bits(ours[rows], dense[rows], f"step {step}")
    assert any((a != b).any() for a, b in pair.states())
    pair.lazy.catch_up()
    for ours, dense in pair.states():
        assert_same_bits(ours, dense, "caught up")


def test_without_momentum() -> None:
    """Nothing of a row's momentum is left after a step: what it missed is a product."""
    pair = Pair((12, 5), betas=(0.0, 0.5), weight_decay=0.3, lr=0.1)
    for _ in range(40):
        pair.step(2)
    pair.lazy.catch_up()
    for ours, dense in pair.states():
        np.testing.assert_allclose(ours, dense, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
def test_500_steps_of_random_touches(schedule: bool) -> None:
    """To the rounding of float64, whatever a row's age; the options change as they like in between."""
    pair = Pair((400, 4), lr=0.01, weight_decay=0.1)
    for step in range(500):
        for opt in (pair.lazy, pair.dense):
            if schedule:
                opt.param_groups[0]["lr"] = 0.01 * (1 + math.cos(step / 80))
                opt.param_groups[0]["betas"] = (0.9, 0.999) if step < 250 else (0.8, 0.99)
        pair.step(2)
    pair.lazy.catch_up()
    for ours, dense in pair.states():
        np.testing.assert_allclose(ours, dense, rtol=1e-12, atol=1e-15)
    assert (next(iter(pair.lazy.state.values()))["row_step"] == 500).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_have_rested_for_long(dtype: Any) -> None:
    """Far beyond the window, where a product takes the place of the steps."""
    pair = Pair((6, 8), dtype, lr=0.01, weight_decay=0.01)
    for _ in range(3):
        pair.step(6)
    window = lazy_adamw._window(next(iter(pair.lazy.state.values()))["history"], np.dtype(dtype))
    assert 100 < window < 1000
    none = RowSparse(np.array([], np.int64), np.empty((0, 8), dtype), (6, 8))
    for step in range(2500):
        for opt in (pair.lazy, pair.dense):
            opt.param_groups[0]["lr"] = 0.01 if step < 1200 else 0.02
        pair.lazy.step(grads=[none])
        pair.dense.step(grads=[none.to_dense()])
    pair.step(4)
    pair.lazy.catch_up()
    ours, dense = pair.table, pair.dense_table
    np.testing.assert_allclose(ours, dense, rtol=3e-4 if dtype is np.float32 else 2e-12)  # 2500 roundings of dense


def test_catch_up_of_some_rows() -> None:
    """Before a batch reads them: they are those of dense training, the others stay."""
    pair = Pair((10, 3), lr=0.1)
    for _ in range(5):
        pair.step(3)
    before = pair.table.copy()
    pair.lazy.catch_up(pair.table, [4, 7, 4])
    assert_same_bits(pair.table[[4, 7]], pair.dense_table[[4, 7]], "rows")
    others = [0, 1, 2, 3, 5, 6, 8, 9]
    assert_same_bits(pair.table[others], before[others], "others")
    pair.lazy.catch_up(pair.lazy.param_groups[0]["params"][0], np.arange(10))
    assert_same_bits(pair.table, pair.dense_table, "all")
    for bad in ([10], [-1]):
        with pytest.raises(IndexError, match=rf"rows has {bad[0]}, must be 0 to 9"):
            pair.lazy.catch_up(pair.table, bad)
    with pytest.raises(ValueError, match="param is no parameter of this optimizer"):
        pair.lazy.catch_up(np.zeros(3))


def test_training_is_that_of_dense_training() -> None:
    """With rows caught up before they are read, gradients that depend on the table are the same too."""
    pair = Pair((30, 4), lr=0.05, weight_decay=0.1)
    target = pair.rng.standard_normal((30, 4))
    for _ in range(100):
        batch = pair.rng.integers(0, 30, 5)
        pair.lazy.catch_up(pair.table, batch)
        g = RowSparse(batch, pair.table[batch] - target[batch], (30, 4))
        dense = RowSparse(batch, pair.dense_table[batch] - target[batch], (30, 4)).to_dense()
        pair.lazy.step(grads=[g])
        pair.dense.step(grads=[dense])
    pair.lazy.catch_up()
    assert_same_bits(pair.table, pair.dense_table, "trained")


def test_dense_and_sparse_together() -> None:
    """A table with rows, one with an array now and then, a bias; clipped and scaled together."""
    rng = np.random.default_rng(1)
    starts = [rng.standard_normal(shape) for shape in ((20, 3), (20, 3), (7,), ())]
    lazy_arrays, dense_arrays = ([np.array(a) for a in starts] for _ in range(2))
    lazy, dense = pyopt.LazyAdamW(lazy_arrays, lr=0.1), pyopt.AdamW(dense_arrays, lr=0.1)
    for step in range(20):
        grads: list[Any] = [
            touched((20, 3), 4, rng),
            touched((20, 3), 4, rng) if step % 5 else rng.standard_normal((20, 3)),
        ]
        grads += [rng.standard_normal(7), np.array(1.0) if step % 2 else None]
        lazy.step(grads=grads, max_norm=1.0, gradient_factor=0.5, nonfinite="raise")
        as_dense = [g.to_dense() if isinstance(g, RowSparse) else g for g in grads]
        dense.step(grads=as_dense, max_norm=1.0, gradient_factor=0.5)
        assert lazy.last_grad_norm == pytest.approx(dense.last_grad_norm, rel=1e-14)
    lazy.catch_up()
    for a, b in zip(lazy_arrays, dense_arrays, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_many_changes_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept for rows that are behind, and not without end: then all rows are brought up to date."""
    monkeypatch.setattr(lazy_adamw, "MOST_CHANGES", 10)
    pair = Pair((50, 3), lr=0.1)
    lengths = []
    for step in range(45):
        for opt in (pair.lazy, pair.dense):
            opt.param_groups[0]["lr"] = 0.1 / (1 + step)
        pair.step(2)
        lengths.append(len(next(iter(pair.lazy.state.values()))["history"]))
    assert max(lengths) == 10 and min(lengths[20:]) == 1
    pair.lazy.catch_up()
    for ours, dense in pair.states():
        assert_same_bits(ours, dense, "caught up")


def test_checkpoints(tmp_path: Any) -> None:
    """With rows that are behind, in memory and in a file: it goes on with the same bits."""
    pair = Pair((20, 3), lr=0.1)
    for _ in range(6):
        pair.step(3)
    copies = [pair.table.copy() for _ in range(2)]
    others = [pyopt.LazyAdamW([copy], lr=0.3) for copy in copies]
    others[0].load_state_dict(pair.lazy.state_dict())
    pyopt.save(tmp_path / "file", pair.lazy)
    pyopt.load(tmp_path / "file", others[1])
    for _ in range(6):
        g = pair.step(3)
        for other in others:
            other.step(grads=[g])
    for opt in (pair.lazy, *others):
        opt.catch_up()
    for copy in copies:
        assert_same_bits(copy, pair.table, "resumed")
    assert_same_bits(pair.table, pair.dense_table, "dense")
    good = pair.lazy.state_dict()
    for name, bad in (("row_step", np.zeros(3, np.int64)), ("row_step", np.zeros(20)), ("history", np.zeros((1, 2)))):
        broken = pair.lazy.state_dict()
        broken["state"][0][name] = bad
        with pytest.raises((ValueError, TypeError), match=f"parameter 0.*{name}"):
            others[0].load_state_dict(broken)
        del broken["state"][0][name]
        with pytest.raises(KeyError, match=name):
            others[0].load_state_dict(broken)
    others[0].load_state_dict(good)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RowSparse([1, -1], np.ones((2, 3)), (4, 3)), IndexError, r"indices\[1\] == -1, must be 0 to 3"),
        (lambda: RowSparse([4, 1], np.ones((2, 3)), (4, 3)), IndexError, r"indices\[0\] == 4, must be 0 to 3"),
        (lambda: RowSparse([1, 0], np.ones((2, 3)), (4, 3), is_sorted=True), ValueError, "descend at place 1"),
        (lambda: RowSparse([1, 0], np.ones((2, 4)), (4, 4)), ValueError, r"shape \(4, 4\), must be \(4, 3\)"),
        (lambda: np.ones((4, 2)), ValueError, r"shape \(4, 2\), must be \(4, 3\)"),
    ],
    ids=["negative", "beyond", "unsorted", "width", "dense"],
)
def test_bad_gradients(make: Any, error: Any, message: str) -> None:
    """Nothing has changed, here or in the parameter before."""
    tables = [np.ones((4, 3)), np.ones((4, 3))]
    optimizer = pyopt.LazyAdamW(tables)
    good = RowSparse([0, 2], np.ones((2, 3)), (4, 3))
    for steps in range(2):
        before = str(optimizer.state_dict()), [t.tobytes() for t in tables]
        with pytest.raises(error, match=f"parameter 1.*{message}"):
            optimizer.step(grads=[good, make()])
        assert before == (str(optimizer.state_dict()), [t.tobytes() for t in tables]), steps
        optimizer.step(grads=[good, good])


def test_memory_order() -> None:
    optimizer = pyopt.LazyAdamW([np.ones((4, 3), order="F")])
    with pytest.raises(ValueError, match="must be in C order"):
        optimizer.step(grads=[np.ones((4, 3))])


def test_nan_only_where_asked() -> None:
    table = np.ones((4, 3))
    optimizer = pyopt.LazyAdamW([table])
    g = RowSparse([1], np.full((1, 3), np.nan), (4, 3))
    with pytest.raises(ValueError, match="parameter 0: its gradient has NaN"):
        optimizer.step(grads=[g], nonfinite="raise")
    optimizer.step(grads=[g], nonfinite="skip")
    assert (table == 1).all() and optimizer.skipped_steps == 1
    optimizer.step(grads=[g])
    assert np.isnan(table[1]).all() and np.isfinite(table[[0, 2, 3]]).all()
