"""The state of pyopt.torch's optimizers: saved, copied, swapped, replaced, shared."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from torch_or_skip import (
    DTYPES,
    Twins,
    assert_same_layout,
    brief,
    each,
    new_parameters,
    optim,
    outcome,
    parameters,
    same_bits,
    small,
    torch,
)


@each
def test_swap_in_optimizer_params_and_state(name: str) -> None:
    twins = Twins(name, small, {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})})  # it needs a state
    twins.run(2)
    swapped = []
    for optimizer in twins:
        before = [p.detach().clone() for p in parameters(optimizer)]
        inserted = {str(i): torch.nn.Parameter(p.detach() + 1) for i, p in enumerate(parameters(optimizer))}
        state_dict = copy.deepcopy(optimizer.state_dict())
        state_dict["param_groups"][0]["lr"] = 0.5
        with torch.optim.swap_in_optimizer_params_and_state(optimizer, inserted, state_dict):
            for p in inserted.values():
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(parameters(optimizer), before, strict=True))
        swapped.append((list(inserted.values()), [v for s in state_dict["state"].values() for v in s.values()]))
    for actual, expected in zip(*swapped, strict=True):
        torch.testing.assert_close(actual, expected)
    twins.check()
    twins.run(2, seed=1)


def saved_and_loaded(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@brief
def test_save_and_load(name: str, options: dict[str, Any]) -> None:
    """A checkpoint read with weights_only=True goes on in the same bits; the optimizer itself can be saved, too."""
    twins = Twins(name, small, options)
    twins.run(3)
    for optimizer in twins:
        optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict(), weights_only=True))
    twins.run(2, seed=1)
    whole = saved_and_loaded(twins.ours, weights_only=False)
    assert type(whole) is type(twins.ours) and repr(whole) == repr(twins.ours)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
@brief
def test_copies(name: str, options: dict[str, Any], duplicate: Any) -> None:
    """A copy goes on in the same bits and leaves the original alone."""
    twins = Twins(name, small, options)
    twins.run(2)
    copied = duplicate(twins.ours)
    assert type(copied) is type(twins.ours) and repr(copied) == repr(twins.ours)
    before = [p.detach().clone() for p in parameters(twins.ours)]
    for p in parameters(copied):
        p.grad = torch.ones_like(p)
    copied.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters(twins.ours), before, strict=True))
    twins.step([torch.ones_like(p) for p in parameters(twins.theirs)], check=not options.get("weight_decay"))
    for p, q in zip(parameters(copied), parameters(twins.ours), strict=True):
        assert same_bits(p, q)
        for key, value in twins.ours.state[q].items():
            assert same_bits(copied.state[p][key], value)


@each
def test_replaced_buffers(name: str) -> None:
    """p.data bound to another tensor, p.set_(), gradients made anew, kept, zeroed, and resized in place."""
    twins = Twins(name, lambda: new_parameters((6, 5), (8,)), {"lr": 0.1})
    twins.run(2)
    old = [[p.data for p in parameters(o)] for o in twins]
    for optimizer in twins:
        a, b = parameters(optimizer)
        a.data = (a.detach() + 1).t().contiguous().t()
        with torch.no_grad():
            b.set_(torch.arange(8.0))
    kept = [[t.clone() for t in tensors] for tensors in old]
    twins.run(2, seed=1)
    assert torch.equal(old[0][0], kept[0][0]), "the array of before was written"
    for pair in twins.pairs():
        for p in pair:
            p.grad = torch.ones(p.shape)
    for change in (
        lambda g, shape: g.zero_(),
        lambda g, shape: g.resize_(1000).resize_(shape).fill_(2.0),
        lambda g, shape: g.set_(torch.full(shape, 3.0)),
        lambda g, shape: g.set_(torch.arange(1.0, 2001.0), 7, shape, [s * 3 for s in g.stride()]),
    ):
        for pair in twins.pairs():
            for p in pair:
                change(p.grad, p.shape)
        twins.step()


@each
def test_parameter_rebound_on_the_same_memory(name: str) -> None:
    """p.data becomes another view of the memory that it had: negated, back, transposed, another's, its own."""
    twins = Twins(name, lambda: new_parameters((6, 6), (6, 6)), {"lr": 0.1})
    changes: list[Callable[[Any, Any], Any]] = [
        lambda p, q: torch._neg_view(p.data),
        lambda p, q: torch._neg_view(p.data),
        lambda p, q: p.data.t(),
        lambda p, q: q.data,
        lambda p, q: q.data.clone(),
    ]
    for seed, change in enumerate(changes):
        twins.run(2, seed)
        for optimizer in twins:
            p, q = parameters(optimizer)
            p.data = change(p, q)
    twins.run(2, seed=9)


