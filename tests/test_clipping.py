"""Norms and clipping of gradients on arrays: against an oracle in float64, in every memory order, in the same bits."""

from __future__ import annotations

import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyopt
from all_optimizers import BROADCAST, LAYOUTS, TYPES, bits, random
from extras import BAD, clip_factor, exact_norm, raises_and_changes_nothing, scaled
from pyopt._isa import supported_levels
from test_engine import everything_shared
from whole_steps import in_process

NORMS = [1, 2, math.inf, 0.5, 3, 2.0, 1.0]
SIZES = [0, 1, 2, 15, 16, 17, 1023, 1024, 1025, 4096, 100_000]
of_any_norm = pytest.mark.parametrize("norm_type", NORMS)


def close(actual: float, expected: float, rtol: float = 1e-13) -> None:
    assert isinstance(actual, float)
    assert actual == pytest.approx(expected, rel=rtol, abs=0, nan_ok=True)


def spread(shape: Any, dtype: str, seed: int = 0) -> Any:
    """Elements over many orders of magnitude."""
    orders = np.random.default_rng(seed + 1).uniform(-6, 3, shape)
    return np.asarray(random(shape, "float64", seed) * 10.0**orders).astype(dtype)


def with_gradients(shapes: Any, dtype: str = "float32") -> list[pyopt.Parameter]:
    return [pyopt.Parameter(np.zeros(s, dtype), spread(s, dtype, i)) for i, s in enumerate(shapes)]


# --- norms ------------------------------------------------------------------------------------------------------------


@of_any_norm
@TYPES
def test_norms_of_every_size(norm_type: float, dtype: str) -> None:
    tensors = [spread(n, dtype, n) for n in SIZES]
    for each in tensors:
        close(pyopt.get_total_norm([each], norm_type), exact_norm([each], norm_type))
    close(pyopt.get_total_norm(tensors, norm_type), exact_norm(tensors, norm_type))


@of_any_norm
def test_norms_over_both_dtypes_and_all_shapes(norm_type: float) -> None:
    tensors = [
        spread((3, 4), "float32"),
        spread((), "float64", 1),
        spread((0, 7), "float32"),
        spread((2, 3, 5), "float64"),
    ]
    close(pyopt.get_total_norm(tensors, norm_type), exact_norm(tensors, norm_type))


@of_any_norm
@pytest.mark.parametrize("layout", [*LAYOUTS, *BROADCAST])
def test_norms_in_every_memory_order(layout: str, norm_type: float) -> None:
    for shape in [(), (1,), (17,), (5, 4), (40, 60), (0, 3)]:
        g = (LAYOUTS | BROADCAST)[layout](spread(shape, "float32"))
        close(pyopt.get_total_norm([g, g], norm_type), exact_norm([g, g], norm_type))


def test_nothing_has_the_norm_zero() -> None:
    for nothing in ([], (), {}, [np.zeros(0)], [pyopt.Parameter(np.ones(3))], [{}, []]):
        close(pyopt.get_total_norm(nothing), 0.0)
        close(pyopt.clip_grad_norm_(nothing, 1.0), 0.0)


@of_any_norm
@TYPES
def test_norms_that_are_not_finite(norm_type: float, dtype: str) -> None:
    """A NaN is a NaN, also beside inf; else inf is inf, wherever it stands."""
    for bad in BAD:
        for at in (0, 15, 1024, 2999):
            g = spread(3000, dtype)
            g[at] = bad
            close(pyopt.get_total_norm([spread(5, dtype), g], norm_type), abs(bad))
    for order in ([math.nan, math.inf], [math.inf, math.nan]):
        assert math.isnan(pyopt.get_total_norm([np.array([x], dtype) for x in order], norm_type))
        assert math.isnan(pyopt.get_total_norm([np.array(order, dtype)], norm_type))


@pytest.mark.parametrize("norm_type", [1, 2, math.inf, 3])
def test_norms_of_denormals(norm_type: float) -> None:
    g = np.full(3000, 1e-42, np.float32)
    close(pyopt.get_total_norm([g], norm_type), exact_norm([g], norm_type))


