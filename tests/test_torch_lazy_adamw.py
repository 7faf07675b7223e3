"""LazyAdamW on tensors: the bits of the arrays, gradients of Embedding(sparse=True), checkpoints, files and errors."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest

import pyopt
from test_torch_mixed import SPARSE_WARNING, explained, single_elements
from test_torch_rows import rows_of
from torch_or_skip import both_dtypes, new, new_parameters, optim, same_bits, torch

pytestmark = pytest.mark.filterwarnings(SPARSE_WARNING)
SHAPES = [(30, 5), (30, 5), (7, 2, 3), (4,), ()]


def on_arrays(grad: Any) -> Any:
    """A gradient for the NumPy side."""
    if grad is None or not grad.is_sparse:
        return None if grad is None else grad.numpy()
    return pyopt.RowSparse(grad._indices()[0].numpy(), grad._values().numpy(), tuple(grad.shape))


class Sides:
    """A LazyAdamW of tensors and one of arrays that begin alike."""

    def __init__(self, *shapes: tuple[int, ...], dtype: Any = torch.float64, **options: Any) -> None:
        self.params = new_parameters(*shapes, dtype=dtype)
        self.arrays = [p.detach().numpy().copy() for p in self.params]
        self.tensors = optim.LazyAdamW(self.params, **options)
        self.numpy = pyopt.LazyAdamW(self.arrays, **options)

    def gradients(self, step: int) -> list[Any]:
        """Rows, coalesced or not, of tables; dense ones of what has one axis, and of the second table at times."""
        grads: list[Any] = []
        for i, p in enumerate(self.params):
            if p.ndim < 2 or (i == 1 and step % 4 == 3):
                grads.append(new(*p.shape, dtype=p.dtype, seed=100 * step + i) if step % 3 or i != 3 else None)
            else:
                grads.append(rows_of(p, 3, 100 * step + i, coalesced=step % 2 == 0))
        return grads

    def step(self, step: int, **asked: Any) -> None:
        for p, grad in zip(self.params, grads := self.gradients(step), strict=True):
            p.grad = grad
        self.tensors.step(**asked)
        self.numpy.step(grads=[on_arrays(g) for g in grads], **asked)

    def check(self, what: str = "") -> None:
        for p, array in zip(self.params, self.arrays, strict=True):
            assert p.detach().numpy().tobytes() == array.tobytes(), what
        entries = [self.tensors.state[p] for p in self.params if self.tensors.state.get(p)]
        others = [entry for entry in self.numpy.state.values() if entry]
        for entry, other in zip(entries, others, strict=True):
            assert entry.keys() == other.keys() and int(entry["step"]) == other["step"], what
            for name in ("exp_avg", "exp_avg_sq", "row_step", "history"):
                assert entry[name].numpy().tobytes() == other[name].tobytes(), (what, name)


@both_dtypes
@pytest.mark.parametrize("asked", [{}, {"max_norm": 0.5, "gradient_factor": 0.5, "nonfinite": "raise"}], ids=str)
@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "weight_decay": 0.5, "maximize": True}], ids=str)
def test_bits_of_the_arrays(options: dict[str, Any], asked: dict[str, Any], dtype: Any) -> None:
    sides = Sides(*SHAPES, dtype=dtype, **options)
    for step in range(20):
        if step == 10:
            for opt in (sides.tensors, sides.numpy):
                opt.param_groups[0]["lr"] = 0.03
        sides.step(step, **asked)
        sides.check(f"step {step}")
        assert sides.tensors.last_grad_norm == sides.numpy.last_grad_norm
    rows = torch.tensor([4, 7, 4])
    sides.tensors.catch_up(sides.params[0], rows)
    sides.numpy.catch_up(sides.arrays[0], rows.numpy())
    sides.check("some rows")
    sides.tensors.catch_up()
    sides.numpy.catch_up()
    sides.check("all rows")


def test_a_model_as_with_dense_training() -> None:
    """A table by autograd beside dense parameters, caught up before it is read: AdamW's bits on the table."""
    models, opts = [], []
    for sparse, cls in ((True, optim.LazyAdamW), (False, optim.AdamW)):
        torch.manual_seed(0)
        table = torch.nn.Embedding(30, 5, sparse=sparse)
        model = torch.nn.Sequential(table, torch.nn.Flatten(), torch.nn.Tanh(), torch.nn.Linear(15, 1)).double()
        models.append(model)
        opts.append(cls(model.parameters(), lr=0.05))
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        batch = torch.stack([torch.randperm(30, generator=generator)[:3] for _ in range(1)])  # each row once
        opts[0].catch_up(models[0][0].weight, batch)
        for model, opt in zip(models, opts, strict=True):
            (model(batch) - 1).pow(2).sum().backward()
            opt.step(zero_grad=True)
    weight = models[0][0].weight
    assert weight.grad is None and not models[0][3].bias.grad.any()
    opts[0].catch_up()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert same_bits(p, q)