@each
def test_replaced_state(name: str) -> None:
    """Entries of the state bound to other tensors, other values, or dropped altogether."""
    twins = Twins(name, small, {"lr": 0.1})
    twins.run(2)
    for optimizer in twins:
        state = optimizer.state.get(parameters(optimizer)[0], {})
        for key, value in list(state.items()):
            state[key] = torch.tensor(9.0) if key == "step" else value * 2 + 1
    twins.run(2, seed=1)
    for optimizer in twins:
        optimizer.state[parameters(optimizer)[1]] = {}
        if name == "Adagrad":  # it makes its state in the constructor
            del optimizer.state[parameters(optimizer)[1]]
            optimizer.state[parameters(optimizer)[1]] = {"step": torch.tensor(0.0), "sum": torch.ones(7)}
    twins.run(2, seed=2)
    if name != "Adagrad":
        for optimizer in twins:
            optimizer.state = defaultdict(dict)
        twins.run(2, seed=3)


@pytest.mark.parametrize("stepped", [False, True], ids=["before_the_first_step", "in_mid_run"])
@brief
def test_model_to_double(name: str, options: dict[str, Any], stepped: bool) -> None:
    """The model's dtype changes behind the optimizer: torch's result, or torch's error."""
    results = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer = getattr(module, name)(model.parameters(), **options)
        if stepped:
            model(torch.ones(2, 5)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.to(torch.float64)
        model(torch.ones(2, 5, dtype=torch.float64)).pow(2).sum().backward()
        results.append((outcome(optimizer.step), [v.dtype for s in optimizer.state.values() for v in s.values()]))
        results[-1] += (list(model.parameters()),)
    assert results[0][:2] == results[1][:2]
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each
def test_default_dtype(name: str, dtype: Any) -> None:
    """The step counter has the default dtype, whatever the parameter's, and keeps it."""
    twins = Twins(name, lambda: new_parameters((3,), dtype=dtype))
    twins.run(1)
    torch.set_default_dtype(torch.float64)
    try:
        late = Twins(name, lambda: new_parameters((3,), dtype=dtype))
        late.run(2)
        twins.run(1, seed=1)
        assert_same_layout(late.ours.state_dict(), late.theirs.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    late.run(2, seed=1)


@each
def test_shared_memory(name: str) -> None:
    """share_memory() moves the parameters while the optimizer exists."""
    twins = Twins(name, small, {"lr": 0.1})
    twins.run(2)
    for pair in twins.pairs():
        for p in pair:
            p.share_memory_()
    twins.run(2, seed=1)


OLD_STEPS = {
    "float": 3.0,
    "int": 3,
    "float64": torch.tensor(3.0, dtype=torch.float64),
    "int64": torch.tensor(3),
    "one-element": torch.tensor([3.0]),
    "last that float32 counts": torch.tensor(2.0**24),
}


@pytest.mark.parametrize("step", OLD_STEPS)
@each
def test_old_checkpoints(name: str, step: str) -> None:
    """Groups without the younger keys, and step counts of every kind."""
    results = []
    for module in (optim, torch.optim):
        params = small()
        optimizer = getattr(module, name)(params, lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        state_dict = copy.deepcopy(optimizer.state_dict())
        for key in ("maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"):
            state_dict["param_groups"][0].pop(key, None)
        for state in state_dict["state"].values():
            if "step" in state:
                state["step"] = copy.deepcopy(OLD_STEPS[step])
        optimizer = getattr(module, name)(params, lr=0.1)
        optimizer.load_state_dict(state_dict)
        found = outcome(optimizer.step), outcome(optimizer.step)
        results.append((found, params, optimizer.state_dict()))
    (found, params, saved), theirs = results[0], results[1]
    assert found == theirs[0] == (None, None)
    assert_same_layout(saved, theirs[2])
    torch.testing.assert_close(params, theirs[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved["state"], theirs[2]["state"], rtol=1e-5, atol=1e-6)


@each
def test_shared_state(name: str) -> None:
    """load_state_dict without a copy shares the tensors between two optimizers, as in torch."""
    twins = Twins(name, small, {"lr": 0.1})
    twins.run(2)
    others = []
    for optimizer in twins:
        other = type(optimizer)(small(), lr=0.1)
        other.load_state_dict(optimizer.state_dict())
        for p in parameters(other):
            p.grad = torch.ones_like(p)
        other.step()
        others.append(parameters(other))
    torch.testing.assert_close(*others)
    twins.check()
    twins.run(2, seed=1)


def test_nothing_is_kept_alive() -> None:
    """No gradient after the step, no parameter and no optimizer after their last use, not even in a cycle."""
    (p,) = new_parameters((100,))
    optimizer = optim.Adam([p])
    p.grad = torch.ones(100)
    gradient, parameter, owner = weakref.ref(p.grad), weakref.ref(p), weakref.ref(optimizer)
    optimizer.step()
    p.grad = None
    assert gradient() is None
    del p, optimizer
    assert parameter() is None and owner() is None


def assert_both_stepped(name: str, edit: Callable[[Any, list[Any]], Any], steps: int) -> None:
    """Ours and torch's come to the same after a step, an edit and more steps, or fail alike."""
    results = []
    for module in (optim, torch.optim):
        params = new_parameters((4,), (3,), dtype=torch.float64)
        optimizer = getattr(module, name)(params, lr=0.1)
        for step in range(steps):
            for i, p in enumerate(params):
                p.grad = torch.arange(1.0, 1 + p.numel(), dtype=p.dtype) * (i + 1)
            found = outcome(optimizer.step)
            if step == 0:
                edit(optimizer, params)
        results.append((found[0] if found else None, params))
    (found, ours), (expected, theirs) = results
    assert found == expected
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("value", [-1.0, -2.0, -3.0, 0.5, float("nan"), float("inf"), 1e19])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad"])
def test_step_that_is_no_count(name: str, value: float) -> None:
    assert_both_stepped(name, lambda o, params: o.state[params[0]]["step"].fill_(value), 2)


@pytest.mark.parametrize("name", ["Adam", "Adagrad"])
def test_step_shared_by_parameters(name: str) -> None:
    def share(optimizer: Any, params: list[Any]) -> None:
        optimizer.state[params[0]]["step"] = optimizer.state[params[1]]["step"]

    assert_both_stepped(name, share, 5)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_state_with_its_negative_bit_set(key: str) -> None:
    def negate(optimizer: Any, params: list[Any]) -> None:
        state = optimizer.state[params[1]]
        state[key] = torch._neg_view(-state[key])

    assert_both_stepped("Adam", negate, 4)


@pytest.mark.parametrize("what", ["params", "param_groups", "group", "state"])
def test_containers_of_other_types(what: str) -> None:
    def wrap(optimizer: Any, params: list[Any]) -> None:
        if what == "params":
            optimizer.param_groups[0]["params"] = tuple(params)
        elif what == "param_groups":
            optimizer.param_groups = tuple(optimizer.param_groups)
        elif what == "group":
            optimizer.param_groups[0] = OrderedDict(optimizer.param_groups[0])
        else:
            optimizer.state[params[0]] = OrderedDict(optimizer.state[params[0]])

    assert_both_stepped("Adam", wrap, 4)


def test_state_is_no_dict() -> None:
    """Refused before anything has changed."""
    for edit in (
        lambda o, p: o.state.__setitem__(p, UserDict(o.state[p])),
        lambda o, p: setattr(o, "state", UserDict(o.state)),
    ):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = optim.Adam([p])
        optimizer.step()
        edit(optimizer, p)
        before = p.detach().clone()
        with pytest.raises(TypeError, match="UserDict, must be a dict"):
            optimizer.step()
        assert same_bits(p.detach(), before)


@each
def test_what_is_removed_is_freed(name: str) -> None:
    """A group and its parameter after the next step, the old state at once."""
    p, q = new_parameters((3,), (4,))
    optimizer = getattr(optim, name)([{"params": [p]}, {"params": [q]}], lr=0.1)
    for each_parameter in (p, q):
        each_parameter.grad = torch.ones_like(each_parameter)
    optimizer.step()
    states = [weakref.ref(v) for s in optimizer.state.values() for v in s.values() if v is not None]
    optimizer.state.clear()
    assert not any(state() is not None for state in states)
    parameter = weakref.ref(q)
    optimizer.param_groups.pop()
    optimizer.step()
    del q, each_parameter
    assert parameter() is None


def test_copy_of_the_attributes() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = optim.Adam([p])
    optimizer.step()
    copied = copy.deepcopy(dict(vars(optimizer)))
    assert len(copied["state"]) == len(pickle.loads(pickle.dumps(dict(vars(optimizer))))["state"]) == 1