def test_norms_of_float32_do_not_overflow() -> None:
    g = np.full(3000, 3e38, np.float32)
    close(pyopt.get_total_norm([g]), exact_norm([g]))


@pytest.mark.parametrize("size", [1e200, 1e-200, 1e300, 1e-300], ids=str)
def test_norms_whose_squares_are_beyond_double(size: float) -> None:
    """The norm is a number of double, so it is that number."""
    g = size * random(3000, "float64")
    close(pyopt.get_total_norm([g, np.ones(3)]), exact_norm([g, np.ones(3)]))
    close(pyopt.get_total_norm([g]), exact_norm([g]))


@of_any_norm
@TYPES
def test_bits_on_any_number_of_threads(norm_type: float, dtype: str) -> None:
    tensors = [spread(n, dtype, n) for n in SIZES] + [
        np.asfortranarray(spread((70, 31), dtype)),
        spread(9000, dtype)[::3],
    ]
    found = set()
    with everything_shared():
        for threads in (1, 2, 3, 5):
            with pyopt.num_threads(threads):
                found.add(pyopt.get_total_norm(tensors, norm_type))
    assert len(found) == 1


def test_bits_of_views_of_one_memory() -> None:
    """The shape of dense memory, and where it lies, do not matter."""
    g = spread((30, 170), "float32")
    views = [g, g.reshape(-1), g.reshape(2, 15, 170)]
    for offset in (4, 20, 64):
        moved = np.empty(g.nbytes + 64, np.uint8)
        views.append(moved[offset : offset + g.nbytes].view(np.float32).reshape(g.shape))
        views[-1][...] = g
        assert len({pyopt.get_total_norm([v]) for v in views}) == 1


NORMS_OF_A_LEVEL = """
import numpy as np, pyopt
from test_clipping import NORMS, SIZES, spread
for dtype in ("float32", "float64"):
    tensors = [spread(n, dtype, n) for n in SIZES]
    for norm_type in NORMS:
        print(pyopt.get_total_norm(tensors, norm_type).hex())
    tensors = [t.copy() for t in tensors]
    pyopt.clip_grad_norm_(tensors, 0.1)
    print([t.tobytes().hex() for t in tensors[:-1]])
"""


def test_bits_on_every_level() -> None:
    printed = {in_process(NORMS_OF_A_LEVEL, PYOPT_ISA=level) for level in supported_levels()}
    assert len(printed) == 1


# --- what they are given ----------------------------------------------------------------------------------------------


def test_every_form_of_argument() -> None:
    """Parameters mean their gradients; arrays, nested as they may be or from a generator, are gradients."""
    grads = [spread(s, "float32", i) for i, s in enumerate([(3, 4), (), (5,)])]
    a, b, c = grads
    expected = exact_norm(grads)
    forms: dict[str, Any] = {
        "list": lambda: [a, b, c],
        "tuple": lambda: (a, b, c),
        "generator": lambda: (g for g in grads),
        "mapping": lambda: {"a": a, "head": {"b": b, "c": [c]}},
        "list of mappings": lambda: [{"a": a}, [b, {"c": c}]],
        "with None": lambda: [a, None, b, c, None],
        "Parameters": lambda: [pyopt.Parameter(np.zeros_like(g), g) for g in grads],
        "Parameters, a generator": lambda: (
            pyopt.Parameter(np.zeros_like(g), g) for g in [*grads, None] if g is not None
        ),
        "Parameters without gradient": lambda: [
            pyopt.Parameter(np.ones(3)),
            *(pyopt.Parameter(g.copy(), g) for g in grads),
        ],
    }
    for name, form in forms.items():
        before = [g.copy() for g in grads]
        close(pyopt.get_total_norm(form()), expected)
        norm = pyopt.clip_grad_norm_(form(), 0.5)
        close(norm, expected)
        for g, was in zip(grads, before, strict=True):
            assert bits(g) == bits(scaled(was, clip_factor(0.5, norm))), name
            g[...] = was
    close(pyopt.get_total_norm([a]), exact_norm([a]))
    close(pyopt.clip_grad_norm_(a, 1e9), exact_norm([a]))
    close(pyopt.clip_grad_norm_(pyopt.Parameter(np.zeros_like(c), c), 1e9), exact_norm([c]))