@both_dtypes
def test_checkpoints(dtype: Any, tmp_path: Any) -> None:
    """By torch.save, from and to arrays, in a file of pyopt, pickled and copied: each goes on with the same bits."""
    sides = Sides(*SHAPES, dtype=dtype, lr=0.1)
    for step in range(5):
        sides.step(step)
    file = io.BytesIO()
    torch.save(sides.tensors.state_dict(), file)
    file.seek(0)
    pyopt.save(tmp_path / "tensors", sides.tensors)
    pyopt.save(tmp_path / "arrays", sides.numpy)
    params = [[torch.nn.Parameter(p.detach().clone()) for p in sides.params] for _ in range(5)]
    others = [optim.LazyAdamW(each, lr=0.3) for each in params]
    others[0].load_state_dict(torch.load(file))
    others[1].load_state_dict(optim.to_torch(sides.numpy.state_dict()))
    pyopt.load(tmp_path / "tensors", others[2])
    pyopt.load(tmp_path / "arrays", others[3])
    others[4].load_state_dict(pickle.loads(pickle.dumps(sides.tensors.state_dict())))
    others.append(copy.deepcopy(sides.tensors))
    arrays = [array.copy() for array in sides.arrays]
    other = pyopt.LazyAdamW(arrays)
    other.load_state_dict(optim.from_torch(sides.tensors.state_dict()))
    for step in range(5, 10):
        sides.step(step)
        for each in others:
            for p, grad in zip(each.param_groups[0]["params"], sides.gradients(step), strict=True):
                p.grad = grad
            each.step()
        other.step(grads=[on_arrays(g) for g in sides.gradients(step)])
    for each in (sides.tensors, sides.numpy, other, *others):
        each.catch_up()
    sides.check()
    for i, each in enumerate(others):
        for p, q in zip(sides.params, each.param_groups[0]["params"], strict=True):
            assert same_bits(p, q), i
            if each.state.get(q):
                assert [each.state[q][k].dtype for k in ("row_step", "history")] == [torch.int64, torch.float64]
    for a, b in zip(arrays, sides.arrays, strict=True):
        assert a.tobytes() == b.tobytes()


