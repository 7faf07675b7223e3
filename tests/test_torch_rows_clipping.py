"""Norms and clipping of sparse gradients of rows and mixed models: the bits of the arrays; torch itself has none."""

from __future__ import annotations

import math
from typing import Any

import pytest

import pyopt
from test_torch_lazy_adamw import on_arrays
from test_torch_mixed import SPARSE_WARNING, single_elements
from test_torch_rows import rows_of
from torch_or_skip import both_dtypes, new, new_parameters, optim, same_bits, torch

pytestmark = pytest.mark.filterwarnings(SPARSE_WARNING)
SHAPES = [(50, 64), (7,), (30, 3), (3, 3000)]
NAMES = ["SGD", "Adagrad", "FTRL", "RowwiseAdagrad", "LazyAdamW"]


def model(dtype: Any = torch.float64, seed: int = 0) -> list[Any]:
    """Tables with sparse gradients, coalesced or not, and a dense parameter between them."""
    params = new_parameters(*SHAPES, (4,), dtype=dtype)
    for i, p in enumerate(params[:-1]):
        p.grad = rows_of(p, 20, seed + i, coalesced=i == 2) if p.ndim > 1 else new(*p.shape, dtype=dtype, seed=seed)
    return params


def arrays(params: list[Any]) -> list[Any]:
    return [on_arrays(p.grad.detach().clone()) for p in params if p.grad is not None]


@both_dtypes
@pytest.mark.parametrize("norm_type", [1, 2.0, math.inf, 3])
def test_bits_of_the_arrays(norm_type: float, dtype: Any) -> None:
    params = model(dtype)
    grads = arrays(params)
    expected = torch.tensor(pyopt.get_total_norm(grads, norm_type), dtype=dtype)
    assert optim.get_total_norm([p.grad for p in params[:-1]], norm_type) == expected
    assert optim.clip_grad_norm_(params, 0.5, norm_type) == expected
    pyopt.clip_grad_norm_(grads, 0.5, norm_type)
    for p, g in zip(params, grads, strict=False):
        ours, theirs = (p.grad._values(), g.values) if p.grad.is_sparse else (p.grad, g)
        assert ours.numpy().tobytes() == theirs.tobytes()


