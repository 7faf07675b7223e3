"""torch's own table of optimizer inputs: every configuration and every error input, with torch's class as the oracle.

The table ships in torch's wheel and needs the package `expecttest`.
"""

from __future__ import annotations

import copy
import inspect
import io
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

import pyopt
from torch_or_skip import (
    ELEVEN,
    MATRICES,
    Twins,
    assert_same_layout,
    new_parameters,
    optim,
    outcome,
    random_gradients,
    torch,
)

with mock.patch.object(sys, "argv", sys.argv[:1]):  # it parses the command line
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFOS = {info.name: info for info in optim_db}
OURS = [*ELEVEN, *MATRICES]  # the configurations of the latter: test_torch_matrices.py
ROWS = ["SparseAdam"]  # test_torch_rows.py
OF_TORCH = ["LBFGS"]  # handed out as they are
DTYPES = [torch.float32, torch.float64]
IDS = {torch.float32: "float32", torch.float64: "float64"}
STEPS = 8


def test_every_optimizer_of_torch_is_here() -> None:
    assert {*OURS, *ROWS, *OF_TORCH} == INFOS.keys()
    for name in OF_TORCH:
        assert getattr(optim, name) is getattr(torch.optim, name)


def switches(name: str) -> list[dict[str, bool]]:
    """The implementations of torch that a caller may ask for."""
    return [{}, {"foreach": True}, *([{"fused": True}] if "fused" in INFOS[name].supported_impls else [])]


CONFIGS = [
    pytest.param(name, config.kwargs, switch, id="-".join([name, config.desc.replace(" ", "_"), *switch]))
    for name in ELEVEN
    for config in INFOS[name].optim_inputs_func(device="cpu")
    for switch in switches(name)
]


@pytest.fixture(autouse=True)
def numbers_in_the_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch keeps NAdam's product in the default dtype, and so has 1e-8 of error in float64 without this."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    torch.set_default_dtype(params.get("dtype", torch.float32) if params.get("name") == "NAdam" else torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


def groups(dtype: Any) -> list[dict[str, Any]]:
    """Groups with overrides; 0-dim, empty and frozen parameters among them."""
    generator = torch.Generator().manual_seed(1)

    def new(*shape: int, requires_grad: bool = True) -> Any:
        return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype), requires_grad)

    return [
        {"params": [new(33, 31), new(), new(5, requires_grad=False), new(17), new(6), new(1)]},
        {"params": [new(0, 3), new(1029)], "lr": 0.03, "weight_decay": 0.2, "maximize": True},
        {"params": [new(2, 3, 4), new(3, requires_grad=False)], "lr": torch.tensor(0.02, dtype=dtype)},
    ]


def without(grads: list[Any], step: int) -> list[Any]:
    """Parameter 2 never has a gradient, 3 gets its first one late, 4 only now and then; 9 is frozen and has one."""
    absent = {2: True, 3: step < 3, 4: step % 2 == 1}
    return [None if absent.get(i) else g for i, g in enumerate(grads)]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize(("name", "options", "switch"), CONFIGS)
def test_config(name: str, options: dict[str, Any], switch: dict[str, bool], dtype: Any) -> None:
    twins = Twins(name, lambda: groups(dtype), {**options, **switch}, oracle=options)
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        twins.step(without(random_gradients(twins.theirs, generator), step))
    assert_same_layout(twins.ours.state_dict(), twins.theirs.state_dict(), but=switch)
    asked = getattr(torch.optim, name)(groups(dtype), **{**options, **switch})
    assert repr(twins.ours) == repr(asked)
    assert twins.ours.defaults == asked.defaults
    assert_same_layout(twins.ours.state_dict()["param_groups"], asked.state_dict()["param_groups"])


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("name", ELEVEN)
def test_lr_as_tensor(name: str, dtype: Any) -> None:
    for lr in (torch.tensor(0.01, dtype=dtype), torch.tensor([[0.01]], dtype=torch.float64)):
        Twins(name, lambda: groups(dtype), {"lr": lr}).run(3)
    # With a float32 lr torch computes lr / bias_correction in float32, whatever the parameter's dtype.
    twins = Twins(name, lambda: groups(torch.float64), {"lr": torch.tensor(0.01)})
    twins.step(random_gradients(twins.theirs, torch.Generator().manual_seed(3)), check=False)
    for p, q in twins.pairs():
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", OURS)
def test_new_and_eager_state(name: str) -> None:
    """The same state before any step, and a state_dict of the same bytes when saved."""
    build = (lambda: new_parameters((3, 4), (5, 2))) if name == "Muon" else (lambda: groups(torch.float32))
    twins = Twins(name, build)
    assert_same_layout(twins.ours.state_dict(), twins.theirs.state_dict())
    twins.check(0)
    files = [io.BytesIO(), io.BytesIO()]
    for optimizer, file in zip(twins, files, strict=True):
        torch.save(optimizer.state_dict(), file)
    assert files[0].getvalue() == files[1].getvalue()