def test_bad_checkpoints() -> None:
    sides = Sides((6, 2), lr=0.1)
    sides.step(0)
    before = str(sides.tensors.state_dict())
    for name in ("row_step", "history"):
        broken = sides.tensors.state_dict()
        broken["state"][0] = {key: value for key, value in broken["state"][0].items() if key != name}
        with pytest.raises(TypeError, match=f"parameter 0: state_dict: {name!r} is a NoneType, must be a tensor"):
            sides.tensors.load_state_dict(broken)
        assert str(sides.tensors.state_dict()) == before
    good = sides.tensors.state[sides.params[0]]
    for name, bad, error, message in (
        ("row_step", torch.zeros(3, dtype=torch.int64), ValueError, "'row_step' must be an array of int64"),
        ("history", torch.zeros(1, 2, dtype=torch.float64), ValueError, "'history' must be an array of float64"),
        ("exp_avg", torch.zeros(3, 2, dtype=torch.float64), ValueError, r"'exp_avg' has shape \(3, 2\), must be"),
        ("exp_avg", None, TypeError, "'exp_avg' is a NoneType, must be a tensor"),
        ("step", torch.tensor(0.5), TypeError, "'step'"),
    ):
        kept = good[name]
        good[name] = bad
        state, table = str(sides.tensors.state_dict()), sides.params[0].detach().clone()
        sides.params[0].grad = rows_of(sides.params[0], 2, 1)
        with pytest.raises(error, match=f"parameter 0: state {message}"):
            sides.tensors.step()
        assert str(sides.tensors.state_dict()) == state and same_bits(sides.params[0].detach(), table)
        good[name] = kept
    del good["history"]
    with pytest.raises(KeyError, match="parameter 0: state has no 'history'"):
        sides.tensors.step()


def sparse(indices: Any, values: Any, shape: tuple[int, ...]) -> Any:
    return torch.sparse_coo_tensor([indices], values, shape, check_invariants=False)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "negative": (lambda p: sparse([1, -1], torch.ones(2, 3), (10, 3)), IndexError, r"indices\[1\] == -1, must be 0"),
    "beyond": (lambda p: sparse([1, 10], torch.ones(2, 3), (10, 3)), IndexError, r"indices\[1\] == 10, must be 0"),
    "elements": (single_elements, TypeError, "cannot take it: its gradient is a float32 sparse coo tensor"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_gradients(what: str) -> None:
    """Named, and nothing has changed, here or in the parameter before; also where the norm is asked for."""
    make, error, message = BAD[what]
    for steps in (0, 1):
        good, p = new_parameters((4, 2), (10, 3))
        optimizer = optim.LazyAdamW([good, p])
        for _ in range(steps):
            good.grad, p.grad = rows_of(good, 3, 0), rows_of(p, 3, 0)
            optimizer.step()
        before = str(optimizer.state_dict()), good.detach().clone(), p.detach().clone()
        for asked in ({}, {"max_norm": 1.0}):
            good.grad, p.grad = rows_of(good, 3, 0), make(p)
            with pytest.raises(error, match=f"parameter 1.*{message}"):
                optimizer.step(**asked)
            assert same_bits(good.detach(), before[1]) and same_bits(p.detach(), before[2])
            assert str(optimizer.state_dict()) == before[0]


@pytest.mark.parametrize("make", [lambda: new(10, 3).T, lambda: torch.ones(4, 2, dtype=torch.complex64)])
def test_bad_parameters(make: Any) -> None:
    p = torch.nn.Parameter(make())
    optimizer = optim.LazyAdamW([p])
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises((TypeError, ValueError), match="parameter 0"):
        optimizer.step()
    assert same_bits(p.detach(), before) and optimizer.state_dict()["state"] == {}


def test_bad_arguments() -> None:
    p = new_parameters((10, 3))[0]
    for options, error in (({"lr": -1}, ValueError), ({"betas": (0.9, 1.0)}, ValueError), ({"eps": "x"}, TypeError)):
        with pytest.raises(error, match=next(iter(options))):
            optim.LazyAdamW([p], **options)
    with pytest.raises(TypeError, match="LazyAdamW has no option 'state_dtype'"):
        optim.LazyAdamW([{"params": [p], "state_dtype": "8bit"}])
    optimizer = optim.LazyAdamW([p])
    p.grad = rows_of(p, 3, 0)
    optimizer.step()
    optimizer.catch_up(p)
    for rows, error, message in (
        ([10], IndexError, "rows has 10, must be 0 to 9"),
        (torch.tensor([-1]), IndexError, "rows has -1, must be 0 to 9"),
        (torch.tensor([0.5]), TypeError, "rows has dtype float64|float32, must be of integers"),
    ):
        with pytest.raises(error, match=message):
            optimizer.catch_up(p, rows)
    with pytest.raises(ValueError, match="param is no parameter of this optimizer"):
        optimizer.catch_up(torch.zeros(3))
    optimizer.param_groups[0]["lr"] = -1.0
    before = p.detach().clone()
    with pytest.raises(ValueError, match="lr == -1"):
        optimizer.step()
    assert same_bits(p.detach(), before)


def test_versions_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    """Autograd hears of what is written; explain says what is refused."""
    p = new_parameters((10, 3))[0]
    optimizer = optim.LazyAdamW([p])
    for step in range(2):
        p.grad = rows_of(p, 3, step)
        assert [line.split()[-1] for line in explained(optimizer, capsys)] == ["pyopt"]
        version = p._version
        optimizer.step()
        assert p._version > version
    version = p._version
    optimizer.catch_up()
    assert p._version > version
    p.grad = single_elements(p)
    assert "sparse along 2 axes" in explained(optimizer, capsys)[0]


def test_shared_memory() -> None:
    """Two parameters in one memory, or a gradient in a table: an error, and a copy."""
    memory = torch.ones(10, 3)
    params = [torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[4:])]
    optimizer = optim.LazyAdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="parameter 0 and parameter 1 share overlapping memory"):
        optimizer.step()
    assert (memory == 1).all()
    results = []
    for shared in (True, False):
        p = new_parameters((6, 4))[0]
        values = p.detach()[1:3]
        p.grad = torch.sparse_coo_tensor([[0, 1]], values if shared else values.clone(), (6, 4), check_invariants=True)
        optim.LazyAdamW([p], lr=0.5).step()
        results.append(p)
    assert same_bits(*results)


