"""Norms and clipping of gradients on tensors: torch's to rounding, the NumPy side's in bits, else torch's own."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest

import pyopt
from test_clipping import NORMS, SIZES, spread
from torch_extras import as_array, raw
from torch_or_skip import DTYPES, both_dtypes, new, optim, outcome, torch

NAMES = ["get_total_norm", "clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_"]
RTOL = {torch.float32: 1e-4, torch.float64: 1e-12}
of_any_norm = pytest.mark.parametrize("norm_type", NORMS)


def with_gradients(*tensors: Any) -> list[Any]:
    params = [torch.nn.Parameter(torch.zeros_like(t)) for t in tensors]
    for p, t in zip(params, tensors, strict=True):
        p.grad = t.clone(memory_format=torch.preserve_format)
    return params


def spread_tensors(dtype: Any) -> list[Any]:
    return [torch.from_numpy(spread(n, str(dtype).split(".")[1], n)) for n in SIZES]


def not_empty(tensors: list[Any]) -> list[Any]:
    """torch has no maximum of an empty tensor."""
    return [t for t in tensors if t.numel()]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (optim, torch.nn.utils))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@of_any_norm
@both_dtypes
def test_norms(norm_type: float, dtype: Any) -> None:
    """A tensor without axes; torch's to the rounding of its own, and the number of the NumPy side."""
    tensors = spread_tensors(dtype)
    found = optim.get_total_norm(tensors, norm_type)
    expected = torch.nn.utils.get_total_norm(not_empty(tensors), norm_type)
    assert isinstance(found, torch.Tensor) and found.shape == ()
    rtol = RTOL[dtype] * (100 if norm_type == 0.5 and dtype == torch.float32 else 1)
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=0)
    exact = pyopt.get_total_norm([t.numpy() for t in tensors], norm_type)
    assert found.item() == pytest.approx(exact, rel=torch.finfo(found.dtype).eps)


@of_any_norm
@both_dtypes
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping(norm_type: float, dtype: Any, max_norm: float) -> None:
    """In place, to torch's rounding; the bits of the NumPy side."""
    sides = [with_gradients(*spread_tensors(dtype)) for _ in range(3)]
    before = [p.grad for p in sides[0]]
    norm = optim.clip_grad_norm_(sides[0], max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(not_empty(sides[1]), max_norm, norm_type)
    on_arrays = pyopt.clip_grad_norm_([p.grad.numpy() for p in sides[2]], max_norm, norm_type)
    assert norm.shape == () and norm.item() == pytest.approx(on_arrays, rel=torch.finfo(norm.dtype).eps)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-3 if dtype == torch.float32 else 1e-12)
    for p, g, q, r in zip(sides[0], before, *sides[1:], strict=True):
        assert p.grad is g and raw(g) == raw(r.grad)
        torch.testing.assert_close(g, q.grad, rtol=1e-3 if dtype == torch.float32 else 1e-11, atol=0)


MEMORY = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
    "channels last": lambda t: t.expand(2, 3, *t.shape).contiguous(memory_format=torch.channels_last),
    "part": lambda t: torch.nn.functional.pad(t, (1, 1, 1, 1))[1:-1, 1:-1],
}


@pytest.mark.parametrize("memory", MEMORY)
@both_dtypes
def test_clipping_in_every_memory_order(memory: str, dtype: Any) -> None:
    grads = [MEMORY[memory](new(50, 40, dtype=dtype, seed=i)) for i in range(2)]
    ours, theirs = (
        [torch.nn.Parameter(torch.zeros_like(g)) for g in grads],
        with_gradients(*(g.contiguous() for g in grads)),
    )
    for p, g in zip(ours, grads, strict=True):
        p.grad = g
    norms = optim.clip_grad_norm_(ours, 0.5), torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(*(n.double() for n in norms), rtol=RTOL[dtype], atol=0)
    for p, g, q in zip(ours, grads, theirs, strict=True):
        assert p.grad is g and g.stride() == p.grad.stride()
        torch.testing.assert_close(g, q.grad, rtol=RTOL[dtype], atol=0)