@pytest.mark.parametrize("name", [*OURS, *ROWS])
def test_class(name: str) -> None:
    ours, theirs = getattr(optim, name), getattr(torch.optim, name)
    assert issubclass(ours, theirs) and ours is not theirs
    assert ours.__name__ == theirs.__name__
    scaled = {"update_clip", "cautious"}
    extra = {"Adam": scaled, "AdamW": scaled, "Adafactor": {"relative_step", "scale_parameter"}, "Muon": {"ns_dtype"}}
    own, of_torch = (
        {p.name: (p.kind, p.default) for p in inspect.signature(cls).parameters.values()} for cls in (ours, theirs)
    )
    stored = {"storage"} if getattr(pyopt, name).short_types else set()
    assert own.keys() - of_torch.keys() == extra.get(name, set()) | stored
    assert [*of_torch.items()] == [item for item in own.items() if item[0] in of_torch]


@pytest.mark.parametrize("name", ELEVEN)
def test_differentiable_goes_to_torch(name: str) -> None:
    """The gradients of a loss after a step with respect to parameter and gradient before it, in torch's bits."""
    for config in INFOS[name].optim_inputs_func(device="cpu"):
        results = []
        for module in (optim, torch.optim):
            start, g = (torch.linspace(-1, 1 + i, 6, dtype=torch.float64, requires_grad=True) for i in range(2))
            p = start.clone()
            optimizer = getattr(module, name)([p], differentiable=True, **copy.deepcopy(config.kwargs))
            p.grad = g
            optimizer.step()
            results.append((p, *torch.autograd.grad(p.pow(3).sum(), (start, g), allow_unused=True)))
        for actual, expected in zip(*results, strict=True):
            assert actual is expected is None or torch.equal(actual, expected), config.desc


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}".replace(" ", "_"))
    for name in [*OURS, *ROWS]
    for error in INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


def constructed_and_stepped(module: Any, name: str, params: Any, options: dict[str, Any], step: bool) -> Any:
    """The exception (torch's warnings are exceptions here), or None."""

    def run() -> None:
        optimizer = getattr(module, name)([torch.nn.Parameter(torch.zeros(2))] if params is None else params, **options)
        if step:
            optimizer.step()

    return outcome(run)


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_error_input(name: str, error: Any) -> None:
    given = error.optimizer_error_input
    at_step = error.error_on is OptimizerErrorEnum.STEP_ERROR
    ours, theirs = (
        constructed_and_stepped(module, name, given.params, copy.deepcopy(given.kwargs), at_step)
        for module in (optim, torch.optim)
    )
    assert theirs is not None and issubclass(theirs[0], error.error_type)
    assert ours == theirs


