"""The optimizers of matrices against torch's, on arrays and on tensors, and as optimizers of torch."""

from __future__ import annotations

import copy
import inspect
import sys
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest

import pyopt
from pyopt._engine import set_parallel_cost
from torch_or_skip import both_dtypes, new, new_parameters, optim, torch

SHAPES = [(), (7,), (5, 1), (1, 9), (33, 70), (3, 5, 7), (2, 2, 4, 33)]
MATRICES = [(1, 1), (5, 1), (1, 9), (8, 8), (33, 70), (70, 33)]
ADAFACTOR = [
    {},
    {"lr": 1.0, "beta2_decay": -0.5},
    {"weight_decay": 0.1, "d": 2.0, "eps": (1e-3, 0.1)},
    {"maximize": True, "eps": (0.5, 0.0)},
]
MUON = [
    {},
    {"nesterov": False, "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.5, "lr": 0.1},
    {"ns_steps": 2, "ns_coefficients": (1.5, -0.5, 0.0), "eps": 100.0},
]
LBFGS_MAXIMIZES = "maximize" in inspect.signature(torch.optim.LBFGS).parameters  # from torch 2.14 on, as
if LBFGS_MAXIMIZES:
    MUON.append({"adjust_lr_fn": "spectral_unclamped"})
CASES = [("Adafactor", options, SHAPES) for options in ADAFACTOR] + [("Muon", options, MATRICES) for options in MUON]
cases = pytest.mark.parametrize("name, options, shapes", CASES, ids=[f"{n}-{o}" for n, o, _ in CASES])
THREE = [("Adafactor", {}), ("Muon", {}), ("MuonAdamW", {})]
three = pytest.mark.parametrize("name, options", THREE, ids=[n for n, _ in THREE])


def gradient(p: Any, step: int) -> Any:
    return new(*p.shape, dtype=p.dtype, seed=100 + step) * 10.0 ** (step % 5 - 3)


def run(optimizer: Any, params: list[Any], steps: range) -> None:
    for step in steps:
        for p in params:
            p.grad = gradient(p, step)
        optimizer.step()


def close(actual: Any, expected: Any, scale: float) -> None:
    """Within `scale` eps of the largest number that parameters have here, about 5."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=scale * eps)


@cases
@both_dtypes
def test_steps_are_torchs(name: str, options: dict[str, Any], shapes: Any, dtype: Any) -> None:
    """One to fifty steps, of Muon twenty. Adafactor differs by rounded sums and roots, Muon by its last operations."""
    ours, theirs = (new_parameters(*shapes, dtype=dtype) for _ in range(2))
    a, b = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    assert a.defaults == b.defaults
    for steps in (range(1), range(1, 10), range(10, 50 if name == "Adafactor" else 20)):
        run(a, ours, steps)
        run(b, theirs, steps)
        for p, q in zip(ours, theirs, strict=True):
            close(p, q, 10 * len(steps))
            for key, value in b.state[q].items():
                scale = torch.finfo(dtype).eps * (float(value.abs().max()) if name == "Muon" else 0)
                torch.testing.assert_close(a.state[p][key], value, rtol=50 * torch.finfo(dtype).eps, atol=scale)
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]
    for p, q in zip(ours, theirs, strict=True):
        assert [*a.state[p]] == [*b.state[q]]
        for key, value in b.state[q].items():
            assert (a.state[p][key].dtype, a.state[p][key].shape) == (value.dtype, value.shape)


@cases
@both_dtypes
def test_checkpoints_go_both_ways(name: str, options: dict[str, Any], shapes: Any, dtype: Any) -> None:
    """torch to arrays, arrays to tensors, tensors to torch: each goes on where the one before has been."""
    params = new_parameters(*shapes, dtype=dtype)
    straight = new_parameters(*shapes, dtype=dtype)
    a, b = (getattr(torch.optim, name)(ps, **options) for ps in (params, straight))
    run(b, straight, range(12))
    run(a, params, range(3))
    arrays = [p.detach().numpy() for p in params]
    on_arrays = getattr(pyopt, name)(arrays, lr=0.5)
    on_arrays.load_state_dict(optim.from_torch(a.state_dict()))
    for step in range(3, 6):
        on_arrays.step(grads=[gradient(p, step).numpy() for p in params])
    on_tensors = getattr(optim, name)(params, lr=0.5)
    on_tensors.load_state_dict(optim.to_torch(on_arrays.state_dict()))
    run(on_tensors, params, range(6, 9))
    last = getattr(torch.optim, name)(params, lr=0.5)
    last.load_state_dict(on_tensors.state_dict())
    run(last, params, range(9, 12))
    bfloat16 = 3 * 5 * 2.0**-6 * options.get("lr", 1e-3) * 15 / torch.finfo(dtype).eps  # of the steps on arrays
    for p, q in zip(params, straight, strict=True):
        close(p, q, 100 if name == "Adafactor" else bfloat16)


@pytest.mark.parametrize("options", MUON, ids=str)
def test_muon_on_arrays_is_torchs_but_for_bfloat16(options: dict[str, Any]) -> None:
    """Momentum is torch's to some eps; the direction, whose elements are at most about 1, to some eps of bfloat16."""
    for shape in MATRICES:
        (p,), array = new_parameters(shape), new(*shape, seed=0).numpy().copy()
        a, b = pyopt.Muon([array], **options), torch.optim.Muon([p], **options)
        for step in range(5):
            p.grad = gradient(p, step)
            b.step()
            a.step(grads=[p.grad.numpy()])
        matched = options.get("adjust_lr_fn") == "match_rms_adamw"
        lr = options.get("lr", 1e-3) * (0.2 * max(shape) ** 0.5 if matched else 1)
        lr *= max(1, shape[0] / shape[1]) ** 0.5
        np.testing.assert_allclose(array, p.detach().numpy(), rtol=0, atol=5 * lr * 0.05)
        (state,) = a.state.values()
        np.testing.assert_allclose(state["momentum_buffer"], b.state[p]["momentum_buffer"], rtol=1e-5, atol=1e-7)


def test_muon_in_other_types() -> None:
    """On tensors in float32 it is what it is on arrays, up to the order of sums in the products."""
    for shape in MATRICES:
        (p,), array = new_parameters(shape), new(*shape, seed=0).numpy().copy()
        a, b = pyopt.Muon([array], lr=0.1), optim.Muon([p], lr=0.1, ns_dtype="float32")
        for step in range(5):
            p.grad = gradient(p, step)
            b.step()
            a.step(grads=[p.grad.numpy()])
        np.testing.assert_allclose(array, p.detach().numpy(), rtol=0, atol=5e-4)
    assert b.state_dict()["param_groups"][0]["ns_dtype"] == "float32"
    with pytest.raises(ValueError, match="ns_dtype == 'float16'"):
        optim.Muon([p], ns_dtype="float16")


@both_dtypes
def test_muon_adamw_has_the_bits_of_both(dtype: Any) -> None:
    shapes = [(4, 5), (7,), (6, 3), (2, 3, 4)]
    ours, theirs = (new_parameters(*shapes, dtype=dtype) for _ in range(2))
    groups = [{"params": ours[:2]}, {"params": ours[2:], "use_muon": False}]
    both = optim.MuonAdamW(groups, lr=0.01, weight_decay=0.2, betas=(0.8, 0.9))
    first = optim.Muon(theirs[:1], lr=0.01, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    second = optim.AdamW(theirs[1:], lr=0.01, weight_decay=0.2, betas=(0.8, 0.9))
    run(both, ours, range(6))
    run(first, theirs[:1], range(6))
    run(second, theirs[1:], range(6))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    twin = new_parameters(*shapes, dtype=dtype)
    for p, q in zip(twin, ours, strict=True):
        p.data.copy_(q.data)
    other = optim.MuonAdamW([{"params": twin[:2]}, {"params": twin[2:]}])
    other.load_state_dict(copy.deepcopy(both.state_dict()))
    run(both, ours, range(6, 9))
    run(other, twin, range(6, 9))
    assert all(torch.equal(p, q) for p, q in zip(ours, twin, strict=True))
    with pytest.raises(ValueError, match=r"shape \(7,\), must be a matrix"):
        other.add_param_group({"params": new_parameters((7,)), "use_muon": True})
    assert len(other.param_groups) == 2


@pytest.mark.parametrize(
    "name, options",
    [
        ("Adafactor", {}),
        ("Adafactor", {"relative_step": False, "scale_parameter": False, "eps": (1e-30, 1e-3)}),
        ("Muon", {}),
        ("Muon", {"ns_dtype": "float32"}),
        ("MuonAdamW", {"lr": 0.1}),
    ],
    ids=str,
)
def test_what_numpy_cannot_look_at_takes_torchs_operations(name: str, options: dict[str, Any]) -> None:
    """bfloat16 beside float32: both move, by about as much; sparse gradients and complex parameters are refused."""
    shapes = [(6, 5), (4, 3)] if name == "Muon" else [(6, 5), (4,)]
    wide, narrow = new_parameters(*shapes), new_parameters(*shapes, dtype=torch.bfloat16)
    for p, q in zip(wide, narrow, strict=True):
        p.data.copy_(q.data)
    o = getattr(optim, name)([*wide, *narrow], **options)
    for step in range(3):
        for p, q in zip(wide, narrow, strict=True):
            q.grad = gradient(q, step)
            p.grad = q.grad.float()
        o.step()
    for p, q in zip(wide, narrow, strict=True):
        torch.testing.assert_close(q.float(), p, rtol=0.02, atol=0.05)
        assert [*o.state[p]] == [*o.state[q]]
    lines = optim.explain.__globals__["paths_of"](o)
    assert [reason is None for _, _, reason in lines] == [True, True, False, False]
    (p,) = new_parameters((3, 3))
    o = getattr(optim, name)([p], **options)
    p.grad = torch.eye(3).to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError)):
        o.step()
    assert torch.equal(p, new_parameters((3, 3))[0])