# --- clipping ---------------------------------------------------------------------------------------------------------


@of_any_norm
@TYPES
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1, np.float32(2.0)])
def test_clipping(max_norm: float, dtype: str, norm_type: float) -> None:
    """Each gradient, in its own array, times min(1, max_norm / (norm + 1e-6)), that as a number of its dtype."""
    params = with_gradients([(3, 4), (), (0,), (1025,), (40, 50)], dtype)
    arrays, before = [p.grad for p in params], [p.grad.copy() for p in params]
    norm = pyopt.clip_grad_norm_(params, max_norm, norm_type)
    close(norm, exact_norm(before, norm_type))
    for p, array, was in zip(params, arrays, before, strict=True):
        assert p.grad is array and not p.data.any()
        assert bits(array) == bits(scaled(was, clip_factor(float(max_norm), norm)))
    close(pyopt.get_total_norm(arrays, norm_type), float(max_norm), 1e-4)


@pytest.mark.parametrize("max_norm", [1e9, math.inf])
def test_a_norm_below_changes_no_bit(max_norm: float) -> None:
    params = with_gradients([(3, 4), (), (2000,)])
    params[0].grad[0] = -0.0
    params[2].grad[7] = 1e-42
    before = [bits(p.grad) for p in params]
    pyopt.clip_grad_norm_(params, max_norm)
    assert [bits(p.grad) for p in params] == before


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("read-only", "misaligned")])
def test_clipping_in_every_memory_order(layout: str) -> None:
    for shape in [(), (1,), (17,), (5, 4), (40, 60), (0, 3)]:
        g = LAYOUTS[layout](spread(shape, "float32"))
        around = g if g.base is None else g.base
        others = np.array(around)
        was, strides = np.array(g), g.strides
        norm = pyopt.clip_grad_norm_([g], 1e-2)
        assert g.strides == strides and bits(np.array(g)) == bits(scaled(was, clip_factor(1e-2, norm)))
        g[...] = was
        assert bits(np.array(around)) == bits(others), "memory beside the gradient has changed"


def test_clipping_of_both_dtypes_and_both_steps() -> None:
    """clip_grad_norm_ is get_total_norm and clip_grads_with_norm_; in either dtype the factor is rounded once."""
    one, other = ([spread(9, "float32"), spread((4, 4), "float64", 1)] for _ in range(2))
    norm = pyopt.clip_grad_norm_(one, 0.3)
    assert pyopt.get_total_norm(other) == norm
    assert pyopt.clip_grads_with_norm_(other, 0.3, norm) is None
    assert [bits(g) for g in one] == [bits(g) for g in other]


def test_an_array_that_two_parameters_share_is_scaled_once() -> None:
    """It counts twice in the norm, as it does in the step."""
    g = spread(5, "float32")
    was = g.copy()
    norm = pyopt.clip_grad_norm_([pyopt.Parameter(np.zeros(5, np.float32), g) for _ in range(2)], 0.1)
    close(norm, exact_norm([was, was]))
    assert bits(g) == bits(scaled(was, clip_factor(0.1, norm)))


@pytest.mark.parametrize("bad", BAD)
@TYPES
def test_clipping_what_is_not_finite(bad: float, dtype: str) -> None:
    """As torch: by inf all become zero and inf NaN, by NaN all become NaN."""
    a, b = spread(2000, dtype), spread(3, dtype)
    a[1500] = bad
    before = [a.copy(), b.copy()]
    close(pyopt.clip_grad_norm_([a, b], 1.0), abs(bad))
    for g, was in zip((a, b), before, strict=True):
        np.testing.assert_array_equal(g, scaled(was, math.nan if math.isnan(bad) else 0.0))


