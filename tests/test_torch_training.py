"""pyopt.torch in a training loop: autograd, hyper-parameters that change, hooks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from torch_or_skip import (
    FIVE,
    Twins,
    assert_same_layout,
    brief,
    each,
    new,
    new_parameters,
    optim,
    outcome,
    parameters,
    same_bits,
    small,
    torch,
)

from torch._subclasses.fake_tensor import FakeTensorMode  # isort: skip
from torch.fx.experimental.proxy_tensor import make_fx  # isort: skip
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook  # isort: skip


# --- autograd ---------------------------------------------------------------------------------------------------------


@brief
def test_stale_graph_raises(name: str, options: dict[str, Any]) -> None:
    results = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.ones(3))
        view = p.view(3)
        loss = (view * view).sum()
        loss.backward(retain_graph=True)
        version, grad_version = p._version, p.grad._version
        optimizer = getattr(module, name)([p], **options)
        optimizer.step()
        assert p._version > version and p.grad._version == grad_version
        results.append(outcome(loss.backward))
        without_gradient = torch.nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [without_gradient]})
        optimizer.step()
        assert without_gradient._version == 0
    mended = [(kind, re.sub(r"is at version \d+", "is at version N", text)) for kind, text in results]
    assert mended[0] == mended[1] and mended[0][0] is RuntimeError


@each
def test_step_is_not_recorded(name: str) -> None:
    """Also with gradients that have a graph of their own, as from backward(create_graph=True)."""

    def build() -> list[Any]:
        return small()

    twins = Twins(name, build)
    for _ in range(2):
        for optimizer in twins:
            optimizer.zero_grad()
            grads = torch.autograd.grad(
                sum((p**3).sum() for p in parameters(optimizer)), parameters(optimizer), create_graph=True
            )
            for p, g in zip(parameters(optimizer), grads, strict=True):
                p.grad = g
        twins.step()
    for p in parameters(twins.ours):
        assert p.is_leaf and p.requires_grad and p.grad_fn is None
        assert not any(v.requires_grad for v in twins.ours.state[p].values())


@each
def test_closure_under_no_grad(name: str) -> None:
    """The closure runs once, with gradients; the step returns what it returns."""
    losses = []
    twins = Twins(name, small)
    for optimizer in twins:
        calls = []

        def closure(optimizer: Any = optimizer, calls: Any = calls) -> Any:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum((p * p).sum() for p in parameters(optimizer))
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append([optimizer.step(closure).item(), optimizer.step(closure=closure).item()])
            assert not torch.is_grad_enabled()
        assert calls == [True, True] and optimizer.step() is None
    assert losses[0] == pytest.approx(losses[1])
    twins.steps = 3
    twins.check()


@brief
def test_inference_mode(name: str, options: dict[str, Any]) -> None:
    """Inference tensors inside the mode and outside of it, and others inside of it: torch's results and errors.

    State made inside the mode is refused by torch outside of it; ours may go on with it.
    """
    results = []
    for module in (optim, torch.optim):
        with torch.inference_mode():
            p = torch.ones(5)
            p.grad = torch.full((5,), 2.0)
            optimizer = getattr(module, name)([p], **options)
            optimizer.step()
        q = torch.nn.Parameter(torch.ones(5))
        q.grad = torch.full((5,), 2.0)
        normal = getattr(module, name)([q], **options)
        found = [outcome(optimizer.step)]
        with torch.inference_mode():
            found += [outcome(optimizer.step), outcome(normal.step)]
        found += [outcome(normal.step)]
        results.append((found, p, q, q._version > 0))
    (*ours, last), (*theirs, torchs_last) = results[0][0], results[1][0]
    assert ours == theirs and last in (None, torchs_last) and results[0][3] == results[1][3]
    torch.testing.assert_close(results[0][1], results[1][1])
    if last == torchs_last:
        torch.testing.assert_close(results[0][2], results[1][2])


# --- hyper-parameters -------------------------------------------------------------------------------------------------


@each
def test_lr_changed_in_place(name: str) -> None:
    twins = Twins(name, small, {"lr": torch.tensor(0.1)})
    twins.run(2)
    for optimizer in twins:
        optimizer.param_groups[0]["lr"].fill_(0.01)
    twins.run(2, seed=1)
    for optimizer in twins:
        optimizer.param_groups[0]["lr"] = 0.5
    twins.run(2, seed=2)
    for optimizer in twins:
        optimizer.param_groups[0]["lr"] = torch.tensor([0.25], dtype=torch.float64)
    twins.run(2, seed=3)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas_as_tensors(name: str) -> None:
    twins = Twins(name, small, {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.8), torch.tensor([0.9]))})
    twins.run(3)
    for optimizer in twins:
        optimizer.param_groups[0]["betas"][0].fill_(0.5)
    twins.run(3, seed=1)


def test_weight_decay_as_tensor() -> None:
    Twins("SGD", small, {"lr": 0.1, "weight_decay": torch.tensor(0.1)}).run(3)


@each
def test_groups_edited(name: str) -> None:
    """Hyper-parameters of a group are read at every step; groups are added; unknown keys do not matter."""
    twins = Twins(name, small, {"lr": 0.1})
    twins.run(2)
    for optimizer in twins:
        optimizer.param_groups[0].update(weight_decay=0.3, lr=0.01, note="mine")
        (p,) = new_parameters((3, 3))
        optimizer.add_param_group({"params": [p], "lr": 0.02, "maximize": True})
    twins.run(3, seed=1)
    assert_same_layout(twins.ours.state_dict(), twins.theirs.state_dict())
    for optimizer in twins:
        del optimizer.param_groups[1]["params"][0]
        optimizer.defaults["lr"] = 7.0
    twins.run(2, seed=2)


def test_fused_and_foreach_run_the_kernels() -> None:
    """The switches of torch's implementations change nothing; not even in a group, in mid-run."""
    results = []
    for switch in ({}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        optimizer = optim.Adam(small(), **switch)
        for step in range(3):
            for p in parameters(optimizer):
                p.grad = torch.full_like(p, 0.1 + step)
            optimizer.step()
        results.append(parameters(optimizer))
    for other in results[1:]:
        assert all(same_bits(p, q) for p, q in zip(other, results[0], strict=True))


# What nobody checks in a group: torch takes it as it is.
EDITS: list[dict[str, Any]] = [
    *({"lr": lr} for lr in (-0.1, 0, 1, float("nan"), float("inf"), np.float64(0.1), np.float32(0.1))),
    *({"betas": betas} for betas in ([0.8, 0.9], (0, 0), (-0.5, 0.9))),
    *({"momentum": momentum} for momentum in (0.5, -0.5, 1.5)),
    *({"weight_decay": 0.1, key: True} for key in ("differentiable", "capturable", "fused", "foreach", "maximize")),
    *({"weight_decay": decay} for decay in (-0.1, 1, torch.tensor(0.1))),
    *({"eps": eps} for eps in (0, -0.7, 0.5)),
    {"alpha": 1.5},
    {"lr_decay": -0.25},
    {"dampening": 0.5},
    {"nesterov": True},
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: "-".join(f"{k}={v}" for k, v in edit.items()).replace(" ", ""))
@each
def test_unchecked_values_in_a_group(name: str, edit: dict[str, Any]) -> None:
    results = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.linspace(0.5, 3.0, 9))
        optimizer = getattr(module, name)([p], lr=0.1)
        known = {k: v for k, v in edit.items() if k in optimizer.param_groups[0]}
        optimizer.param_groups[0].update(known)
        found = []
        for step in range(3):
            p.grad = torch.arange(1.0, 10) * (step + 1)
            found.append(outcome(optimizer.step))
        results.append((found, p.detach()))
    ours, theirs = results
    # torch's own fused and foreach kernels have other limits; a step that fails may have decayed the parameter before.
    if "fused" not in edit and "foreach" not in edit:
        assert ours[0] == theirs[0]
    if theirs[0] == [None] * 3:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (0.9, 1.1)])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas_in_a_group_that_divide_by_zero(name: str, betas: tuple[float, float]) -> None:
    """torch's constructor refuses them, and its step divides by zero, or moves nothing: here the option is named."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([p])
    optimizer.param_groups[0]["betas"] = betas
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="betas"):
        optimizer.step()
    assert p.tolist() == [1.0] * 3 and not optimizer.state[p]


@each
def test_nonfinite_gradients(name: str) -> None:
    """NaN, infinities, overflow and denormals end where torch has them end."""
    twins = Twins(name, lambda: [torch.nn.Parameter(torch.ones(40))], {"lr": 0.1})
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, 1e-38, 1e-45, 0.0, -0.0, 3e38, 1e20] * 4)
    for factor in (1, -0.5, 1):
        twins.step([values * factor], check=False)
        for (p, q), key in ((pair, key) for pair in twins.pairs() for key in twins.theirs.state[pair[1]]):
            actual, expected = twins.ours.state[p][key], twins.theirs.state[q][key]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-44, equal_nan=True)
        torch.testing.assert_close(*twins.pairs()[0], rtol=1e-5, atol=1e-6, equal_nan=True)


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_step_in_backward() -> None:
    """An optimizer per parameter, stepped by register_post_accumulate_grad_hook."""
    models = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1)).double()
        optimizers = {p: module.Adam([p], lr=0.1) for p in model.parameters()}

        def step(p: Any, optimizers: Any = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        data = new(8, 6, dtype=torch.float64)
        for _ in range(5):
            model(data).pow(2).mean().backward()
            assert all(p.grad is None for p in model.parameters())
        models.append(list(model.parameters()))
    torch.testing.assert_close(*models, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*FIVE, "Lion"])
def test_hooks_run_once(name: str) -> None:
    """torch's hooks, global and of the optimizer, in torch's order; the optimizers of torch keep theirs."""
    seen: list[Any] = []

    def note(what: str) -> Callable[..., None]:
        return lambda optimizer, args, kwargs: seen.append((what, optimizer, args, kwargs))

    optimizer = getattr(optim, name)(small())
    for p in parameters(optimizer):
        p.grad = torch.ones_like(p)
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        for _ in range(2):
            seen.clear()
            optimizer.step()
            assert [what for what, *_ in seen] == ["global pre", "pre", "post", "global post"]
            assert all(rest == [optimizer, (optimizer,), {}] for _, *rest in seen)
        if name != "Lion":
            theirs = getattr(torch.optim, name)(small())
            seen.clear()
            theirs.step()
            assert [what for what, *_ in seen] == ["global pre", "global post"]
    finally:
        for handle in handles:
            handle.remove()
    seen.clear()
    optimizer.step()
    assert seen == []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: 5}))
    assert optimizer.step() == 5
    optimizer.register_step_pre_hook(lambda o, args, kwargs: 1)
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        optimizer.step()


def test_mixed_model_runs_hooks_once() -> None:
    """Also when some of the parameters go to torch's own step."""
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = optim.SGD([p, q])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        assert optimizer.step(lambda: seen.append("closure") or 3) == 3
    finally:
        handles[0].remove()
    assert seen == ["global pre", "closure", "post"]