@three
def test_shared_memory_is_left_to_torch(name: str, options: dict[str, Any]) -> None:
    """A gradient within another parameter: the order of the updates matters."""
    p, q = new_parameters((4, 4), (4, 4))
    a, b = new_parameters((4, 4), (4, 4))
    ours, theirs = getattr(optim, name)([p, q], **options), getattr(optim, name)([a, b], **options)
    for _ in range(2):
        p.grad, q.grad = q.detach(), p.detach()
        assert all("shared" in reason for _, _, reason in optim.explain.__globals__["paths_of"](ours))
        ours.step()
        a.grad = b.detach().clone()
        b.grad = None
        theirs.step()
        a.grad, b.grad = None, a.detach().clone()
        theirs.step()
    torch.testing.assert_close(p, a)
    torch.testing.assert_close(q, b)


@three
def test_an_interrupted_step_changes_nothing(name: str, options: dict[str, Any], monkeypatch: Any) -> None:
    for steps in (0, 2):
        params = new_parameters((4, 5), (6, 3))
        o = getattr(optim, name)(params, **options)
        run(o, params, range(steps))
        before = copy.deepcopy([*(p.detach() for p in params), o.state_dict()["state"]])
        core, calls = o._core, []
        prepare = core.prepare.__func__

        def stop(cls: Any, *args: Any, prepare: Any = prepare, calls: Any = calls) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            prepare(cls, *args)

        for p in params:
            p.grad = gradient(p, 9)
        with monkeypatch.context() as patch:
            patch.setattr(core, "prepare", classmethod(stop))
            with pytest.raises(KeyboardInterrupt):
                o.step()
        assert len(calls) == 2
        torch.testing.assert_close([*(p.detach() for p in params), o.state_dict()["state"]], before, rtol=0, atol=0)
        o.step()
        assert not torch.equal(params[0], before[0])