@pytest.mark.parametrize("bad", BAD)
def test_error_if_nonfinite(bad: float) -> None:
    """It says so before anything has changed; of finite gradients it says nothing."""
    grads = [np.ones(3), np.array([1.0, bad])]
    for action in (pyopt.get_total_norm, lambda *a, **k: pyopt.clip_grad_norm_(a[0], 1.0, **k)):
        raises_and_changes_nothing(
            lambda: action(grads, error_if_nonfinite=True),  # noqa: B023  # called at once
            lambda: [bits(g) for g in grads],
            (RuntimeError, ValueError),
            "norm.*(non-finite|not finite|nan|inf)",
        )
        close(action(grads[:1], error_if_nonfinite=True), math.sqrt(3))


@pytest.mark.parametrize("clip_value", [0.5, 1, 0.0, math.inf, np.float64(1e-3)])
@TYPES
def test_clipping_by_value(clip_value: float, dtype: str) -> None:
    params = [*with_gradients([(3, 4), (), (0,), (1025,)], dtype), pyopt.Parameter(np.ones(2, dtype))]
    params[3].grad[:4] = [math.nan, math.inf, -math.inf, 1e-42]
    arrays, before = [p.grad for p in params], [p.grad.copy() for p in params[:-1]]
    assert pyopt.clip_grad_value_(params, clip_value) is None
    limit = np.dtype(dtype).type(clip_value)
    for array, was in zip(arrays, before, strict=False):
        np.testing.assert_array_equal(array, np.clip(was, -limit, limit))
    assert [p.grad is array for p, array in zip(params, arrays, strict=True)] == [True] * 5


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("read-only", "misaligned")])
def test_clipping_by_value_in_every_memory_order(layout: str) -> None:
    g = LAYOUTS[layout](spread((5, 40), "float64"))
    was = np.array(g)
    pyopt.clip_grad_value_({"a": {"b": g}}, 0.25)
    np.testing.assert_array_equal(g, np.clip(was, -0.25, 0.25))


# --- short types ------------------------------------------------------------------------------------------------------

SHORT = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
each_short = pytest.mark.parametrize("dtype", SHORT, ids=str)


@each_short
@of_any_norm
def test_norms_of_short_gradients(dtype: Any, norm_type: float) -> None:
    """That of the same numbers in float32, in bits, in any memory order and beside other types."""
    grads = [spread((40, 60), "float32").astype(dtype), spread(1025, "float32", 1).astype(dtype)]
    tensors = [*grads, spread(7, "float64"), LAYOUTS["reversed"](grads[1])]
    wide = [g.astype(np.float32) if g.dtype == dtype else g for g in tensors]
    assert pyopt.get_total_norm(tensors, norm_type) == pyopt.get_total_norm(wide, norm_type)
    close(pyopt.get_total_norm(tensors, norm_type), exact_norm(wide, norm_type))


@each_short
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read-only"])
def test_clipping_of_short_gradients(dtype: Any, layout: str) -> None:
    """Computed in float32, rounded once; a parameter may be of another type than its gradient."""
    numbers = spread((5, 40), "float32", 3)
    for action in (
        lambda p: pyopt.clip_grad_norm_([p], 0.25),
        lambda p: pyopt.clip_grad_value_([p, p], 0.3),
    ):
        g = LAYOUTS[layout](numbers.astype(dtype))
        was = np.array(g)
        norm = action(pyopt.Parameter(np.zeros(g.shape, np.float32), g))
        wide = was.astype(np.float32)
        if norm is None:
            expected = np.clip(wide, np.float32(-0.3), np.float32(0.3))
        else:
            close(norm, exact_norm([wide]))
            expected = wide * np.float32(clip_factor(0.25, norm))
        assert bits(np.array(g)) == bits(expected.astype(dtype))
        assert bits(np.array(g)) != bits(was)


def test_short_gradients_that_overlap() -> None:
    memory = np.ones(10, np.float16)
    before = memory.copy()
    with pytest.raises(ValueError, match="gradients 0 and 1 overlap in memory"):
        pyopt.clip_grad_norm_([memory[:6], memory[5:]], 0.1)
    assert bits(memory) == bits(before)
    pyopt.clip_grad_norm_([memory[:5], memory[5:], memory[:5]], 0.1)
    assert (memory == memory[0]).all()