@pytest.mark.parametrize("name", [*FIVE, "Lion"])
def test_profiler(name: str) -> None:
    optimizer = getattr(optim, name)(small())
    for p in parameters(optimizer):
        p.grad = torch.ones_like(p)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    counts = Counter(event.name for event in profile.function_events if event.name.startswith("Optimizer."))
    assert counts == {f"Optimizer.step#{name}.step": 2, f"Optimizer.zero_grad#{name}.zero_grad": 1}


def test_state_dict_hooks() -> None:
    seen = []
    optimizer = optim.Adam(small())
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert saved["mine"] == 1 and seen == ["save", "load", "loaded"]


@each
def test_subclass(name: str) -> None:
    """A user's subclass that overrides step and calls ours; a plain function in its place, as schedulers make."""
    cls = getattr(optim, name)

    class Mine(cls):  # type: ignore[misc, valid-type]
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            return super().step(closure)

    mine, plain = Mine(small()), cls(small())
    for optimizer in (mine, plain):
        for p in parameters(optimizer):
            p.grad = torch.ones_like(p)
    wrapped = plain.step.__func__
    assert mine.step() is None and wrapped(plain) is None
    assert mine.calls == 1
    assert all(same_bits(p, q) for p, q in zip(parameters(mine), parameters(plain), strict=True))