def test_forms_of_parameters() -> None:
    """A tensor, a list, a generator; parameters without gradient; none at all."""
    for form in (lambda ps: ps[0], list, tuple, iter, lambda ps: (p for p in ps)):
        a, b = ([*with_gradients(new(3, 4), new(5, seed=1)), torch.nn.Parameter(torch.ones(2))] for _ in range(2))
        norms = optim.clip_grad_norm_(form(a), 0.5), torch.nn.utils.clip_grad_norm_(form(b), 0.5)
        torch.testing.assert_close(*(n.double() for n in norms), rtol=1e-6, atol=0)
        for p, q in zip(a[:2], b[:2], strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
        assert a[2].grad is None
    for nothing in ([], [torch.nn.Parameter(torch.ones(2))]):
        assert optim.clip_grad_norm_(nothing, 1.0) == 0


@both_dtypes
def test_what_is_not_finite(dtype: Any) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        a, b = (with_gradients(new(2000, dtype=dtype), new(3, dtype=dtype, seed=1)) for _ in range(2))
        for params in (a, b):
            params[0].grad[1500] = bad
        expected = outcome(lambda: torch.nn.utils.clip_grad_norm_(b, 1.0, error_if_nonfinite=True))  # noqa: B023
        found = outcome(lambda: optim.clip_grad_norm_(a, 1.0, error_if_nonfinite=True))  # noqa: B023
        assert found[0] is expected[0] and "non-finite" in found[1]
        assert all(raw(p.grad) == raw(q.grad) for p, q in zip(a, b, strict=True)), "it raised, and changed something"
        norms = optim.clip_grad_norm_(a, 1.0), torch.nn.utils.clip_grad_norm_(b, 1.0)
        torch.testing.assert_close(*(n.double() for n in norms), equal_nan=True)
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("clip_value", [0.25, 1, 0.0])
@both_dtypes
def test_clipping_by_value(clip_value: float, dtype: Any) -> None:
    a, b = (with_gradients(new(2000, dtype=dtype), new(3, 4, dtype=dtype, seed=1)) for _ in range(2))
    for params in (a, b):
        params[0].grad[:3] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
        params[1].grad = params[1].grad.t().contiguous().t()
    optim.clip_grad_value_(iter(a), clip_value)
    torch.nn.utils.clip_grad_value_(b, clip_value)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


@both_dtypes
def test_the_two_halves(dtype: Any) -> None:
    a, b = (with_gradients(*(new(50, dtype=dtype, seed=i) for i in range(3))) for _ in range(2))
    for norm in (torch.tensor(7.0), torch.tensor(7.0, dtype=dtype), torch.tensor(0.1)):
        assert optim.clip_grads_with_norm_(a, 0.5, norm) is None
        torch.nn.utils.clip_grads_with_norm_(b, 0.5, norm)
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("what", ["bfloat16", "float16", "complex", "both dtypes", "all"])
def test_other_types_than_the_usual(what: str, foreach: Any) -> None:
    """To the precision of the shortest type, also where covered gradients stand beside it."""
    others = {
        "bfloat16": [new(67, dtype=torch.bfloat16)],
        "float16": [new(67, dtype=torch.float16)],
        "complex": [torch.complex(new(9), new(9, seed=1))],
        "both dtypes": [new(9, dtype=torch.float64)],
    }
    others["all"] = [t for ts in others.values() for t in ts]
    a, b = (with_gradients(new(30, 40), *others[what], new(5, seed=2)) for _ in range(2))
    norms = [m.clip_grad_norm_(ps, 0.5, foreach=foreach) for m, ps in ((optim, a), (torch.nn.utils, b))]
    torch.testing.assert_close(*(n.double() for n in norms), rtol=1e-2, atol=0)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_sparse_gradients() -> None:
    """They are clipped like the dense ones."""
    sparse, dense = (with_gradients(new(5))[0] for _ in range(2))
    sparse.grad, dense.grad = torch.ones(5).to_sparse(), torch.ones(5)
    assert optim.clip_grad_norm_([sparse], 1.0) == optim.clip_grad_norm_([dense], 1.0)
    assert torch.equal(sparse.grad.to_dense(), dense.grad)


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True:UserWarning")
def test_gradients_with_history() -> None:
    """As of a double backward: clipped in place, and the graph notices."""
    results = []
    for module in (optim, torch.nn.utils):
        p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        p.pow(2).sum().backward(create_graph=True)
        norm = module.clip_grad_norm_([p], 1.0)
        version = p.grad._version
        results.append((float(norm), as_array(p.grad).tolist(), version > 0))
        p.grad = None
    assert results[0][0] == pytest.approx(results[1][0]) and results[0][2] == results[1][2]
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)


def test_in_place_changes_are_counted() -> None:
    """A graph that has saved the gradient must not be used after it has changed."""
    for action in (lambda p: optim.clip_grad_norm_([p], 0.1), lambda p: optim.clip_grad_value_([p], 0.1)):
        (p,) = with_gradients(new(50))
        w = torch.ones(50, requires_grad=True)
        loss = (w * p.grad).sum()
        action(p)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_bad_arguments() -> None:
    (p,) = with_gradients(new(5))
    before = raw(p.grad)
    for value in ("x", None):
        for action in (
            lambda v: optim.clip_grad_norm_([p], v),
            lambda v: optim.clip_grad_value_([p], v),
            lambda v: optim.get_total_norm([p.grad], v),
        ):
            with pytest.raises((TypeError, ValueError)):
                action(value)
    assert raw(p.grad) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_bits_on_any_number_of_threads(dtype: Any) -> None:
    tensors = spread_tensors(dtype)
    found = set()
    for threads in (1, 2, 4):
        with pyopt.num_threads(threads):
            found.add(optim.get_total_norm(tensors).item())
    assert len(found) == 1
