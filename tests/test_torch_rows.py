"""Sparse gradients of rows, of Embedding(sparse=True) and EmbeddingBag, by the kernels; torch's own as the oracle."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

import pyopt
from test_torch_mixed import SPARSE_WARNING, explained, path_of, single_elements
from torch_or_skip import (
    Twins,
    assert_same_layout,
    new,
    new_parameters,
    optim,
    outcome,
    parameters,
    same_bits,
    torch,
)

pytestmark = pytest.mark.filterwarnings(SPARSE_WARNING)

OF_TORCH: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3, "initial_accumulator_value": 0.5, "maximize": True}),
    ("SparseAdam", {"lr": 0.1}),
    ("SparseAdam", {"lr": 0.1, "betas": (0.4, 0.3), "eps": 1e-3, "maximize": True}),
]
IDS = ["-".join([name, *options]) for name, options in OF_TORCH]
of_torch = pytest.mark.parametrize(("name", "options"), OF_TORCH, ids=IDS)
NAMES = ["SGD", "Adagrad", "SparseAdam", "FTRL", "RowwiseAdagrad"]


def rows_of(p: Any, n: int, seed: int, *, distinct: bool = False, coalesced: bool = False) -> Any:
    """A sparse gradient of n rows, with repetitions unless they are distinct."""
    generator = torch.Generator().manual_seed(seed)
    draw = (
        torch.randperm(len(p), generator=generator)[:n]
        if distinct
        else torch.randint(len(p), (n,), generator=generator)
    )
    values = torch.randn((len(draw), *p.shape[1:]), generator=generator, dtype=torch.float64).to(p.dtype)
    grad = torch.sparse_coo_tensor(draw[None], values, p.shape, check_invariants=True)
    return grad.coalesce() if coalesced else grad


def only_by_kernels(optimizer: Any) -> Any:
    """A block in which the fallback is an error."""
    return mock.patch.object(type(optimizer), "_step_by_torch", side_effect=AssertionError("left to torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@of_torch
def test_against_torch(name: str, options: dict[str, Any], dtype: Any) -> None:
    """Coalesced or not, with repetitions or without, tables of any width, and none of it left to torch."""
    twins = Twins(name, lambda: new_parameters((30, 17), (9, 3, 2), (50,), (5, 1100), dtype=dtype), options)
    with only_by_kernels(twins.ours):
        for step in range(6):
            distinct = step % 3 == 0
            grads = [
                rows_of(p, 12, 10 * step + i, distinct=distinct, coalesced=step % 3 == 2)
                for i, p in enumerate(parameters(twins.theirs))
            ]
            twins.step([None if step == i else g for i, g in enumerate(grads)], check=False)
            # Where values cancel, sums in another order differ by more than their own ulps.
            for p, q in twins.pairs():
                tolerance = 1e-5 if dtype is torch.float32 else 1e-13
                torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert_same_layout(twins.ours.state_dict(), twins.theirs.state_dict())
    assert repr(twins.ours) == repr(twins.theirs)


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"betas": (0.3, 0.9)}], ids=str)
def test_bits_of_torchs_sparse_adam(options: dict[str, Any]) -> None:
    """Without repetitions there is nothing to sum: the moments are torch's, the parameters within an ulp or two."""
    twins = Twins("SparseAdam", lambda: new_parameters((40, 33)), options)
    for step in range(5):
        twins.step([rows_of(p, 20, step, distinct=True) for p in parameters(twins.theirs)])
    ((p, q),) = twins.pairs()
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(twins.ours.state[p][key], twins.theirs.state[q][key], rtol=1e-6, atol=1e-9)
    assert twins.ours.state[p]["step"] == 5 and type(twins.ours.state[p]["step"]) is int


