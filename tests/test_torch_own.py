"""The classes of pyopt.torch that torch lacks: constructor, formula for what the kernels leave, modes, checkpoints."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import pyopt
from cases import CASES, SUMMING, Case, assert_same_bits
from torch_or_skip import assert_formula_is_the_kernels, new_parameters, optim, torch

OWN = sorted({c.optimizer for c in CASES if not hasattr(torch.optim, c.optimizer.__name__)}, key=lambda c: c.__name__)
OWN_CASES = [case for case in CASES if case.optimizer in OWN]
TAKE_ROWS = (pyopt.FTRL, pyopt.RowwiseAdagrad)  # test_torch_rows.py
each_own = pytest.mark.parametrize("core", OWN, ids=lambda core: core.__name__)


def of(core: type[pyopt.Optimizer]) -> Any:
    return getattr(optim, core.__name__)


def gradients(params: list[Any], step: int) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


@each_own
def test_constructor(core: type[pyopt.Optimizer]) -> None:
    """Arguments, defaults and checks are the NumPy side's; subclasses of torch's base, known by their names."""
    cls = of(core)
    assert issubclass(cls, torch.optim.Optimizer) and cls.__name__ == core.__name__ and cls.__doc__
    assert inspect.signature(cls) == inspect.signature(core)
    p = torch.nn.Parameter(torch.ones(2))
    assert cls([p]).defaults == core([np.ones(2)]).defaults
    for bad, error in (({"lr": -1.0}, ValueError), ({"lr": "1"}, TypeError), ({"maximise": True}, TypeError)):
        with pytest.raises(error):
            cls([p], **bad)


@pytest.mark.parametrize("case", OWN_CASES, ids=str)
def test_formula_is_the_kernels(case: Case) -> None:
    twins = (new_parameters((5, 4), (7,), (), dtype=torch.float64) for _ in range(2))
    assert_formula_is_the_kernels(*(of(case.optimizer)(params, **case.options) for params in twins), gradients)


@each_own
def test_half_precision_and_complex(core: type[pyopt.Optimizer]) -> None:
    """Half precision is computed in float32 and rounded once; complex numbers are pairs."""
    (wide,) = new_parameters((33,))
    half = torch.nn.Parameter(wide.detach().bfloat16())
    wide = torch.nn.Parameter(half.detach().float())
    pairs = torch.nn.Parameter(torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    whole = torch.nn.Parameter(torch.view_as_complex(pairs.detach().clone()))
    optimizer = of(core)([wide, half, pairs, whole], lr=0.01)
    for step in range(3):
        gradients([half, pairs], step)
        wide.grad = half.grad.float()
        whole.grad = torch.view_as_complex(pairs.grad.clone())
        optimizer.step()
        assert half.dtype == torch.bfloat16
        if step == 0:
            # With sums, the state is rounded before it moves the parameter.
            rtol = 2**-6 if core.rule.has_sums else 2**-8
            torch.testing.assert_close(half.float(), wide, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(torch.view_as_real(whole), pairs, rtol=1e-11, atol=1e-13)


@each_own
def test_a_nan_shows_by_formula(core: type[pyopt.Optimizer]) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = of(core)([p])
    for _ in range(2):  # ADOPT moves in the second step
        p.grad = torch.tensor([0.5, float("nan"), 0.5], dtype=torch.bfloat16)
        optimizer.step()
    assert p.isnan().tolist() == [False, True, False] or (core in SUMMING and p.isnan().all())


@pytest.mark.parametrize("core", [c for c in OWN if c not in TAKE_ROWS], ids=lambda core: core.__name__)
def test_sparse_gradients(core: type[pyopt.Optimizer]) -> None:
    """Refused before anything has changed, by those that take none."""
    p, q = new_parameters((3,), (3,))
    optimizer = of(core)([p, q])
    p.grad, q.grad = torch.ones(3), torch.ones(3).to_sparse()
    before = [p.detach().clone(), q.detach().clone()]
    with pytest.raises(RuntimeError, match=f"{core.__name__} does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(p, before[0]) and torch.equal(q, before[1]) and not optimizer.state.get(q)


@each_own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_checkpoints_and_copies(core: type[pyopt.Optimizer], dtype: Any) -> None:
    """Loaded, copied and pickled, each goes on with the same bits."""
    params = new_parameters((5, 4), (7,), dtype=dtype)
    optimizer = of(core)(params, lr=0.01)
    for step in range(4):
        gradients(params, step)
        optimizer.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = of(core)(others, lr=0.5)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    assert repr(pickled) == repr(copied) == repr(loaded) == repr(optimizer)
    for each in (optimizer, loaded, copied, pickled):
        ps = each.param_groups[0]["params"]
        for step in range(4, 7):
            gradients(ps, step)
            each.step()
        for p, q in zip(params, ps, strict=True):
            assert torch.equal(p, q)
            for name in core.number_states:
                assert each.state[q][name].dtype == torch.float64
                assert torch.equal(optimizer.state[p][name], each.state[q][name])


@pytest.mark.parametrize("core", [pyopt.SGDScheduleFree, pyopt.AdamWScheduleFree], ids=lambda core: core.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_modes(core: Any, dtype: Any) -> None:
    """The bits of the NumPy side in either mode; a step in evaluation mode raises."""
    tensors = new_parameters((5, 4), (7,), dtype=dtype)
    arrays = [pyopt.Parameter(t.detach().numpy().copy()) for t in tensors]
    ours, theirs = of(core)(tensors, lr=0.1), core(arrays, lr=0.1)
    for step in range(6):
        gradients(tensors, step)
        for p, t in zip(arrays, tensors, strict=True):
            p.grad = t.grad.numpy()
        for switch in ("eval", "train"):
            for optimizer in (ours, theirs):
                getattr(optimizer, switch)()
            for p, t in zip(arrays, tensors, strict=True):
                assert_same_bits(t.detach().numpy(), p.data, switch)
        ours.step()
        theirs.step()
    ours.eval()
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        ours.step()
    other = of(core)(new_parameters((5, 4), (7,), dtype=dtype))
    other.load_state_dict(ours.state_dict())
    assert other.param_groups[0]["train_mode"] is False
    with pytest.raises(TypeError, match="must be a dict"):
        ours.add_param_group([torch.ones(2)])
    ours.add_param_group({"params": new_parameters((2,), dtype=dtype)})
    assert [group["train_mode"] for group in ours.param_groups] == [False, False]