def test_attributes_of_a_subclass() -> None:
    """Its names are its own."""

    class Own(optim.Adam):  # type: ignore[name-defined,misc]
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            for name in NAMES:
                setattr(self, name, {})

    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Own([p])
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


NAMES = ["core", "rule", "reason", "scalars", "checks", "counts_steps", "state_names", "state_streams", "check_group"]
NAMES += ["new_state", "step_by_torch", "initial_value", "table", "_table", "rows", "_rows", "kernel", "update"]


# --- who follows what torch computes ----------------------------------------------------------------------------------


def moved(module: Any) -> Any:
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.arange(1.0, 13).reshape(4, 3).t()
    return module.SGD([p], lr=0.1), p


def test_fake_tensor_mode() -> None:
    results = []
    for module in (optim, torch.optim):
        optimizer, p = moved(module)
        with FakeTensorMode(allow_non_fake_inputs=True):
            optimizer.step()
        results.append(p.detach().clone())
    assert same_bits(*results)


def test_saved_tensors_may_be_written() -> None:
    results = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = module.SGD([p], lr=0.1)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            loss = (p * p).sum()
            p.grad = torch.full((2,), 5.0)
            optimizer.step()
            p.grad = None
            loss.backward()
        results.append(p.grad)
    assert same_bits(*results) and results[0].tolist() == [2, 4]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_traced_step() -> None:
    def run(module: Any) -> Callable[[Any, Any], Any]:
        def step(value: Any, gradient: Any) -> Any:
            p = value.detach()
            p.grad = gradient * 1.0
            module.SGD([p], lr=0.1).step()
            return p + 0

        return step

    inputs = torch.ones(2), torch.full((2,), 3.0)
    for trace in (make_fx, lambda f: lambda *args: torch.jit.trace(f, args, check_trace=False)):
        ours, theirs = (trace(run(module))(torch.ones(2), torch.ones(2)) for module in (optim, torch.optim))
        outputs = [f(*(x.clone() for x in inputs)) for f in (ours, theirs)]
        assert same_bits(*outputs) and not same_bits(outputs[0], inputs[0])


