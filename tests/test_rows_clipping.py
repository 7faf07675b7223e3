"""Norms and clipping of row-sparse gradients and mixed models: of the rows' sums, with the bits of the step's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pyopt
from cases import DTYPES, assert_same_bits
from pyopt import Parameter, RowSparse
from test_engine import everything_shared
from test_rows import gradient

SHAPES = [(50, 64), (7, 3), (1000,), (3, 3000), (20, 3, 5)]
of_any_norm = pytest.mark.parametrize("norm_type", [1, 2.0, math.inf, 0.5, 3])


def model(dtype: Any = np.float64, seed: int = 0) -> list[Parameter]:
    """Tables with gradients of rows, repeated ones, between dense parameters."""
    rng = np.random.default_rng(seed)
    params = []
    for i, shape in enumerate(SHAPES):
        params.append(Parameter(np.zeros(shape, dtype), gradient(shape, 40, rng, dtype, (np.int64, np.int32)[i % 2])))
        params.append(Parameter(np.zeros(7, dtype), rng.standard_normal(7).astype(dtype)))
    params.append(Parameter(np.zeros((4, 2), dtype)))  # without
    return params


def dense(params: list[Parameter]) -> list[Any]:
    return [p.grad.to_dense() if isinstance(p.grad, RowSparse) else p.grad for p in params if p.grad is not None]


@of_any_norm
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_that_of_the_sums(norm_type: float, dtype: Any) -> None:
    params = model(dtype)
    expected = pyopt.get_total_norm(dense(params), norm_type)
    grads = [p.grad for p in params]
    for tensors in (params, grads, {"tables": grads[:3], "rest": {"x": grads[3:]}}):
        assert pyopt.get_total_norm(tensors, norm_type) == pytest.approx(expected, rel=1e-13)
    for p in params[:3:2]:
        alone = pyopt.get_total_norm(dense([p]), norm_type)
        assert pyopt.get_total_norm(p, norm_type) == pytest.approx(alone, rel=1e-13)
        assert pyopt.get_total_norm(p.grad, norm_type) == pytest.approx(alone, rel=1e-13)


def test_values_that_cancel() -> None:
    g = RowSparse([2, 2, 0], np.array([[3.0], [-3.0], [4.0]]), (3, 1))
    assert pyopt.get_total_norm(g) == pyopt.get_total_norm(g, 1) == pyopt.get_total_norm(g, math.inf) == 4
    assert pyopt.get_total_norm(RowSparse([], np.empty((0, 3)), (4, 3))) == 0
    assert pyopt.get_total_norm(RowSparse([1, 1], np.empty((2, 0)), (4, 0))) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_step(dtype: Any) -> None:
    """clip_grad_norm_ and a step are a step with max_norm; its norm is the step's, on any number of threads."""
    norms, results = [], []
    for threads in (1, 3):
        with everything_shared(), pyopt.num_threads(threads):
            params, others = model(dtype), model(dtype)
            norms.append(pyopt.clip_grad_norm_(params, 0.5))
            optimizer = pyopt.SGD(others, lr=1.0)
            optimizer.step(max_norm=0.5)
            assert optimizer.last_grad_norm == norms[-1]
            pyopt.SGD(params, lr=1.0).step()
            for p, q in zip(params, others, strict=True):
                few = 4 * np.finfo(dtype).eps  # values were rounded each, and the sum of them once
                np.testing.assert_allclose(p.data, q.data, rtol=few, atol=few)
            results.append(b"".join(p.data.tobytes() for p in params))
    assert norms[0] == norms[1] and results[0] == results[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_multiplied(dtype: Any) -> None:
    """In place, each once; where the norm is known too; nothing where it is small enough."""
    params = model(dtype)
    before = [p.grad.values.copy() for p in params if isinstance(p.grad, RowSparse)]
    arrays = [p.grad.values for p in params if isinstance(p.grad, RowSparse)]
    norm = pyopt.clip_grad_norm_([*params, *params[:2]], 0.5)
    factor = dtype(0.5 / (pyopt.get_total_norm(model(dtype) + model(dtype)[:2]) + 1e-6))
    assert norm == pyopt.get_total_norm(model(dtype) + model(dtype)[:2])
    for array, values in zip(arrays, before, strict=True):
        assert_same_bits(array, values * factor, "values")
    bits = [array.tobytes() for array in arrays]
    pyopt.clip_grad_norm_(params, 1e9)
    assert bits == [array.tobytes() for array in arrays]
    pyopt.clip_grads_with_norm_(params, 1.0, 3.999999)
    for array, values in zip(arrays, before, strict=True):
        assert_same_bits(array, values * factor * dtype(0.25), "values")


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_value(dtype: Any) -> None:
    """Of the sums; a gradient with each row once is changed where it lies, in its own order."""
    params, others = model(dtype), model(dtype)
    expected = [np.clip(g, dtype(-0.3), dtype(0.3)) for g in dense(others)]
    once = Parameter(np.zeros((5, 2), dtype), RowSparse([4, 1], np.array([[1, -1], [0.1, np.nan]], dtype), (5, 2)))
    indices, values = once.grad.indices, once.grad.values
    pyopt.clip_grad_value_([*params, once], 0.3)
    for g, e in zip(dense(params), expected, strict=True):
        assert_same_bits(g, e, "clipped")
    assert once.grad.indices is indices and once.grad.values is values and indices.tolist() == [4, 1]
    assert_same_bits(values, np.array([[0.3, -0.3], [0.1, np.nan]], dtype), "values")
    table = params[0].grad
    assert table.is_sorted and (np.diff(table.indices) > 0).all() and len(table.indices) == len(table.values)
    pyopt.SGD(params).step(nonfinite="raise")
    bare = RowSparse([1, 1], np.array([[2.0], [-1.5]]), (3, 1))
    given = bare.values
    pyopt.clip_grad_value_([bare, bare], 0.25)
    assert bare.to_dense().tolist() == [[0], [0.25], [0]] and given.tolist() == [[2.0], [-1.5]]


@pytest.mark.parametrize("layout", ["strided", "F", "misaligned"])
def test_values_of_any_layout(layout: str) -> None:
    made = {
        "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
        "F": np.asfortranarray,
        "misaligned": lambda x: np.frombuffer(bytearray(b"x" + x.tobytes()), x.dtype, offset=1).reshape(x.shape),
    }[layout]
    for clip in (lambda p: pyopt.clip_grad_norm_(p, 0.5), lambda p: pyopt.clip_grad_value_(p, 0.5)):
        results = []
        for make in (made, np.copy):
            values = make(np.random.default_rng(0).standard_normal((3, 5)))
            p = Parameter(np.zeros((6, 5)), RowSparse([3, 1, 2], values, (6, 5)))
            clip([p])
            assert p.grad.values is values
            results.append(values)
        assert_same_bits(np.array(results[0]), np.array(results[1]), layout)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "negative": (
        lambda: RowSparse([1, -1], np.ones((2, 3)), (4, 3)),
        IndexError,
        r"indices\[1\] == -1, must be 0 to 3",
    ),
    "beyond": (lambda: RowSparse([4, 1], np.ones((2, 3)), (4, 3)), IndexError, r"indices\[0\] == 4, must be 0 to 3"),
    "unsorted": (
        lambda: RowSparse([1, 0], np.ones((2, 3)), (4, 3), is_sorted=True),
        ValueError,
        "indices descend at place 1, must not with is_sorted=True",
    ),
    "read-only": (
        lambda: RowSparse([1, 0], np.broadcast_to(1.0, (2, 3)), (4, 3)),
        ValueError,
        "is read-only, must be writable",
    ),
}
OF_TABLE: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (lambda: RowSparse([1], np.ones((1, 3)), (5, 3)), ValueError, r"shape \(5, 3\), must be \(4, 3\)"),
    "dtype": (lambda: RowSparse([1], np.ones((1, 3), np.float32), (4, 3)), TypeError, "dtype float32, must be float64"),
}
CLIPS = {
    "norm": lambda grads: pyopt.clip_grad_norm_(grads, 0.1),
    "known": lambda grads: pyopt.clip_grads_with_norm_(grads, 0.1, 5.0),
    "value": lambda grads: pyopt.clip_grad_value_(grads, 0.1),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("what", [*BAD, *OF_TABLE])
def test_bad_gradients(what: str, clip: str) -> None:
    """Named, and nothing has changed, here or in the gradient before."""
    make, error, message = (BAD | OF_TABLE)[what]
    first = Parameter(np.zeros((4, 3)), RowSparse([2, 2], np.ones((2, 3)), (4, 3)))
    table = Parameter(np.zeros((4, 3)), make(), name="table")
    before = first.grad.values.tobytes(), first.grad.indices.tobytes(), table.grad.values.tobytes()
    ways = [("'table'", [first, table])]
    if what in BAD:
        ways += [("gradient 1", [first.grad, table.grad]), ("'t.1'", {"a": first.grad, "t": {"1": table.grad}})]
    for words, parameters in ways:
        with pytest.raises(error, match=f"{words}.*{message}"):
            CLIPS[clip](parameters)
        assert before == (first.grad.values.tobytes(), first.grad.indices.tobytes(), table.grad.values.tobytes())
    if what in ("negative", "beyond", "unsorted"):
        with pytest.raises(error, match=f"gradient 1: {message}"):
            pyopt.get_total_norm([first.grad, table.grad])


def test_overlapping_values() -> None:
    memory = np.ones((4, 3))
    grads = [RowSparse([0, 1], memory[:2], (5, 3)), RowSparse([0, 1], memory[1:3], (5, 3))]
    with pytest.raises(ValueError, match="gradients 0 and 1 overlap in memory"):
        pyopt.clip_grad_norm_(grads, 0.1)
    assert (memory == 1).all()
    same = [RowSparse([0, 1], memory[:2], (5, 3)), RowSparse([3, 4], memory[:2], (5, 3))]
    pyopt.clip_grad_norm_(same, math.sqrt(12) / 2)
    np.testing.assert_allclose(memory[:2], 0.5, rtol=1e-6)
    assert (memory[2:] == 1).all()


def test_not_finite() -> None:
    """Also where the sum alone is not."""
    g = RowSparse([1, 1], np.array([[3e38], [3e38]], np.float32), (2, 1))
    assert pyopt.get_total_norm(g) == math.inf
    with pytest.raises(RuntimeError, match="is inf, must be finite"):
        pyopt.clip_grad_norm_([g], 1.0, error_if_nonfinite=True)
    assert (g.values == np.float32(3e38)).all()


# --- what a step does with a mixed model ------------------------------------------------------------------------------

MIXED = [pyopt.SGD, pyopt.Adagrad, pyopt.FTRL, pyopt.RowwiseAdagrad, pyopt.LazyAdamW]
mixed = pytest.mark.parametrize("cls", MIXED, ids=lambda cls: cls.__name__)


@mixed
@pytest.mark.parametrize("zero_grad", [True, "set_to_none"])
@pytest.mark.parametrize("spoilt", ["rows", "dense", None])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_step(cls: Any, zero_grad: Any, spoilt: str | None, nonfinite: str) -> None:
    """Skipped or refused as a whole; cleared as a whole, but for a step that is refused."""
    params, twins = model(), model()
    optimizer, twin = cls(params, lr=0.1), cls(twins, lr=0.1)
    for each in (optimizer, twin):
        each.step()
    before = [p.data.copy() for p in params]
    for p, q in zip(params, model(seed=1), strict=True):
        p.grad = q.grad
    for p, q in zip(twins, model(seed=1), strict=True):
        p.grad = q.grad
    if spoilt is not None:
        place = 4 if spoilt == "rows" else 5
        array = params[4].grad.values if spoilt == "rows" else params[5].grad
        array.reshape(-1)[3] = np.nan
    step = lambda: optimizer.step(max_norm=0.5, nonfinite=nonfinite, zero_grad=zero_grad)  # noqa: E731
    if spoilt is not None and nonfinite == "raise":
        with pytest.raises(ValueError, match=f"parameter {place}: its gradient has NaN"):
            step()
        assert all(p.grad is q.grad or p.grad is not None for p, q in zip(params, twins, strict=True))
    else:
        step()
        for p in params[:-1]:
            assert p.grad is None or (zero_grad is True and p.ndim == 1 and not np.any(p.grad))
    twin.step(max_norm=0.5)
    for p, q, b in zip(params, twins, before, strict=True):
        assert_same_bits(p.data, q.data if spoilt is None else b, "step")
    assert optimizer.skipped_steps == (spoilt is not None and nonfinite == "skip")


@mixed
def test_scale(cls: Any) -> None:
    """gradient_factor over a mixed model is that of multiplied gradients, where a power of two rounds nothing."""
    params, twins = model(), model()
    for q in twins:
        if isinstance(q.grad, RowSparse):
            q.grad.values *= 0.25
        elif q.grad is not None:
            q.grad *= 0.25
    optimizers = [cls(each, lr=0.1) for each in (params, twins)]
    optimizers[0].step(gradient_factor=0.25, max_norm=0.5)
    optimizers[1].step(max_norm=0.5)
    assert optimizers[0].last_grad_norm == optimizers[1].last_grad_norm
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p.data, q.data, "scaled")


@mixed
def test_zero_grad(cls: Any) -> None:
    params = model()
    optimizer = cls(params)
    optimizer.zero_grad(set_to_none=False)
    assert pyopt.get_total_norm(params) == 0
    before = [p.data.copy() for p in params]
    optimizer.step(nonfinite="raise")
    assert optimizer.last_grad_norm == 0
    assert all((p.data == b).all() for p, b in zip(params, before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