def test_who_follows_torchs_operations() -> None:
    """There are none: an error, and nothing has changed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    p = new_parameters((10, 3))[0]
    optimizer = optim.LazyAdamW([p])
    p.grad = rows_of(p, 3, 0)
    before = p.detach().clone()
    with Mode(), pytest.raises(RuntimeError, match="LazyAdamW has no step in torch's operations"):
        optimizer.step()
    assert same_bits(p.detach(), before) and optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("nonfinite", ["apply", "raise", "skip"])
def test_nan_only_where_asked(nonfinite: str) -> None:
    p = new_parameters((10, 3))[0]
    optimizer = optim.LazyAdamW([p])
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
    assert np.isfinite(p.detach().numpy()).sum() >= 29


def test_averages() -> None:
    """They go with dense gradients alone, as with arrays."""
    p = new_parameters((10, 3))[0]
    optimizer = optim.LazyAdamW([p], lr=0.1)
    ema = pyopt.averaging.EMA(optimizer, decay=0.0, every=2)
    for sparse in (True, False, False):
        p.grad = rows_of(p, 3, 0) if sparse else torch.ones_like(p)
        optimizer.step()
    before = p.detach().clone(), ema.averages[0].clone()
    p.grad = rows_of(p, 3, 0)
    with pytest.raises(ValueError, match="parameter 0: gradient is sparse, which goes with no average"):
        optimizer.step()
    assert same_bits(p.detach(), before[0]) and same_bits(ema.averages[0], before[1])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert same_bits(ema.averages[0], p.detach())


def test_schedules() -> None:
    """One changes lr, as the arrays have it."""
    sides = Sides((8, 3), lr=0.1)
    schedules = [
        torch.optim.lr_scheduler.StepLR(sides.tensors, 2, 0.5),
        pyopt.lr_scheduler.StepLR(sides.numpy, 2, 0.5),
    ]
    for step in range(6):
        sides.step(step)
        for schedule in schedules:
            schedule.step()
        sides.check()
    assert len(sides.numpy.state[sides.numpy.param_groups[0]["params"][0]]["history"]) == 3