@three
def test_autograd_is_told(name: str, options: dict[str, Any]) -> None:
    (p,) = new_parameters((3, 3))
    o = getattr(optim, name)([p], **options)
    run(o, [p], range(1))
    versions = [p._version, *(each._version for each in o.state[p].values())]
    run(o, [p], range(1))
    assert all(x < y for x, y in zip(versions, [p._version, *(s._version for s in o.state[p].values())], strict=True))
    loss = (p**2).sum()
    o.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@three
def test_same_bits_for_any_threads(name: str, options: dict[str, Any]) -> None:
    results = []
    set_parallel_cost(0)
    try:
        for threads in (1, 2, 3):
            params = new_parameters((300, 90))
            with pyopt.num_threads(threads):
                run(getattr(optim, name)(params, **options), params, range(4))
            results.append(params[0].detach())
    finally:
        set_parallel_cost(-1)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@three
def test_in_a_training(name: str, options: dict[str, Any]) -> None:
    """A model, a schedule, hooks, a profiler's view: nothing of torch's is lost; the loss falls."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4, bias=name != "Muon")
    o = getattr(optim, name)(model.parameters(), lr=0.05, **options)
    schedule = torch.optim.lr_scheduler.StepLR(o, 10, 0.5)
    seen = []
    o.register_step_post_hook(lambda *_: seen.append(1))
    x, y = new(64, 8), new(64, 4, seed=1)

    def closure() -> Any:
        o.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(25):
        losses.append(o.step(closure).item())
        schedule.step()
    assert losses[-1] < losses[0] and len(seen) == 25
    assert copy.deepcopy(o).state_dict()["param_groups"] == o.state_dict()["param_groups"]


# --- torch's own database of optimizers -------------------------------------------------------------------------------


def database(name: str) -> Any:
    with mock.patch.object(sys, "argv", sys.argv[:1]):  # it parses the command line
        from torch.testing._internal.common_optimizers import optim_db
    (info,) = [info for info in optim_db if info.name == name]
    return info


@pytest.mark.parametrize(
    ("name", "switch"), [("Muon", {}), ("Adafactor", {}), ("Adafactor", {"foreach": True})], ids=str
)
@both_dtypes
def test_every_configuration(name: str, switch: dict[str, bool], dtype: Any) -> None:
    """Groups with options of their own, a rate that is a tensor, late and missing gradients."""
    for config in database(name).optim_inputs_func(device="cpu"):
        made = []
        for module in (optim, torch.optim):
            shapes = [(33, 31), (4, 5), (3, 3)] if name == "Muon" else [(33, 31), (), (7,), (2, 3, 4)]
            params = new_parameters(*shapes, dtype=dtype)
            rate = torch.tensor(0.02, dtype=dtype)
            groups = [{"params": params[:2]}, {"params": params[2:], "lr": rate, "weight_decay": 0.3}]
            # With a float32 lr torch computes what multiplies a parameter in float32, whatever the parameter's dtype.
            options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in config.kwargs.items()}
            options |= switch
            made.append((getattr(module, name)(groups, **options), params))
        (a, ours), (b, theirs) = made
        assert a.state_dict() == b.state_dict() and repr(a) == repr(b)
        for step in range(8):
            for o, params in made:
                for i, p in enumerate(params):
                    p.grad = None if i == 1 and step % 3 == 0 else gradient(p, step)
                o.step()
            for p, q in zip(ours, theirs, strict=True):
                close(p, q, 40)
        assert [[*s] for s in a.state_dict()["state"].values()] == [[*s] for s in b.state_dict()["state"].values()]


# --- L-BFGS -----------------------------------------------------------------------------------------------------------


def test_lbfgs_of_tensors_is_torchs_own() -> None:
    assert optim.LBFGS is torch.optim.LBFGS


def rosenbrock(dtype: Any) -> tuple[Any, Any, Any, Any]:
    start = [-1.5, 1.0, 0.5, -0.5]
    p, q = pyopt.Parameter(np.array(start, str(dtype)[6:])), torch.nn.Parameter(torch.tensor(start, dtype=dtype))

    def ours() -> float:
        x, y = p.data[::2], p.data[1::2]
        p.grad = np.stack([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)], axis=1).reshape(-1).astype(p.dtype)
        return float(np.sum(100 * (y - x**2) ** 2 + (1 - x) ** 2))

    def theirs() -> Any:
        with torch.no_grad():
            x, y = q[::2], q[1::2]
            q.grad = torch.stack([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)], dim=1).reshape(-1)
            return torch.sum(100 * (y - x**2) ** 2 + (1 - x) ** 2)

    return p, q, ours, theirs


def regression(dtype: Any) -> tuple[Any, Any, Any, Any]:
    x, y = new(40, 5, dtype=dtype), new(40, dtype=dtype, seed=1)
    p, q = pyopt.Parameter(np.zeros(5, str(dtype)[6:])), torch.nn.Parameter(torch.zeros(5, dtype=dtype))

    def ours() -> float:
        r = x.numpy() @ p.data - y.numpy()
        p.grad = x.numpy().T @ r
        return float(0.5 * np.sum(r**2))

    def theirs() -> Any:
        with torch.no_grad():
            r = x @ q - y
            q.grad = x.T @ r
            return 0.5 * torch.sum(r**2)

    return p, q, ours, theirs


LBFGS = [
    dict(zip(("line_search_fn", "lr", "history_size", "max_eval"), values, strict=True))
    for values in product((None, "strong_wolfe"), (1, 0.1, 1e-3), (100, 2), (None, 7))
]
LBFGS += [{"tolerance_grad": 2.0}, {"tolerance_change": 0.1}]
LBFGS += [{"maximize": True, "line_search_fn": each} for each in (None, "strong_wolfe") if LBFGS_MAXIMIZES]


def negative(p: Any, closure: Any) -> Any:
    """The closure of what has a maximum where the given one's has a minimum."""

    def closure_of_negative() -> Any:
        loss = closure()
        p.grad *= -1
        return -loss

    return closure_of_negative