# --- groups as they come ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [torch.ones(5), np.ones(5), [torch.ones(2)], (np.ones(3),), torch.empty(0), "text", {"a": 1}], ids=repr
)
def test_extra_keys_of_groups(extra: Any) -> None:
    results = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = module.Adam([{"params": [p], "extra": extra}], lr=0.1)
        for _ in range(2):
            p.grad = torch.ones(3)
            optimizer.step()
        assert optimizer.param_groups[0]["extra"] is extra
        results.append(p.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("betas", [np.array([0.5, 0.75]), torch.tensor([0.5, 0.75])], ids=["array", "tensor"])
def test_betas_in_one_array(betas: Any) -> None:
    results = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = module.Adam([p], lr=0.1)
        optimizer.param_groups[0]["betas"] = betas
        for _ in range(2):
            p.grad = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_initial_accumulator_value_is_the_constructors() -> None:
    results = []
    for module in (optim, torch.optim):
        p, q = new_parameters((3,), (3,))
        optimizer = module.Adagrad([p], lr=0.1, initial_accumulator_value=0.5)
        optimizer.add_param_group({"params": [q], "initial_accumulator_value": 5.0})
        p.grad = q.grad = torch.ones(3)
        optimizer.step()
        results.append([p.detach(), q.detach()])
    torch.testing.assert_close(*results)


def test_step_in_inference_mode_and_then_outside() -> None:
    results = []
    for module in (optim, torch.optim):
        optimizer, p = moved(module)
        with torch.inference_mode():
            optimizer.step()
        optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)
