"""max_row_norm on tensors: the bits of the arrays, and what torch's Embedding does to the rows that it looks up."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import pyopt
from test_torch_mixed import SPARSE_WARNING, explained, path_of, single_elements
from test_torch_rows import only_by_kernels, rows_of
from test_torch_rows_short_types import SIX, numbers
from torch_or_skip import new, new_parameters, optim, same_bits, torch

pytestmark = pytest.mark.filterwarnings(SPARSE_WARNING)
every = pytest.mark.parametrize("name", SIX)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every
def test_bits_of_the_arrays(name: str, dtype: Any, capsys: Any) -> None:
    """Of rows, and of dense gradients beside them."""
    params = [torch.nn.Parameter(new(40, 33, seed=i).to(dtype)) for i in range(2)]
    params = params[: 1 if name == "SparseAdam" else 2]
    arrays = [numbers(p).copy() for p in params]
    ours, other = (getattr(m, name)(each, lr=0.1, max_row_norm=3.0) for m, each in ((optim, params), (pyopt, arrays)))
    with only_by_kernels(ours):
        for step in range(4):
            params[0].grad = rows_of(params[0], 30, step)
            grads: list[Any] = [
                pyopt.RowSparse(
                    params[0].grad._indices()[0].numpy(), numbers(params[0].grad._values()), tuple(params[0].shape)
                )
            ]
            for p in params[1:]:
                p.grad = new(40, 33, seed=step).to(dtype)
                grads.append(numbers(p.grad))
            ours.step(max_norm=100.0)
            other.step(grads=grads, max_norm=100.0)
            for p, array in zip(params, arrays, strict=True):
                assert numbers(p).tobytes() == array.tobytes()
            touched = params[0].grad._indices()[0].unique()
            assert params[0].detach()[touched].double().norm(dim=1).max() <= 3.02
    assert {path_of(line) for line in explained(ours, capsys)} == {"pyopt"}


def test_against_embedding() -> None:
    """What F.embedding makes of rows with max_norm when it looks them up."""
    ours, theirs = (torch.nn.Parameter(3 * new(30, 8)) for _ in range(2))
    rows = torch.tensor([3, 7, 3, 29])
    optimizer = optim.SGD([ours], lr=0.1, max_row_norm=2.0)
    ours.grad = torch.sparse_coo_tensor(rows[None], torch.zeros(4, 8), (30, 8))
    optimizer.step()
    with torch.no_grad():
        torch.nn.functional.embedding(rows, theirs, max_norm=2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert same_bits(ours[0], theirs[0]) and (ours[rows] != 3 * new(30, 8)[rows]).all()


@every
def test_groups_and_checkpoints(name: str) -> None:
    """A group without it is torch's own; one with it says so in the checkpoint."""
    tables = new_parameters((20, 4), (20, 4))
    cls = getattr(optim, name)
    optimizer = cls([{"params": tables[:1], "max_row_norm": 0.5}, {"params": tables[1:]}], lr=0.1)
    assert "max_row_norm" not in optimizer.param_groups[1] and "max_row_norm" not in cls(tables).param_groups[0]
    for step in range(3):
        for p in tables:
            p.grad = rows_of(p, 60, step)
        optimizer.step()
    assert tables[0].norm(dim=1).max() <= 0.5 * (1 + 1e-6) and tables[1].norm(dim=1).max() > 1
    copies = [torch.nn.Parameter(p.detach().clone()) for p in tables]
    other = cls([{"params": copies[:1]}, {"params": copies[1:]}])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    assert other.param_groups[0]["max_row_norm"] == 0.5
    for p, q in zip(tables, copies, strict=True):
        p.grad = q.grad = rows_of(p, 10, 9)
    optimizer.step()
    other.step()
    assert all(same_bits(p, q) for p, q in zip(tables, copies, strict=True))


def test_what_torchs_step_would_leave_out() -> None:
    """An error where a parameter is left to torch, whose step has no such option; nothing has changed."""
    cases: list[tuple[Any, Any, dict[str, Any]]] = [
        (new(10, 3), lambda p: rows_of(p, 4, 0), {"momentum": 0.9}),
        (new(10, 3), single_elements, {}),
        (new(3, 10).T, torch.ones_like, {}),
        (torch.complex(new(10, 3), new(10, 3)), torch.ones_like, {}),
    ]
    for data, gradient, options in cases:
        p = torch.nn.Parameter(data)
        optimizer = optim.SGD([p], lr=0.1, max_row_norm=1.0, **options)
        p.grad = gradient(p.detach())
        before = p.detach().clone()
        with pytest.raises(
            RuntimeError, match="parameter 0 has the option 'max_row_norm', which is not for a step that"
        ):
            optimizer.step()
        assert same_bits(p.detach(), before)


def test_bad_values() -> None:
    p = new_parameters((4, 3))[0]
    for value, error in ((0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), ("1", TypeError)):
        for name in SIX:
            with pytest.raises(error, match="max_row_norm"):
                getattr(optim, name)([p], max_row_norm=value)
            with pytest.raises(error, match="max_row_norm"):
                getattr(optim, name)([{"params": [p], "max_row_norm": value}])
    for name in ("Adam", "AdamW", "Lion", "RMSprop"):
        with pytest.raises(TypeError, match=f"{name} has no option 'max_row_norm', as it takes no gradients of rows"):
            getattr(optim, name)([p], max_row_norm=1.0)


def test_flattened() -> None:
    """Parameters in one block are stepped one by one where their rows are kept to a norm."""
    params = new_parameters((6, 4), (5, 4))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optim.flatten(params)
    optimizers = [optim.SGD(each, lr=0.1, max_row_norm=1.0) for each in (params, twins)]
    for p, q in zip(params, twins, strict=True):
        p.grad.copy_(new(*p.shape))
        q.grad = new(*p.shape)
    for optimizer in optimizers:
        optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))
    assert max(p.norm(dim=1).max() for p in params) <= 1 + 1e-6
