"""Tables of bfloat16 and float16 with sparse gradients: the bits of the arrays, checkpoints and files."""

from __future__ import annotations

import io
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyopt
from test_torch_mixed import SPARSE_WARNING, explained, path_of
from test_torch_rows import NAMES, only_by_kernels, rows_of
from torch_or_skip import new, optim, same_bits, torch

pytestmark = pytest.mark.filterwarnings(SPARSE_WARNING)
SHORT = [torch.bfloat16, torch.float16]
SIX = [*NAMES, "LazyAdamW"]
short = pytest.mark.parametrize("dtype", SHORT, ids=str)
every = pytest.mark.parametrize("name", SIX)


def numbers(tensor: Any) -> Any:
    """A tensor as an array in its memory."""
    tensor = tensor.detach()
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def storage(name: str, state_dtype: str | None) -> dict[str, Any]:
    return {} if name == "LazyAdamW" or state_dtype is None else {"state_dtype": state_dtype}


class Sides:
    """An optimizer of tensors and one of arrays that begin alike: a table, and a dense parameter beside it."""

    def __init__(self, name: str, dtype: Any, **options: Any) -> None:
        self.has_bias = name != "SparseAdam"
        self.params = [torch.nn.Parameter(new(40, 33).to(dtype)), torch.nn.Parameter(new(7, seed=1).to(dtype))]
        self.params = self.params if self.has_bias else self.params[:1]
        self.arrays = [numbers(p).copy() for p in self.params]
        self.tensors = getattr(optim, name)(self.params, lr=0.1, **options)
        self.numpy = getattr(pyopt, name)(self.arrays, lr=0.1, **options)

    def step(self, step: int, params: list[Any] | None = None) -> None:
        """Of both, or of some tensors alone."""
        table, *bias = params or self.params
        table.grad = rows_of(table, 30, step, coalesced=step % 3 == 1)
        indices, values = table.grad._indices()[0].numpy(), numbers(table.grad._values())
        grads: list[Any] = [pyopt.RowSparse(indices, values, tuple(table.shape))]
        for p in bias:
            p.grad = new(7, seed=step).to(p.dtype)
            grads.append(numbers(p.grad))
        if params is None:
            self.tensors.step(max_norm=5.0, gradient_factor=0.5)
            self.numpy.step(grads=grads, max_norm=5.0, gradient_factor=0.5)

    def check(self) -> None:
        for p, array in zip(self.params, self.arrays, strict=True):
            assert numbers(p).tobytes() == array.tobytes()
        for p, other in zip(self.params, self.numpy.state.values(), strict=False):
            for key, value in other.items():
                if isinstance(value, np.ndarray):
                    assert numbers(self.tensors.state[p][key]).tobytes() == value.tobytes(), key


@pytest.mark.parametrize("state_dtype", ["float32", None])
@short
@every
def test_bits_of_the_arrays(name: str, dtype: Any, state_dtype: str | None, capsys: Any) -> None:
    sides = Sides(name, dtype, **storage(name, state_dtype))
    with only_by_kernels(sides.tensors):
        for step in range(5):
            sides.step(step)
            sides.check()
            assert sides.tensors.last_grad_norm == sides.numpy.last_grad_norm
    assert {path_of(line) for line in explained(sides.tensors, capsys)} == {"pyopt"}
    if name == "LazyAdamW":
        sides.tensors.catch_up()
        sides.numpy.catch_up()
        sides.check()
    if state_dtype == "float32":
        arrays = [x for x in sides.tensors.state[sides.params[0]].values() if hasattr(x, "dtype") and x.ndim]
        assert all(x.dtype in (torch.float32, torch.int64, torch.float64) for x in arrays)


@short
@every
def test_checkpoints(name: str, dtype: Any, tmp_path: Any) -> None:
    """By torch.save, and in a file of pyopt of either side."""
    options = storage(name, "float32")
    sides = Sides(name, dtype, **options)
    for step in range(3):
        sides.step(step)
    file = io.BytesIO()
    torch.save(sides.tensors.state_dict(), file)
    file.seek(0)
    pyopt.save(tmp_path / "tensors", sides.tensors)
    pyopt.save(tmp_path / "arrays", sides.numpy)
    params = [[torch.nn.Parameter(p.detach().clone()) for p in sides.params] for _ in range(3)]
    others = [getattr(optim, name)(each, **options) for each in params]
    others[0].load_state_dict(torch.load(file))
    pyopt.load(tmp_path / "tensors", others[1])
    pyopt.load(tmp_path / "arrays", others[2])
    arrays = [array.copy() for array in sides.arrays]
    other = getattr(pyopt, name)(arrays, **options)
    pyopt.load(tmp_path / "tensors", other)
    for step in range(3, 6):
        sides.step(step)
        for optimizer, each in zip(others, params, strict=True):
            sides.step(step, each)
            optimizer.step(max_norm=5.0, gradient_factor=0.5)
        grads = [
            pyopt.RowSparse(p.grad._indices()[0].numpy(), numbers(p.grad._values()), tuple(p.shape))
            if p.grad.is_sparse
            else numbers(p.grad)
            for p in sides.params
        ]
        other.step(grads=grads, max_norm=5.0, gradient_factor=0.5)
    sides.check()
    for each in params:
        assert all(same_bits(p.detach(), q.detach()) for p, q in zip(sides.params, each, strict=True))
    for a, b in zip(arrays, sides.arrays, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "LazyAdamW"])
def test_embedding(name: str) -> None:
    """By autograd, in bfloat16: the loss falls."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.EmbeddingBag(50, 16, mode="sum", sparse=True), torch.nn.Linear(16, 1)
    ).bfloat16()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.05)
    losses = []
    for step in range(40):
        batch = torch.randint(50, (16, 4), generator=torch.Generator().manual_seed(step % 4))
        loss = (model(batch).float() - 1).square().mean()
        loss.backward()
        optimizer.step(max_norm=1.0, zero_grad=True)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@short
def test_bad_indices_and_8_bits(dtype: Any) -> None:
    """Nothing has changed."""
    for name in SIX:
        p = torch.nn.Parameter(new(10, 3).to(dtype))
        optimizer = getattr(optim, name)([p])
        p.grad = torch.sparse_coo_tensor([[1, 10]], torch.ones(2, 3, dtype=dtype), (10, 3), check_invariants=False)
        before = p.detach().clone()
        with pytest.raises(IndexError, match=r"parameter 0: gradient: indices\[1\] == 10, must be 0 to 9"):
            optimizer.step()
        assert same_bits(p.detach(), before)
    table = torch.nn.Parameter(new(100, 64).to(dtype))
    optimizer = optim.SGD([table], lr=0.1, momentum=0.9, state_dtype="8bit")
    table.grad = rows_of(table, 5, 0)
    before = table.detach().clone()
    with pytest.raises(RuntimeError, match="parameter 0 has the option 'state_dtype', which is not for a step that is"):
        optimizer.step()
    assert same_bits(table.detach(), before)