@both_dtypes
def test_clip_value(dtype: Any) -> None:
    params = model(dtype)
    grads = arrays(params)
    params[2].grad = params[2].grad.coalesce()
    kept = params[2].grad
    optim.clip_grad_value_(params, 0.25)
    pyopt.clip_grad_value_(grads, 0.25)
    for p, g in zip(params, grads, strict=False):
        assert p.grad.to_dense().numpy().tobytes() == (g.to_dense() if p.grad.is_sparse else g).tobytes()
        assert not p.grad.is_sparse or p.grad.is_coalesced()
    assert params[2].grad is kept
    p = new_parameters((4, 3))[0]
    p.grad = torch.sparse_coo_tensor([[1, 1], [2, 2]], torch.tensor([3.0, -2.5]), (4, 3))  # single elements
    optim.clip_grad_value_([p], 0.25)
    assert p.grad.to_dense()[1].tolist() == [0, 0, 0.25] and p.grad.to_dense().abs().sum() == 0.25
    p.grad = single_elements(p)
    expected = p.grad.to_dense().double().norm()
    torch.testing.assert_close(optim.clip_grad_norm_([p], 1e9).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bits_of_the_step(name: str) -> None:
    """The norm is the step's with max_norm."""
    params = model()
    optimizer = getattr(optim, name)(params, lr=0.1)
    optimizer.step(max_norm=0.5)
    assert optim.get_total_norm([p.grad for p in params[:-1]]) == optimizer.last_grad_norm


def test_in_place_changes_are_counted() -> None:
    params = model()
    before = [p.grad._version for p in params[:-1]]
    optim.clip_grad_norm_(params, 0.5)
    assert all(p.grad._version > b for p, b in zip(params, before, strict=False))


def test_shared_between_two_parameters() -> None:
    """A gradient of two parameters is multiplied once."""
    a, b = new_parameters((6, 2), (6, 2))
    a.grad = b.grad = rows_of(a, 4, 0)
    before = a.grad._values().clone()
    optim.clip_grads_with_norm_([a, b], 1.0, torch.tensor(2.0))
    torch.testing.assert_close(a.grad._values(), before * 0.5)


@pytest.mark.parametrize("index", [-1, 10, 2**40])
@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_bad_indices(clip: str, index: int) -> None:
    first, p = new_parameters((4, 2), (10, 3))
    first.grad = rows_of(first, 6, 0)
    p.grad = torch.sparse_coo_tensor([[1, index]], torch.ones(2, 3), (10, 3), check_invariants=False)
    before = first.grad._values().clone()
    with pytest.raises(IndexError, match=rf"gradient 1: indices\[1\] == {index}, must be 0 to 9"):
        getattr(optim, clip)([first, p], 0.1)
    assert same_bits(first.grad._values(), before) and (p.grad._values() == 1).all()


# --- what a step does with a mixed model ------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_grad", [True, "set_to_none"])
@pytest.mark.parametrize("spoilt", ["rows", "dense", None])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("name", NAMES)
def test_step(name: str, zero_grad: Any, spoilt: str | None, nonfinite: str) -> None:
    """Skipped or refused as a whole; cleared as a whole, but for a step that is refused."""
    params, twins = model(), model()
    optimizer, twin = (getattr(optim, name)(each, lr=0.1) for each in (params, twins))
    for each in (optimizer, twin):
        each.step()
    before = [p.detach().clone() for p in params]
    for each in (params, twins):
        for p, q in zip(each, model(seed=10), strict=True):
            p.grad = q.grad
    if spoilt is not None:
        (params[2].grad._values() if spoilt == "rows" else params[1].grad).view(-1)[3] = float("nan")
    asked = {"max_norm": 0.5, "nonfinite": nonfinite, "zero_grad": zero_grad}
    if spoilt is not None and nonfinite == "raise":
        with pytest.raises(ValueError, match=f"parameter {2 if spoilt == 'rows' else 1}: its gradient has NaN"):
            optimizer.step(**asked)
        assert all(p.grad is not None for p in params[:-1])
    else:
        optimizer.step(**asked)
        for p in params[:-1]:
            assert p.grad is None or (zero_grad is True and p.ndim == 1 and not p.grad.any())
    twin.step(max_norm=0.5)
    for p, q, b in zip(params, twins, before, strict=True):
        assert same_bits(p.detach(), q.detach() if spoilt is None else b)
    assert optimizer.skipped_steps == (spoilt is not None and nonfinite == "skip")


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler(name: str, unscale_first: bool) -> None:
    """A scaler over tables and dense parameters: unscaled in the step, skipped where a row is not finite."""
    params, twins = model(torch.float32), model(torch.float32)
    optimizer, twin = (getattr(optim, name)(each, lr=0.1) for each in (params, twins))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for step in range(4):
        for each in (params, twins):
            for p, q in zip(each, model(torch.float32, 10 * step), strict=True):
                p.grad = q.grad
        for p in params[:-1]:
            p.grad *= scaler.get_scale()
        if step == 2:
            params[0].grad._values()[3, 5] = float("inf")
        before = [p.detach().clone() for p in params]
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert all(same_bits(p.detach(), b) for p, b in zip(params, before, strict=True))
            assert scaler.get_scale() == 512
        else:
            twin.step()
    for p, q in zip(params, twins, strict=True):
        assert same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("name", NAMES)
def test_zero_grad(name: str) -> None:
    """As torch's: sparse gradients of zeros, or none."""
    params = model()
    optimizer = getattr(optim, name)(params)
    optimizer.zero_grad(set_to_none=False)
    assert optim.get_total_norm([p.grad for p in params[:-1]]) == 0
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