# --- errors -----------------------------------------------------------------------------------------------------------

NO_NUMBERS = [("x", TypeError), (None, TypeError), (math.nan, ValueError), (-1.0, ValueError), (True, TypeError)]


@pytest.mark.parametrize(("value", "error"), NO_NUMBERS, ids=str)
@pytest.mark.parametrize("name", ["max_norm", "norm_type", "clip_value"])
def test_bad_numbers(name: str, value: Any, error: Any) -> None:
    """The message names the argument, its value and what it must be."""
    g = np.array([3.0, 4.0])
    actions: dict[str, Any] = {
        "max_norm": lambda: pyopt.clip_grad_norm_([g], value),
        "norm_type": lambda: pyopt.clip_grad_norm_([g], 1.0, value),
        "clip_value": lambda: pyopt.clip_grad_value_([g], value),
    }
    text = re.escape(f"{name} == {value!r}, must be")
    raises_and_changes_nothing(actions[name], g.tolist, error, text)


def test_bad_norm_types_of_get_total_norm() -> None:
    for value, error in NO_NUMBERS:
        with pytest.raises(error, match=re.escape(f"norm_type == {value!r}, must be")):
            pyopt.get_total_norm([np.ones(3)], value)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (np.ones(3, np.int32), TypeError, "int32.*must be"),
        (np.ones(3, np.complex64), TypeError, "complex64.*must be"),
        (np.ones(3, ">f2"), TypeError, "must be float32, float64, float16 or bfloat16"),
        (np.ones(3, ">f4"), TypeError, "must be"),
        (np.ma.ones(3), TypeError, "MaskedArray.*must be"),
        (1.0, TypeError, "float.*must be"),
        ("gradient", TypeError, "str.*must be"),
        (pyopt.Parameter(np.ones(3), np.ones(3, np.int64)), TypeError, "int64.*must be"),
        (pyopt.Parameter(np.ones(3), np.ones(4)), ValueError, r"\(4,\).*must be"),
        (pyopt.Parameter(np.ones(3), [1.0, 1.0, 1.0]), TypeError, "list.*must be"),
    ],
    ids=str,
)
def test_what_is_no_gradient(bad: Any, error: Any, words: str) -> None:
    """The message says which one it is, and the good ones before it are as they were."""
    g = np.array([3.0, 4.0])
    for action in (
        pyopt.get_total_norm,
        lambda x: pyopt.clip_grad_norm_(x, 1.0),
        lambda x: pyopt.clip_grad_value_(x, 1.0),
        lambda x: pyopt.clip_grads_with_norm_(x, 1.0, 5.0),
    ):
        raises_and_changes_nothing(lambda: action([g, bad]), g.tolist, error, words)  # noqa: B023  # called at once
        with pytest.raises(error, match=r"head\.b"):
            action({"a": g, "head": {"b": bad}})


@pytest.mark.parametrize("layout", ["read-only", "broadcast number"])
def test_arrays_that_cannot_be_written(layout: str) -> None:
    """They have a norm, but cannot be clipped in place."""
    g, bad = np.array([3.0, 4.0]), (LAYOUTS | BROADCAST)[layout](np.ones(3))
    if layout != "read-only":  # NumPy makes it read-only by itself
        bad = np.lib.stride_tricks.as_strided(np.ones(1), (3,), (0,))
    close(pyopt.get_total_norm([g, bad]), math.sqrt(28))
    for action in (
        lambda x: pyopt.clip_grad_norm_(x, 1.0),
        lambda x: pyopt.clip_grad_value_(x, 1.0),
        lambda x: pyopt.clip_grads_with_norm_(x, 1.0, 5.0),
    ):
        raises_and_changes_nothing(
            lambda: action([g, bad]),  # noqa: B023  # called at once
            lambda: [g.tolist(), bad.tolist()],
            ValueError,
            "read-only|broadcast|overlap|same memory",
        )


def test_a_closed_set_of_names() -> None:
    for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"):
        assert getattr(pyopt, name).__name__ == name and "Example:" in getattr(pyopt, name).__doc__