@pytest.mark.parametrize("options", LBFGS, ids=str)
@pytest.mark.parametrize("problem", [rosenbrock, regression])
def test_lbfgs_of_arrays_is_torchs(problem: Any, options: dict[str, Any]) -> None:
    """As many calls of the closure and the same path. The method multiplies differences: float64, and few steps."""
    p, q, ours, theirs = problem(torch.float64)
    if options.get("maximize"):
        ours, theirs = negative(p, ours), negative(q, theirs)
    options = {"max_iter": 6, **options}
    a, b = pyopt.LBFGS([p], **options), torch.optim.LBFGS([q], **options)
    for _ in range(3):
        loss, expected = a.step(ours), b.step(theirs)
        assert loss == pytest.approx(float(expected), rel=1e-6, abs=1e-12)
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-6, atol=1e-8)
        for name in ("func_evals", "n_iter"):
            assert a.state[p][name] == b.state[q][name]
    (mine,), (torchs,) = a.state_dict()["param_groups"], b.state_dict()["param_groups"]
    assert mine == torchs if LBFGS_MAXIMIZES else {"maximize": False, **torchs} == mine
    assert b.state[q].keys() - a.state[p].keys() <= {"al"}


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_in_float32(line_search: str | None) -> None:
    p, q, ours, theirs = regression(torch.float32)
    a, b = (cls([x], lr=0.5, line_search_fn=line_search) for cls, x in ((pyopt.LBFGS, p), (torch.optim.LBFGS, q)))
    for _ in range(2):
        a.step(ours)
        b.step(theirs)
    np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_an_adjustment_that_pyopt_does_not_know_is_refused() -> None:
    """A newer torch may have one; its constructor takes it then."""
    (p,) = new_parameters((4, 5))
    optimizer = optim.Muon([p])
    optimizer.param_groups[0]["adjust_lr_fn"] = "of tomorrow"
    p.grad, before = gradient(p, 0), p.detach().clone()
    with pytest.raises(ValueError, match="adjust_lr_fn == 'of tomorrow', must be None or 'original'"):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state[p]


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_checkpoints_of_lbfgs_go_both_ways(line_search: str | None) -> None:
    options = {"max_iter": 4, "line_search_fn": line_search, "lr": 0.1}
    p, q, ours, theirs = rosenbrock(torch.float64)
    b = torch.optim.LBFGS([q], **options)
    b.step(theirs)
    a = pyopt.LBFGS([p], lr=0.5)
    a.load_state_dict(optim.from_torch(b.state_dict()))
    p.data[...] = q.detach().numpy()
    a.step(ours)
    b.step(theirs)
    np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-8)
    c = torch.optim.LBFGS([q], lr=0.5)
    c.load_state_dict(optim.to_torch(a.state_dict()))
    q.data.copy_(torch.from_numpy(p.data))
    a.step(ours)
    c.step(theirs)
    np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-8)
