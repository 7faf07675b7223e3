"""Row-sparse gradients: tables of which a step touches few rows, to the bits of the oracles on those rows alone."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyopt
import reference
from cases import DTYPES, assert_same_bits
from pyopt import RowSparse
from pyopt._engine import get_parallel_cost, set_parallel_cost

# Optimizer, oracle, options.
OF_ROWS: list[tuple[Any, Any, dict[str, Any]]] = [
    (pyopt.SGD, reference.sgd, {"lr": 0.1}),
    (pyopt.SGD, reference.sgd, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (pyopt.SGD, reference.sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    (pyopt.SGD, reference.sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (pyopt.Adagrad, reference.adagrad, {}),
    (pyopt.Adagrad, reference.adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    (pyopt.SparseAdam, reference.sparse_adam, {}),
    (pyopt.SparseAdam, reference.sparse_adam, {"betas": (0.4, 0.3), "eps": 1e-3, "maximize": True}),
    (pyopt.FTRL, reference.ftrl, {"l1": 0.1, "l2": 0.5, "beta": 1}),
    (pyopt.RowwiseAdagrad, reference.rowwise_adagrad, {}),
    (pyopt.RowwiseAdagrad, reference.rowwise_adagrad, {"weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    (
        pyopt.RowwiseAdagrad,
        reference.rowwise_adagrad,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
]
IDS = ["-".join([cls.__name__, *options]) for cls, _, options in OF_ROWS]
each = pytest.mark.parametrize(("cls", "oracle", "options"), OF_ROWS, ids=IDS)
BRIEF = [OF_ROWS[i] for i in (0, 3, 5, 6, 8, 9)]
brief = pytest.mark.parametrize(("cls", "oracle", "options"), BRIEF, ids=[row[0].__name__ for row in BRIEF])
# Widths around those of vectors, lines and blocks; of more than one axis; of one element.
SHAPES = [(50, 64), (7, 3), (1000,), (20, 3, 5), (9, 1), (40, 17), (5, 1024), (4, 1025), (3, 3000), (1, 8), (300, 65)]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before, cost = pyopt.get_num_threads(), get_parallel_cost()
    yield
    pyopt.set_num_threads(before)
    set_parallel_cost(cost)


def gradient(shape: tuple[int, ...], n: int, rng: np.random.Generator, dtype: Any, index: Any = np.int64) -> RowSparse:
    """n values over many orders of magnitude, of rows drawn with repetitions."""
    values = rng.standard_normal((n, *shape[1:])) * 10.0 ** rng.uniform(-4, 2, (n, *shape[1:]))
    return RowSparse(rng.integers(0, shape[0], n).astype(index), values.astype(dtype), shape)


def started(optimizer: pyopt.Optimizer) -> dict[str, Any]:
    """The whole state of the one parameter before its first step."""
    (group,) = optimizer.param_groups
    return optimizer.new_state(group["params"][0], group)


def check(cls: Any, oracle: Any, options: dict[str, Any], table: Any, gradients: list[RowSparse]) -> None:
    """Steps of one table side by side with its oracle."""
    optimizer = cls([table], **options)
    expected, state = table.copy(), started(optimizer)
    (group,) = optimizer.param_groups
    for step, g in enumerate(gradients):
        expected, state = reference.of_rows(oracle, expected, g, state, group)
        optimizer.step(grads=[g])
        what = f"{cls.__name__} {table.dtype} {table.shape} step {step + 1}"
        assert_same_bits(table, expected, what)
        live = optimizer.state.get(group["params"][0], {})
        assert set(live) == set(state), what
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                assert_same_bits(live[name], value, f"{what} {name}")
            else:
                assert live[name] == value, f"{what} {name}"


@pytest.mark.parametrize("dtype", DTYPES)
@each
def test_bits_of_the_oracle(cls: Any, oracle: Any, options: dict[str, Any], dtype: Any) -> None:
    """Every shape, with repetitions, an empty gradient between, either type of index, 1 thread and several."""
    rng = np.random.default_rng(0)
    for shape, threads in product(SHAPES, (1, 3)):
        pyopt.set_num_threads(threads)
        set_parallel_cost(0)
        table = rng.standard_normal(shape).astype(dtype)
        sizes = [5, 60, 0, 1, 200]
        gradients = [gradient(shape, n, rng, dtype, (np.int64, np.int32)[i % 2]) for i, n in enumerate(sizes)]
        check(cls, oracle, options, table, gradients)


@settings(deadline=None, max_examples=100)
@given(
    case=st.sampled_from(OF_ROWS),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 4),
)
def test_any_table(case: Any, dtype: Any, shape: Any, sizes: list[int], seed: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    pyopt.set_num_threads(threads)
    set_parallel_cost(0)
    table = rng.standard_normal(shape).astype(dtype)
    check(*case, table, [gradient(shape, n, rng, dtype) for n in sizes])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
@brief
def test_empty_tables(cls: Any, oracle: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    table = np.zeros(shape)
    optimizer = cls([table], **options)
    n = 2 if shape[0] else 0
    for _ in range(2):
        optimizer.step(grads=[RowSparse(np.arange(n), np.zeros((n, *shape[1:])), shape)], nonfinite="raise")
    assert optimizer.last_grad_norm == 0


@brief
def test_all_rows_once_are_the_dense_step(cls: Any, oracle: Any, options: dict[str, Any]) -> None:
    """In any order; and a row-sparse step can follow a dense one."""
    if cls is pyopt.SparseAdam:
        pytest.skip("it takes no dense gradient")
    rng = np.random.default_rng(1)
    tables = [rng.standard_normal((70, 33)) for _ in range(2)]
    tables[1][...] = tables[0]
    opts = [cls([table], **options) for table in tables]
    for step in range(4):
        g = rng.standard_normal((70, 33))
        order = rng.permutation(70)
        opts[0].step(grads=[g])
        opts[1].step(grads=[g if step == 0 else RowSparse(order, g[order], g.shape)])
        assert_same_bits(tables[1], tables[0], f"step {step}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_rows_are_summed_in_double(dtype: Any) -> None:
    """Rounded once: of two values the sum in the type itself, of many the one that is right."""
    values = np.array([[1.0], [3e-8], [3e-8], [3e-8], [-1.0]], dtype)
    table = np.zeros((2, 1), dtype)
    pyopt.SGD([table], lr=1.0).step(grads=[RowSparse(np.zeros(5, np.int64), values, (2, 1))])
    exact = sum(values.astype(np.float64))
    assert table.tolist() == [[-dtype(exact[0])], [0.0]]
    assert dtype(exact[0]) != 0
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 1000)).astype(dtype)
    table = np.zeros((1, 1000), dtype)
    pyopt.SGD([table], lr=1.0).step(grads=[RowSparse([0, 0], np.stack([a, b]), (1, 1000))])
    assert_same_bits(-table[0], a + b, "two values")


def test_order_of_appearance() -> None:
    """A sum in double has an order where it overflows or rounds: that of the places, sorted or not."""
    values = np.array([1e308, 1e308, -1e308, 1.0])[:, None]
    for order, finite in (([0, 2, 1, 3], True), ([0, 1, 2, 3], False)):
        for others in (0, 1):  # in another order of rows the places keep theirs
            table = np.zeros((2, 1))
            indices = np.insert(np.full(4, 1), 2, [0] * others)
            g = RowSparse(indices, np.insert(values[order], 2, np.zeros((others, 1)), axis=0), (2, 1))
            pyopt.SGD([table], lr=1.0).step(grads=[g])
            assert np.isfinite(table).all() == finite


@pytest.mark.parametrize("rows", [1, 2, 3, 255, 256, 257, 2048, 2049, 300_000])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 100, 5000])
def test_sort(rows: int, n: int) -> None:
    """Tables of any size and many indices: every row gets its own values."""
    rng = np.random.default_rng(n + rows)
    for indices in (rng.integers(0, rows, n), np.full(n, rows - 1), np.arange(n)[::-1] % rows, np.arange(n) % rows):
        table = np.zeros(rows)
        values = rng.integers(-1000, 1000, n).astype(np.float64)
        pyopt.SGD([table], lr=1.0).step(grads=[RowSparse(indices, values, (rows,))])
        expected = np.zeros(rows)
        np.subtract.at(expected, indices, values)
        assert (table == expected).all()


@pytest.mark.parametrize("threads", [2, 3, 7])
@each
def test_threads_do_not_change_bits(cls: Any, oracle: Any, options: dict[str, Any], threads: int) -> None:
    results = []
    for count in (1, threads):
        rng = np.random.default_rng(3)
        pyopt.set_num_threads(count)
        set_parallel_cost(0)
        tables = [rng.standard_normal(shape).astype(np.float32) for shape in ((2000, 40), (3, 5000), (50_000,))]
        optimizer = cls(tables, **options)
        for _ in range(3):
            grads = [gradient(t.shape, n, rng, np.float32) for t, n in zip(tables, (1500, 7, 3000), strict=True)]
            optimizer.step(grads=grads, max_norm=1)
        results.append((tables, optimizer.last_grad_norm))
    assert results[0][1] == results[1][1]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert_same_bits(b, a, f"{threads} threads")


# --- together with others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [pyopt.SGD, pyopt.Adagrad, pyopt.FTRL, pyopt.RowwiseAdagrad])
@pytest.mark.parametrize(
    "asked", [{"max_norm": 0.5}, {"gradient_factor": 0.25}, {"max_norm": 1e9, "nonfinite": "raise"}]
)
def test_mixed_model(cls: Any, asked: dict[str, Any]) -> None:
    """A table and dense parameters in one step, clipped and scaled together: as with the dense gradients."""
    rng = np.random.default_rng(4)
    shapes = [(30, 7), (9, 5), (30, 7), (11,)]
    starts = [np.zeros(shape) if cls is pyopt.FTRL else rng.standard_normal(shape) for shape in shapes]  # FTRL's are 0
    ours, dense = ([a.copy() for a in starts] for _ in range(2))
    one, other = (cls(arrays) for arrays in (ours, dense))
    for _ in range(4):
        grads: list[Any] = [
            gradient(shape, 30, rng, np.float64) if i % 2 == 0 else rng.standard_normal(shape)
            for i, shape in enumerate(shapes)
        ]
        one.step(grads=grads, **asked)
        other.step(grads=[g.to_dense() if isinstance(g, RowSparse) else g for g in grads], **asked)
        if "max_norm" in asked:
            assert one.last_grad_norm == pytest.approx(other.last_grad_norm, rel=1e-14)
        for a, b in zip(ours, dense, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_norm_is_that_of_the_sums() -> None:
    optimizer = pyopt.SGD([np.zeros((4, 2)), np.zeros(1)])
    g = RowSparse([1, 3, 1], np.array([[1.0, 2.0], [0.0, 5.0], [1.0, 0.0]]), (4, 2))
    optimizer.step(grads=[g, np.array([4.0])], max_norm=1e9)
    assert optimizer.last_grad_norm == np.sqrt(4 + 4 + 25 + 16)


def test_gradients_of_parameters_and_zero_grad() -> None:
    """As p.grad; zero_grad=True drops it, since it has no zeros; the dense one beside is filled."""
    table, bias = pyopt.Parameter(np.zeros((4, 2))), pyopt.Parameter(np.zeros(2))
    optimizer = pyopt.SGD([table, bias], lr=1.0)
    table.grad, bias.grad = RowSparse([1], np.ones((1, 2)), (4, 2)), np.ones(2)
    optimizer.step(zero_grad=True)
    assert table.data.tolist() == [[0, 0], [-1, -1], [0, 0], [0, 0]] and bias.data.tolist() == [-1, -1]
    assert table.grad is None and bias.grad.tolist() == [0, 0]
    table.grad = RowSparse([1], np.ones((1, 2)), (4, 2))
    optimizer.zero_grad(set_to_none=False)
    assert isinstance(table.grad, RowSparse) and len(table.grad.indices) == 0 and table.grad.shape == (4, 2)
    optimizer.step()
    assert table.data.tolist() == [[0, 0], [-1, -1], [0, 0], [0, 0]]
    optimizer.zero_grad()
    assert table.grad is None


def test_by_name_and_with_a_closure() -> None:
    arrays = {"table": np.zeros((4, 2)), "head": {"b": np.zeros(2)}}
    optimizer = pyopt.SGD(arrays, lr=1.0)
    optimizer.step(lambda: 0.5, grads={"head": {"b": np.ones(2)}, "table": RowSparse([2], np.ones((1, 2)), (4, 2))})
    assert arrays["table"][2].tolist() == [-1, -1] and arrays["head"]["b"].tolist() == [-1, -1]


@pytest.mark.parametrize("nonfinite", ["apply", "raise", "skip"])
@brief
def test_nan_only_where_asked(cls: Any, oracle: Any, options: dict[str, Any], nonfinite: str) -> None:
    table = pyopt.Parameter(np.ones((5, 3)), name="table")
    optimizer = cls([table], **options)
    values = np.ones((2, 3))
    values[1, 1] = np.nan
    before = table.data.copy()
    step = lambda: optimizer.step(grads=[RowSparse([4, 2], values, (5, 3))], nonfinite=nonfinite)  # noqa: E731
    if nonfinite == "raise":
        with pytest.raises(ValueError, match="parameter 'table': its gradient has NaN"):
            step()
    else:
        step()
    if nonfinite == "apply":
        assert np.isnan(table.data[2]).any() and np.isfinite(table.data[[0, 1, 3, 4]]).all()
    else:
        assert_same_bits(table.data, before, nonfinite)
        assert optimizer.skipped_steps == (nonfinite == "skip")


def test_averages() -> None:
    """An average of a table would move as a whole in each step: an error, and nothing has changed."""
    table = np.ones((4, 2))
    optimizer = pyopt.SGD([table])
    ema = pyopt.averaging.EMA(optimizer, every=2)
    g = RowSparse([1], np.ones((1, 2)), (4, 2))
    optimizer.step(grads=[g])
    before = table.copy()
    with pytest.raises(ValueError, match="parameter 0: gradient is row-sparse, which goes with no average"):
        optimizer.step(grads=[g])
    assert_same_bits(table, before, "table")
    ema.detach()
    optimizer.step(grads=[g])


@pytest.mark.parametrize("threads", [1, 3])
def test_what_rides_along_with_a_rule_of_rows(threads: int) -> None:
    """With gradients that are arrays: an average, and zeros in the gradients, in long rows and short ones."""
    pyopt.set_num_threads(threads)
    set_parallel_cost(0)
    rng = np.random.default_rng(10)
    params = [pyopt.Parameter(rng.standard_normal(shape)) for shape in ((50, 40), (3, 2500), (9,))]
    twins = [pyopt.Parameter(p.data.copy()) for p in params]
    optimizer, plain = pyopt.RowwiseAdagrad(params, lr=0.1), pyopt.RowwiseAdagrad(twins, lr=0.1)
    ema = pyopt.averaging.EMA(optimizer, decay=0.25)
    expected: list[Any] = []
    for step in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad, q.grad = (rng.standard_normal(p.shape),) * 2
            q.grad = q.grad.copy()
        optimizer.step(zero_grad=True, max_norm=1.0)
        plain.step(max_norm=1.0)
        assert optimizer.last_grad_norm == plain.last_grad_norm
        moved = zip(expected or [q.data for q in twins], twins, strict=True)
        expected = [q.data - 0.25 * (q.data - a) if step else q.data.copy() for a, q in moved]
        for p, q, a, average in zip(params, twins, expected, ema.averages, strict=True):
            assert_same_bits(p.data, q.data, "parameter")
            np.testing.assert_allclose(average, a, rtol=1e-14)
            assert not p.grad.any() and q.grad.all()


def test_gradients_that_lie_in_the_table() -> None:
    """Values that are rows of the table itself, or of its momentum, are read before anything is written."""
    rng = np.random.default_rng(5)
    table = rng.standard_normal((6, 4))
    expected = table.copy()
    expected[[0, 1, 2]] -= 0.5 * expected[3:6]
    expected[3] -= 0.0
    pyopt.SGD([table], lr=0.5).step(grads=[RowSparse([2, 1, 0], table[3:6][::-1], (6, 4))])
    assert_same_bits(table, expected, "apart")
    expected = table.copy()
    expected[1:4] -= 0.5 * expected[0:3]
    pyopt.SGD([table], lr=0.5).step(grads=[RowSparse([1, 2, 3], table[0:3], (6, 4))])
    assert_same_bits(table, expected, "overlapping")


@pytest.mark.parametrize("layout", ["strided", "reversed", "F", "misaligned", "read-only"])
def test_values_and_indices_of_any_layout(layout: str) -> None:
    rng = np.random.default_rng(6)
    indices, values = np.array([3, 1, 3, 0]), rng.standard_normal((4, 5))
    made = {
        "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
        "reversed": lambda x: np.flip(np.array(np.flip(x))),
        "F": np.asfortranarray,
        "misaligned": lambda x: np.frombuffer(bytearray(b"x" + x.tobytes()), x.dtype, offset=1).reshape(x.shape),
        "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    }[layout]
    tables = [np.ones((5, 5)) for _ in range(2)]
    pyopt.SGD([tables[0]]).step(grads=[RowSparse(indices, values, (5, 5))])
    pyopt.SGD([tables[1]]).step(grads=[RowSparse(made(indices), made(values), (5, 5))])
    assert_same_bits(tables[1], tables[0], layout)


def test_is_sorted() -> None:
    g = RowSparse([0, 2, 2, 3], np.ones((4, 1)), (4, 1), is_sorted=True)
    table = np.zeros((4, 1))
    pyopt.SGD([table], lr=1.0).step(grads=[g])
    assert table[:, 0].tolist() == [-1, 0, -2, -1]


@each
def test_checkpoints(cls: Any, oracle: Any, options: dict[str, Any], tmp_path: Any) -> None:
    """In memory and in a file: what was saved goes on as if nothing had been."""
    rng = np.random.default_rng(7)
    table = rng.standard_normal((20, 6))
    gradients = [gradient((20, 6), 15, rng, np.float64) for _ in range(6)]
    optimizer = cls({"table": table}, **options)
    for g in gradients[:3]:
        optimizer.step(grads=[g])
    copies = [table.copy() for _ in range(2)]
    others = [cls({"table": copy}, **options) for copy in copies]
    others[0].load_state_dict(optimizer.state_dict())
    pyopt.save(tmp_path / "file", optimizer)
    pyopt.load(tmp_path / "file", others[1])
    for g in gradients[3:]:
        for each_one in (optimizer, *others):
            each_one.step(grads=[g])
    for copy in copies:
        assert_same_bits(copy, table, "resumed")


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = np.ones((2, 3))
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a negative index": (lambda: RowSparse([0, -1], GOOD, (4, 3)), IndexError, r"indices\[1\] == -1, must be 0 to 3"),
    "an index beyond the table": (
        lambda: RowSparse([4, 0], GOOD, (4, 3)),
        IndexError,
        r"indices\[0\] == 4, must be 0 to 3",
    ),
    "an index far beyond the table": (
        lambda: RowSparse([0, 2**62], GOOD, (4, 3)),
        IndexError,
        r"indices\[1\] == 4611686018427387904, must be 0 to 3",
    ),
    "a negative index, int32": (
        lambda: RowSparse(np.array([0, -1], np.int32), GOOD, (4, 3)),
        IndexError,
        r"indices\[1\] == -1, must be 0 to 3",
    ),
    "indices that descend, is_sorted=True": (
        lambda: RowSparse([1, 0], GOOD, (4, 3), is_sorted=True),
        ValueError,
        "indices descend at place 1, must not",
    ),
    "values of another dtype": (
        lambda: RowSparse([0, 1], GOOD.astype(np.float32), (4, 3)),
        TypeError,
        "values has dtype float32, must be float64",
    ),
    "rows of another width": (
        lambda: RowSparse([0, 1], np.ones((2, 4)), (4, 4)),
        ValueError,
        r"shape \(4, 4\), must be \(4, 3\)",
    ),
    "a table of another length": (
        lambda: RowSparse([0, 1], GOOD, (5, 3)),
        ValueError,
        r"shape \(5, 3\), must be \(4, 3\)",
    ),
    "a table of another number of axes": (
        lambda: RowSparse([0, 1], np.ones(2), (4,)),
        ValueError,
        r"shape \(4,\), must be \(4, 3\)",
    ),
}
NEVER: dict[str, tuple[Any, type[Exception], str]] = {
    "rows of another width than the shape's": (
        lambda: RowSparse([0, 1], np.ones((2, 4)), (4, 3)),
        ValueError,
        r"values has shape \(2, 4\), must be \(2, 3\)",
    ),
    "more values than indices": (
        lambda: RowSparse([0], GOOD, (4, 3)),
        ValueError,
        r"values has shape \(2, 3\), must be \(1, 3\)",
    ),
    "indices of two axes": (
        lambda: RowSparse([[0, 1]], GOOD, (4, 3)),
        ValueError,
        r"indices has shape \(1, 2\), must have one axis",
    ),
    "indices of float64": (
        lambda: RowSparse([0.0, 1.0], GOOD, (4, 3)),
        TypeError,
        "indices has dtype <f8 .float64., must be int32 or int64",
    ),
    "indices of uint8": (
        lambda: RowSparse(np.array([0, 1], np.uint8), GOOD, (4, 3)),
        TypeError,
        "indices has dtype .u1",
    ),
    "indices of bool": (lambda: RowSparse(np.array([True, False]), GOOD, (4, 3)), TypeError, "indices has dtype .b1"),
    "indices in the other byte order": (
        lambda: RowSparse(np.array([0, 1], ">i8"), GOOD, (4, 3)),
        TypeError,
        "indices has dtype >i8",
    ),
    "values of int64": (
        lambda: RowSparse([0, 1], GOOD.astype(np.int64), (4, 3)),
        TypeError,
        "values has dtype .*int64.*float32 or float64",
    ),
    "values in a list": (
        lambda: RowSparse([0, 1], [[1.0] * 3] * 2, (4, 3)),
        TypeError,
        "values is a list, must be a numpy.ndarray",
    ),
    "indices in a set": (
        lambda: RowSparse({0, 1}, GOOD, (4, 3)),
        TypeError,
        "indices is a set, must be a numpy.ndarray",
    ),
    "a shape without axes": (
        lambda: RowSparse([0, 1], np.ones(2), ()),
        ValueError,
        r"shape is \(\), must have one axis or more",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=list(BAD))
@brief
def test_bad_gradients(cls: Any, oracle: Any, options: Any, make: Any, error: Any, message: str) -> None:
    """The first step, and a later one: named, before anything has changed, here or in the parameter before."""
    for steps in (0, 1):
        params = [pyopt.Parameter(np.ones((4, 3)), name=name) for name in ("good", "table")]
        optimizer = cls(params, **options)
        good = RowSparse([1, 2], GOOD, (4, 3))
        for _ in range(steps):
            optimizer.step(grads=[good, good])
        before = str(optimizer.state_dict()), [p.data.tobytes() for p in params]
        for _ in range(2):
            with pytest.raises(error, match=f"parameter 'table'.*{message}"):
                optimizer.step(grads=[good, make()])
            assert before == (str(optimizer.state_dict()), [p.data.tobytes() for p in params])
        optimizer.step(grads=[good, good])


@pytest.mark.parametrize(("make", "error", "message"), NEVER.values(), ids=list(NEVER))
def test_bad_arguments(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_changed_since() -> None:
    """What was set afterwards is looked at in the step."""
    table = np.ones((4, 3))
    optimizer = pyopt.SGD([table])
    g = RowSparse([0, 1], GOOD.copy(), (4, 3))
    g.indices[1] = 7
    with pytest.raises(IndexError, match=re.escape("indices[1] == 7")):
        optimizer.step(grads=[g])
    g.indices[1], g.values = 1, np.ones((3, 3))
    with pytest.raises(ValueError, match=r"values has shape \(3, 3\), must be \(2, 3\)"):
        optimizer.step(grads=[g])
    g.indices, g.values = None, GOOD
    with pytest.raises(TypeError, match="indices is a NoneType"):
        optimizer.step(grads=[g])
    assert (table == 1).all()


TAKERS = (pyopt.SGD, pyopt.Adagrad, pyopt.SparseAdam, pyopt.FTRL, pyopt.RowwiseAdagrad, pyopt.LazyAdamW)
OTHERS = sorted(
    {
        value
        for value in vars(pyopt).values()
        if isinstance(value, type) and issubclass(value, pyopt.Optimizer) and value not in (*TAKERS, pyopt.Optimizer)
    },
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)
def test_the_other_optimizers_say_that_they_take_none(cls: Any) -> None:
    table = pyopt.Parameter(np.ones((4, 3)), RowSparse([1], np.ones((1, 3)), (4, 3)), name="table")
    optimizer = cls([table])
    args = (lambda: 0.0,) if cls is pyopt.LBFGS else ()
    with pytest.raises(TypeError, match=r"parameter 'table': gradient is (row-sparse|a RowSparse)"):
        optimizer.step(*args)
    assert (table.data == 1).all() and not optimizer.state.get(table)


def test_sparse_adam_takes_no_arrays() -> None:
    table = np.ones((4, 3))
    optimizer = pyopt.SparseAdam([table])
    with pytest.raises(TypeError, match="parameter 0: gradient is a ndarray, must be a RowSparse for SparseAdam; Adam"):
        optimizer.step(grads=[np.ones((4, 3))])
    assert (table == 1).all() and not optimizer.state
    for options in ({"lr": 0}, {"eps": 0}):
        with pytest.raises(ValueError, match="must be finite and > 0"):
            pyopt.SparseAdam([table], **options)


@brief
def test_memory_order_of_the_table(cls: Any, oracle: Any, options: Any) -> None:
    table = np.ones((4, 3), order="F")
    optimizer = cls([table], **options)
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(4, 3\) and strides \(8, 32\), must be in C order"):
        optimizer.step(grads=[RowSparse([1], np.ones((1, 3)), (4, 3))])
    assert (table == 1).all()


def test_to_dense_and_repr() -> None:
    g = RowSparse([2, 0, 2], np.array([[1.0], [2.0], [3.0]], np.float32), (3, 1))
    assert g.to_dense().tolist() == [[2.0], [0.0], [4.0]] and g.to_dense().dtype == g.dtype == np.float32
    assert repr(g) == "RowSparse(3 rows of shape (3, 1), dtype=float32)"
    with pytest.raises(IndexError, match=r"indices\[0\] == 3, must be 0 to 2"):
        RowSparse([3], np.ones((1, 1)), (3, 1)).to_dense()


# --- what it costs ----------------------------------------------------------------------------------------------------


@brief
def test_memory_by_touched_rows(cls: Any, oracle: Any, options: Any) -> None:
    """A step behind the first allocates nothing that grows with the table."""
    table = np.zeros((200_000, 8), np.float32)
    optimizer = cls([table], **options)
    rng = np.random.default_rng(8)
    for _ in range(2):
        optimizer.step(grads=[gradient(table.shape, 100, rng, np.float32)], max_norm=1.0, zero_grad=False)
    g = gradient(table.shape, 100, rng, np.float32)
    tracemalloc.start()
    try:
        optimizer.step(grads=[g], max_norm=1.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_time_by_touched_rows() -> None:
    """Generous, for busy machines and first touches of memory: a pass over the table would take 500 times as long."""
    times = []
    for rows in (2_000, 1_000_000):
        table = np.zeros((rows, 16), np.float32)
        optimizer = pyopt.Adagrad([table])
        rng = np.random.default_rng(9)
        gradients = [gradient(table.shape, 50, rng, np.float32) for _ in range(30)]
        own = []
        for g in gradients:
            begin = perf_counter()
            optimizer.step(grads=[g])
            own.append(perf_counter() - begin)
        times.append(min(own))
    assert times[1] < 50 * times[0]