P = torch.nn.Parameter(torch.ones(3))
Q = torch.nn.Parameter(torch.ones(3))
# Errors of torch's that its table does not have: (params, or None for a valid one; options).
MORE_ERRORS: list[tuple[Any, dict[str, Any]]] = [
    ([], {}),
    (5, {}),
    ({"params": [P]}, {}),
    ([5], {}),
    ([P, {"params": [Q]}], {}),
    ([{"params": [P]}, Q], {}),
    ([{"lr": 0.1}], {}),
    ([{"params": {P}}], {}),
    ([P * 2], {}),
    ([("a", P), ("b", Q, 1)], {}),
    (None, {"lr": -1.0}),
    (None, {"lr": float("nan")}),
    (None, {"weight_decay": -1.0}),
    (None, {"nonsense": 1}),
    (None, {"eps": -1.0}),
    (None, {"betas": (0, 0)}),
    (None, {"betas": (0.9, 1.0)}),
    (None, {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.9))}),
    (None, {"momentum": -1.0}),
    (None, {"nesterov": True}),
    (None, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    (None, {"alpha": -1.0}),
    (None, {"lr_decay": -1.0}),
    (None, {"initial_accumulator_value": -1.0}),
    (None, {"foreach": True, "fused": True}),
    (None, {"differentiable": True, "fused": True}),
    (None, {"lr": torch.tensor(0.1), "foreach": True}),
    (None, {"lr": torch.tensor([0.1, 0.2])}),
    (None, {"decoupled_weight_decay": True}),
]


@pytest.mark.parametrize("name", [*OURS, *ROWS])
@pytest.mark.parametrize("row", MORE_ERRORS, ids=lambda row: str(row[1] or type(row[0])).replace(" ", ""))
def test_more_constructor_errors(name: str, row: Any) -> None:
    """What torch refuses or accepts, with its type of exception and its message."""
    ours, theirs = (
        constructed_and_stepped(module, name, row[0], copy.deepcopy(row[1]), False) for module in (optim, torch.optim)
    )
    assert ours == theirs


def sparse(p: Any) -> None:
    p.grad = torch.tensor([1.0, 0.0, 2.0, 0.0]).reshape(p.shape).to_sparse()


def wrong_shape(p: Any) -> None:
    p.grad = torch.ones_like(p)
    p.grad.resize_(2).fill_(1.0)


def broadcast(p: Any) -> None:
    p.grad = torch.ones_like(p)
    p.grad.resize_(1).fill_(1.0)


def wrong_dtype(p: Any) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data.double()


def expanded_parameter(p: Any) -> None:
    p.data = torch.ones(1).expand(p.shape)
    p.grad = torch.ones(p.shape)


STEP_ERRORS = [sparse, wrong_shape, broadcast, wrong_dtype, expanded_parameter]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # inside torch's step
@pytest.mark.parametrize("stepped", [False, True], ids=["first_step", "second_step"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}], ids=["plain", "decay"])
@pytest.mark.parametrize("spoil", STEP_ERRORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OURS)
def test_step_errors(name: str, spoil: Any, options: dict[str, Any], stepped: bool) -> None:
    """Odd gradients and parameters: torch's result or torch's exception; never another."""
    results = []
    options = {} if name == "Rprop" else options  # it knows no decay
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0, -4.0]).reshape((1, 4) if name == "Muon" else (4,)))
        optimizer = getattr(module, name)([p], lr=0.5, **options)
        if stepped:
            p.grad = torch.ones_like(p)
            optimizer.step()
        spoil(p)
        results.append((outcome(optimizer.step), p.detach().clone()))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_missing_state(name: str) -> None:
    """An option turned on when the state exists: torch's KeyError."""
    option = {"SGD": None, "Adagrad": None, "RMSprop": {"centered": True}}.get(name, {"amsgrad": True})
    if option is None:
        option = {"momentum": 0.9}  # SGD starts a buffer then; Adagrad has no use for it
    results = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.ones(4, 1))
        p.grad = torch.ones(4, 1)
        optimizer = getattr(module, name)([p])
        optimizer.step()
        optimizer.param_groups[0].update(option)
        results.append(outcome(optimizer.step))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_capturable_constructs(name: str) -> None:
    """On CPU torch's step refuses it; ours may refuse likewise or step as without it."""
    results = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.ones(4))
        p.grad = torch.ones(4)
        results.append(outcome(getattr(module, name)([p], capturable=True).step))
    assert results[0] in (None, results[1])