@pytest.mark.parametrize("name", NAMES)
def test_bits_of_the_arrays(name: str) -> None:
    """The same rule: tensors and arrays have the same bits."""
    tensor = new_parameters((40, 33))[0]
    array = tensor.detach().numpy().copy()
    ours, other = getattr(optim, name)([tensor]), getattr(pyopt, name)([array])
    for step in range(4):
        tensor.grad = rows_of(tensor, 30, step)
        indices, values = (x.numpy() for x in (tensor.grad._indices()[0], tensor.grad._values()))
        ours.step(max_norm=1.0, gradient_factor=0.5)
        other.step(grads=[pyopt.RowSparse(indices, values, array.shape)], max_norm=1.0, gradient_factor=0.5)
        assert ours.last_grad_norm == other.last_grad_norm
    assert tensor.detach().numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("bag", [False, True], ids=["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "FTRL", "RowwiseAdagrad"])
def test_model(name: str, bag: bool) -> None:
    """A table beside dense parameters, by autograd: as the same model with dense gradients, clipped together too."""
    models, opts = [], []
    for sparse in (True, False):
        torch.manual_seed(0)
        if bag:
            table = torch.nn.EmbeddingBag(30, 5, mode="sum", sparse=sparse)
        else:
            table = torch.nn.Sequential(
                torch.nn.Embedding(30, 5, sparse=sparse), torch.nn.Flatten(), torch.nn.Linear(15, 5)
            )
        model = torch.nn.Sequential(table, torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
        if name == "FTRL":  # its parameters begin at 0
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 if p.ndim == 1 else 0)
                    p.zero_()
        models.append(model)
        opts.append(getattr(optim, name)(model.parameters()))
    for step in range(6):
        batch = torch.randint(30, (8, 3), generator=torch.Generator().manual_seed(step))
        for model, opt in zip(models, opts, strict=True):
            opt.zero_grad()
            (model(batch) - 1).pow(2).sum().backward()
            opt.step(max_norm=0.5)
        assert opts[0].last_grad_norm == pytest.approx(opts[1].last_grad_norm, rel=1e-12)
    torch.testing.assert_close(*[list(model.parameters()) for model in models], rtol=1e-10, atol=1e-13)
    assert next(iter(models[0].parameters())).grad.is_sparse


@pytest.mark.parametrize("name", NAMES)
def test_explain_and_without_the_exchange_api(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for api in (True, False):
        p = new_parameters((10, 3))[0]
        optimizer = getattr(optim, name)([p])
        optim._tensor_views.use_exchange_api(api)
        try:
            for step in range(3):
                p.grad = rows_of(p, 7, step)
                assert [path_of(line) for line in explained(optimizer, capsys)] == ["pyopt"]
                optimizer.step()
        finally:
            optim._tensor_views.use_exchange_api(True)
        results.append(p)
    assert same_bits(*results)


@pytest.mark.parametrize("name", NAMES)
def test_zero_grad(name: str) -> None:
    p = new_parameters((10, 3))[0]
    optimizer = getattr(optim, name)([p])
    p.grad = rows_of(p, 7, 0)
    optimizer.step(zero_grad=True)
    assert p.grad is None


@pytest.mark.parametrize("nonfinite", ["apply", "raise", "skip"])
@pytest.mark.parametrize("name", NAMES)
def test_nan_only_where_asked(name: str, nonfinite: str) -> None:
    p = new_parameters((10, 3))[0]
    optimizer = getattr(optim, name)([p])
    p.grad = rows_of(p, 4, 0)
    p.grad._values()[1, 1] = float("nan")
    before = p.detach().clone()
    if nonfinite == "raise":
        with pytest.raises(ValueError, match="NaN"):
            optimizer.step(nonfinite=nonfinite)
    else:
        optimizer.step(nonfinite=nonfinite)
    assert same_bits(p.detach(), before) == (nonfinite != "apply")
    assert optimizer.skipped_steps == (nonfinite == "skip")


@pytest.mark.parametrize("index", [-1, 10, 2**40])
@pytest.mark.parametrize("name", NAMES)
def test_bad_indices(name: str, index: int) -> None:
    """torch reads and writes there where its invariants are not checked; here nothing has changed."""
    for steps in (0, 1):
        good, p = new_parameters((4, 2), (10, 3))
        optimizer = getattr(optim, name)([good, p])
        for _ in range(steps):
            good.grad, p.grad = rows_of(good, 3, 0), rows_of(p, 3, 0)
            optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        before = good.detach().clone(), p.detach().clone()
        good.grad = rows_of(good, 3, 0)
        p.grad = torch.sparse_coo_tensor([[1, index]], torch.ones(2, 3), (10, 3), check_invariants=False)
        with pytest.raises(IndexError, match=rf"parameter 1: gradient: indices\[1\] == {index}, must be 0 to 9"):
            optimizer.step()
        assert same_bits(good.detach(), before[0]) and same_bits(p.detach(), before[1])
        assert str(optimizer.state_dict()) == str(state)


def test_dense_gradients_of_sparse_adam() -> None:
    """torch's error, and nothing has changed, also where a sparse one stands before it."""
    results = []
    for module in (optim, torch.optim):
        params = new_parameters((4, 2), (3,))
        optimizer = module.SparseAdam(params)
        params[0].grad, params[1].grad = rows_of(params[0], 2, 0), torch.ones(3)
        results.append(outcome(optimizer.step))
        assert all(same_bits(p, q) for p, q in zip(params, new_parameters((4, 2), (3,)), strict=True))
    assert results[0] == results[1] and results[0][0] is RuntimeError


LEFT: dict[str, tuple[str, dict[str, Any], Any]] = {
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}, rows_of),
    "elements": ("SGD", {"lr": 0.1}, lambda p, n, seed: single_elements(p)),
    "elements, Adagrad": ("Adagrad", {"lr": 0.1}, lambda p, n, seed: single_elements(p)),
    "elements, SparseAdam": ("SparseAdam", {"lr": 0.1}, lambda p, n, seed: single_elements(p)),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_to_torch(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In torch's bits."""
    name, options, gradient = LEFT[what]
    twins = Twins(name, lambda: new_parameters((10, 3)), options)
    for step in range(3):
        for (p,) in zip(*[twins.pairs()], strict=True):
            grad = gradient(p[0], 5, step)
            p[0].grad = p[1].grad = grad
        assert [path_of(line) for line in explained(twins.ours, capsys)] == ["torch"]
        twins.ours.step()
        twins.theirs.step()
    for p, q in twins.pairs():
        assert same_bits(p, q)
        assert list(twins.ours.state[p]) == list(twins.theirs.state[q])


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_weight_decay_is_torchs_error(name: str) -> None:
    results = []
    for module in (optim, torch.optim):
        p = new_parameters((10, 3))[0]
        p.grad = rows_of(p, 4, 0)
        results.append(outcome(getattr(module, name)([p], weight_decay=0.1).step))
        assert same_bits(p, new_parameters((10, 3))[0])
    assert results[0] == results[1] and results[0][0] is RuntimeError


def test_other_memory_orders_and_types(capsys: pytest.CaptureFixture[str]) -> None:
    """A table whose rows do not lie one behind the other, and one of complex numbers, take torch's step."""
    for make in (lambda: new(3, 10).T, lambda: torch.complex(new(10, 3), new(10, 3, seed=1))):
        twins = Twins("SGD", lambda make=make: [torch.nn.Parameter(make())], {"lr": 0.1})
        for step in range(2):
            for pair in twins.pairs():
                pair[0].grad = pair[1].grad = rows_of(pair[1], 4, step)
            assert [path_of(line) for line in explained(twins.ours, capsys)] == ["torch"]
            twins.ours.step()
            twins.theirs.step()
        ((p, q),) = twins.pairs()
        assert same_bits(p, q)


def test_changing_kinds() -> None:
    """Dense, sparse, dense: each step by its own gradient."""
    twins = Twins("Adagrad", lambda: new_parameters((10, 3)), {"lr": 0.1})
    for step in range(6):
        (q,) = parameters(twins.theirs)
        twins.step([rows_of(q, 4, step) if step % 3 == 1 else new(10, 3, seed=step)])


def test_averages() -> None:
    """An average moves as a whole, by torch's step of the table."""
    p = new_parameters((10, 3))[0]
    optimizer = optim.SGD([p], lr=0.5)
    ema = pyopt.averaging.EMA(optimizer, decay=0.5)
    expected = None
    for step in range(3):
        p.grad = rows_of(p, 4, step)
        optimizer.step()
        now = p.detach().clone()
        expected = now if expected is None else expected + 0.5 * (now - expected)
    torch.testing.assert_close(ema.averages[0], expected)


def test_averages_behind_a_step_that_is_followed() -> None:
    """Where torch's own step is made, an average moves behind it, not before."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    p = new_parameters((10, 3))[0]
    optimizer = optim.SGD([p], lr=0.5)
    ema = pyopt.averaging.EMA(optimizer, decay=0.0)
    for step in range(2):
        p.grad = rows_of(p, 4, step)
        with Mode():
            optimizer.step()
        assert same_bits(ema.averages[0], p.detach())


def test_values_that_lie_in_the_table() -> None:
    p, q = new_parameters((6, 4))[0], new_parameters((6, 4))[0]
    p.grad = torch.sparse_coo_tensor([[0, 1]], p.detach()[1:3], (6, 4), check_invariants=True)
    q.grad = torch.sparse_coo_tensor([[0, 1]], q.detach()[1:3].clone(), (6, 4), check_invariants=True)
    optim.SGD([p], lr=0.5).step()
    torch.optim.SGD([q], lr=0.5).step()
    torch.testing.assert_close(p, q)


@of_torch
def test_checkpoints(name: str, options: dict[str, Any]) -> None:
    """Of torch's class and back, in memory and in a file of the same keys."""
    twins = Twins(name, lambda: new_parameters((20, 3)), options)
    for step in range(3):
        twins.step([rows_of(p, 9, step, distinct=True) for p in parameters(twins.theirs)])
    swapped = Twins(name, lambda: [torch.nn.Parameter(p.detach().clone()) for p, _ in twins.pairs()], options)
    swapped.ours.load_state_dict(copy.deepcopy(twins.theirs.state_dict()))
    swapped.theirs.load_state_dict(copy.deepcopy(twins.ours.state_dict()))
    for step in range(3, 6):
        grads = [rows_of(p, 9, step, distinct=True) for p in parameters(twins.theirs)]
        twins.step(grads, check=False)
        swapped.step(grads, check=False)
    for (p, q), (r, s) in zip(twins.pairs(), swapped.pairs(), strict=True):
        for other in (q, r, s):
            torch.testing.assert_close(other, p, rtol=1e-5, atol=1e-6)
    files = [io.BytesIO(), io.BytesIO()]
    for optimizer, file in zip(twins, files, strict=True):
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
    assert_same_layout(*[torch.load(file) for file in files])


def test_checkpoints_between_tensors_and_arrays() -> None:
    p = new_parameters((20, 3))[0]
    ours = optim.SparseAdam([p])
    for step in range(3):
        p.grad = rows_of(p, 9, step)
        ours.step()
    array = p.detach().numpy().copy()
    other = pyopt.SparseAdam([array])
    other.load_state_dict(optim.from_torch(ours.state_dict()))
    again = torch.nn.Parameter(p.detach().clone())
    third = optim.SparseAdam([again])
    third.load_state_dict(optim.to_torch(other.state_dict()))
    p.grad = again.grad = rows_of(p, 9, 9)
    indices, values = (x.numpy() for x in (p.grad._indices()[0], p.grad._values()))
    ours.step()
    third.step()
    other.step(grads=[pyopt.RowSparse(indices, values, array.shape)])
    assert p.detach().numpy().tobytes() == array.tobytes() == again.detach().numpy().tobytes()


def test_odd_step_counts() -> None:
    """What is no count goes to torch, which takes it as it is; a huge one is no step."""
    for count in (3, 3.0):
        twins = Twins("SparseAdam", lambda: new_parameters((10, 3)))
        for pair in twins.pairs():
            for optimizer, p in zip(twins, pair, strict=True):
                p.grad = rows_of(p, 4, 0, distinct=True)
                optimizer.step()
                optimizer.state[p]["step"] = count
                optimizer.step()
        ((p, q),) = twins.pairs()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert twins.ours.state[p]["step"] == twins.theirs.state[q]["step"] == 4
        assert type(twins.ours.state[p]["step"]) is type(twins.theirs.state[q]["step"])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = pyopt.get_num_threads()
    yield
    pyopt.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_bits(name: str) -> None:
    results = []
    for threads in (1, 3):
        pyopt.set_num_threads(threads)
        p = torch.nn.Parameter(new(3000, 40))
        optimizer = getattr(optim, name)([p])
        for step in range(3):
            p.grad = rows_of(p, 4000, step)
            optimizer.step()
        results.append(p.detach().numpy().tobytes())
    assert results[0] == results[1]


def test_closures_and_groups() -> None:
    """Groups with options of their own, by a closure, as torch."""
    twins = Twins(
        "SparseAdam", lambda: [{"params": new_parameters((10, 3))}, {"params": new_parameters((5, 2)), "lr": 0.1}]
    )
    for step in range(3):
        results = []
        for optimizer in twins:

            def closure(optimizer: Any = optimizer, step: int = step) -> float:
                for p in parameters(optimizer):
                    p.grad = rows_of(p, 4, step, distinct=True)
                return 0.5

            results.append(optimizer.step(closure))
        assert results == [0.5, 0.5]
    for p, q in twins.pairs():
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_bias_of_no_axis() -> None:
    """A table of one axis: rows of one element."""
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.sparse_coo_tensor([[1, 1, 3]], torch.tensor([1.0, 2.0, 4.0]), (4,), check_invariants=True)
    optim.SGD([p], lr=1.0).step()
    assert p.tolist() == [0, -3, 0, -4]
    assert np.isfinite(p.detach().numpy()).all()


def test_a_file_keeps_the_count_of_sparse_adam_an_int(tmp_path: Any) -> None:
    """torch's step computes with it: a float32 tensor in its place would cost its precision."""
    p = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    optimizer = optim.SparseAdam([p])
    p.grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0, 3.0]], (4, 3), dtype=torch.float64)
    optimizer.step()
    pyopt.save(tmp_path / "run", optimizer)
    pyopt.load(tmp_path / "run", optimizer)
    assert type(optimizer.state[p]["step"]) is int and optimizer.state[p]["step"] == 1
