"""Inputs of pyopt.torch that people met, or that a fuzz found, by kind, with the right value."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
import time
import weakref
from collections import UserDict, defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

import pyopt
from apart import apart
from torch_or_skip import (
    BRIEF,
    BRIEF_IDS,
    FIVE,
    ULPS,
    assert_same_layout,
    both_dtypes,
    brief,
    each,
    in_ulps,
    new,
    new_parameters,
    optim,
    outcome,
    parameters,
    same_bits,
    small,
    torch,
)

from torch.autograd import forward_ad as fwAD  # isort: skip
from torch.multiprocessing.reductions import StorageWeakRef  # isort: skip

ALL = [*BRIEF, ("Lion", {"lr": 0.01}), ("Lion", {"lr": 0.01, "weight_decay": 0.1})]
ALL_IDS = [*BRIEF_IDS, "Lion", "Lion-decay"]
every = pytest.mark.parametrize(("name", "options"), ALL, ids=ALL_IDS)
WITH_STATE = [(name, options) for name, options in ALL if name != "SGD" or "momentum" in options]
with_state = pytest.mark.parametrize(
    ("name", "options"), WITH_STATE, ids=["-".join([name, *options]) for name, options in WITH_STATE]
)
ADAM = sys.modules["torch.optim.adam"]  # torch.optim hides its modules
FUSED = ["SGD", "Adam", "AdamW", "Adagrad"]  # torch has a fused step of these
SPARSE_WARNING = "ignore:Sparse invariant checks are implicitly disabled:UserWarning"


def build(name: str, params: Any, **options: Any) -> Any:
    return getattr(optim, name)(params, **options)


def snapshot(optimizer: Any) -> list[Any]:
    """Copies of all parameters and of all state, in order."""
    result: list[Any] = []
    for i, p in enumerate(parameters(optimizer)):
        result.append((i, "parameter", p.detach().clone()))
        entry = optimizer.state.get(p)
        for key, value in entry.items() if isinstance(entry, dict) else ():
            result.append((i, key, value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)))
    return result


def assert_unchanged(optimizer: Any, before: list[Any]) -> None:
    after = snapshot(optimizer)
    assert [x[:2] for x in after] == [x[:2] for x in before]
    for (i, key, a), (_, _, b) in zip(after, before, strict=True):
        assert same_bits(a, b) if isinstance(a, torch.Tensor) else a == b, f"{key} of parameter {i} has changed"


def assert_close(actual: Any, expected: Any, where: str, steps: int) -> None:
    if not isinstance(expected, torch.Tensor):
        assert actual == expected, where
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
    if expected.dtype not in (torch.float32, torch.float64):
        assert same_bits(actual, expected), where
        return
    assert torch.equal(actual.isnan(), expected.isnan()), f"{where}: {actual}, must be {expected}"
    actual, expected = actual.detach().nan_to_num(), expected.detach().nan_to_num()
    largest = torch.full(expected.shape, float(expected.abs().max()) if expected.numel() else 0.0, dtype=expected.dtype)
    error = in_ulps(actual, expected, largest)
    assert error <= ULPS * min(max(steps, 1), 10), f"{where} is {error} ulps off: {actual}, must be {expected}"


def assert_as_torch(
    name: str, scenario: Callable[[Any], Any], steps: int = 4, dtype: Any = None, fails: bool = False
) -> Any:
    """A scenario with pyopt.torch's class and with torch's comes to the same optimizer, or to the same exception.

    Args:
        scenario: takes the class, returns the optimizer.
        dtype: the coarsest that was computed in, where it is not that of the result.
        fails: torch's raises.
    """
    found = [outcome(lambda module=module: scenario(getattr(module, name))) for module in (optim, torch.optim)]
    ours, theirs = found
    if fails:
        assert isinstance(theirs, tuple), "torch takes it"
        assert ours == theirs
        return None
    assert not isinstance(theirs, tuple), theirs
    assert not isinstance(ours, tuple), ours
    actual, expected = snapshot(ours), snapshot(theirs)
    assert [x[:2] for x in actual] == [x[:2] for x in expected]
    for (i, key, a), (_, _, e) in zip(actual, expected, strict=True):
        if dtype is not None and isinstance(e, torch.Tensor):
            assert a.dtype == e.dtype
            a, e = a.to(dtype), e.to(dtype)
        assert_close(a, e, f"{key} of parameter {i}", steps)
    return ours


def set_gradients(params: list[Any], seed: int = 0) -> None:
    """Dense gradients of the parameters' own memory order, none zero."""
    for i, p in enumerate(params):
        g = new(*p.shape, dtype=p.dtype, seed=seed * 100 + i)
        p.grad = torch.empty_like(p).copy_(g + g.sign() / 4).detach()


def stepped(optimizer: Any, steps: int = 1, seed: int = 0) -> Any:
    for k in range(steps):
        set_gradients(parameters(optimizer), seed + k)
        optimizer.step()
    return optimizer


# --- A, D: mixed precision --------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As KeyboardInterrupt is: no Exception."""


class StoppingFloat(float):
    """A number that raises where it is read."""

    def __float__(self) -> float:
        raise Stop

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __mul__ = __rmul__ = lambda *_: StoppingFloat.stop()
    __hash__ = float.__hash__

    @staticmethod
    def stop() -> Any:
        raise Stop


def sparse(p: Any) -> Any:
    return torch.sparse_coo_tensor([[0, 2]], torch.ones(2, *p.shape[1:], dtype=p.dtype), p.shape, check_invariants=True)


def bad_option(optimizer: Any) -> Callable[[], None]:
    group = optimizer.param_groups[0]
    kept = group["lr"]
    group["lr"] = "much"
    return lambda: group.update(lr=kept)


def missing_option(optimizer: Any) -> Callable[[], None]:
    kept = optimizer.param_groups[0].pop("weight_decay")
    return lambda: optimizer.param_groups[0].update(weight_decay=kept)


def stopping_option(optimizer: Any) -> Callable[[], None]:
    group = optimizer.param_groups[0]
    kept = group["lr"]
    group["lr"] = StoppingFloat(1.0)
    return lambda: group.update(lr=kept)


def no_dict(optimizer: Any) -> Callable[[], None]:
    p = parameters(optimizer)[-1]
    kept = optimizer.state.pop(p, None)
    optimizer.state[p] = [1]

    def restore() -> None:
        del optimizer.state[p]
        if kept is not None:
            optimizer.state[p] = kept

    return restore


def raising_hook(register: str) -> Callable[[Any], Callable[[], None]]:
    def spoil(optimizer: Any) -> Callable[[], None]:
        def hook(*_: Any) -> None:
            raise Stop

        handle = getattr(optimizer, register)(hook)
        return handle.remove

    return spoil


def sparse_gradient(optimizer: Any) -> Callable[[], None]:
    parameters(optimizer)[-1].grad = sparse(parameters(optimizer)[-1])
    return lambda: None


SPOILS: dict[str, Callable[[Any], Callable[[], None]]] = {
    "option": bad_option,
    "missing option": missing_option,
    "interrupted": stopping_option,
    "state": no_dict,
    "sparse": sparse_gradient,
    "pre hook": raising_hook("register_step_pre_hook"),
    "post hook": raising_hook("register_step_post_hook"),
}


@pytest.mark.filterwarnings(SPARSE_WARNING)
@pytest.mark.parametrize("fused", [False, True], ids=["default", "fused"])
@pytest.mark.parametrize("what", SPOILS)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_failed_scaler_step_leaves_nothing_on_the_optimizer(name: str, what: str, fused: bool) -> None:
    """The next plain step is not divided by the scale."""
    if name == "SGD" and what == "sparse":
        pytest.skip("SGD takes sparse gradients")
    params = [torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))]
    optimizer = build(name, params, lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad = torch.full((4,), 1024.0)
    restore = SPOILS[what](optimizer)
    with pytest.raises(BaseException):  # noqa: B017
        scaler.step(optimizer)
    restore()
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones(4)
    optimizer.state.clear()
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b - 1)


def test_scaler_works_after_a_failed_step() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = optim.SGD([p], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    p.grad = torch.full((1,), 1024.0)
    restore = bad_option(optimizer)
    with pytest.raises(Exception):  # noqa: B017
        scaler.step(optimizer)
    restore()
    scaler.update()
    scaler.step(optimizer)
    scaler.update()
    assert p.item() == -1 and not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def supports_scaling(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@pytest.mark.parametrize(
    "options", [{}, {"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}], ids=str
)
@each
def test_scaling_in_the_pass_only_where_fused_was_asked_for(name: str, options: dict[str, Any]) -> None:
    if name == "RMSprop" and "fused" in options:
        pytest.skip("torch has no fused RMSprop")
    ours, theirs = (getattr(module, name)(small(), **options) for module in (optim, torch.optim))
    assert supports_scaling(ours) == supports_scaling(theirs) == (options.get("fused") is True)
    if not options.get("fused"):
        for o in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), stepped(ours)):
            assert not supports_scaling(o)


def test_lion_leaves_the_unscaling_to_the_scaler() -> None:
    assert not supports_scaling(optim.Lion(small()))


def test_checkpoint_of_a_fused_optimizer_does_not_turn_scaling_on() -> None:
    """Whatever the loaded group says, the numbers are those of the scaler."""
    source = stepped(torch.optim.SGD(small(), lr=1.0, momentum=0.9, fused=True))
    results = []
    for module in (optim, torch.optim):
        optimizer = module.SGD(small(), lr=1.0, momentum=0.9)
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        for p in parameters(optimizer):
            p.grad = torch.full_like(p, 1024.0)
        scaler.step(optimizer)
        results.append(parameters(optimizer))
    torch.testing.assert_close(*results)


def clipped(optimizer: Any, clip: float) -> None:
    torch.nn.utils.clip_grad_norm_(parameters(optimizer), clip)


def wrapped_step(optimizer: Any) -> None:
    """As functools.wraps makes it; schedulers wrap the step in the same way."""
    step = optimizer.step

    @functools.wraps(step)
    def clip_and_step(*args: Any, **kwargs: Any) -> Any:
        clipped(optimizer, 1.0)
        return step(*args, **kwargs)

    optimizer.step = clip_and_step


def wrapped_method(optimizer: Any) -> None:
    """As types.MethodType binds it."""
    step = type(optimizer).step

    @functools.wraps(step)
    def clip_and_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        clipped(self, 1.0)
        return step(self, *args, **kwargs)

    optimizer.step = clip_and_step.__get__(optimizer)


def pre_hook(optimizer: Any) -> None:
    optimizer.register_step_pre_hook(lambda o, *_: clipped(o, 1.0))


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduler"])
@pytest.mark.parametrize("wrap", [wrapped_step, wrapped_method, pre_hook])
def test_wrapped_step_that_clips_sees_unscaled_gradients(wrap: Callable[[Any], None], scheduled: bool) -> None:
    """Gradient (3, 4), clipped to the norm 1."""
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([w], lr=1.0)
    if wrap is not wrapped_step:
        wrap(optimizer)
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if wrap is wrapped_step:  # a scheduler wants a method
        wrap(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((w * torch.tensor([3.0, 4.0])).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(w.detach(), torch.tensor([-0.6, -0.8]))


class Trainer:
    """What Lightning's mixed precision plugin does with an optimizer (its amp.py), with and without a scaler."""

    def __init__(self, scale: float | None, clip: float) -> None:
        self.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        self.clip = clip
        self.norms: list[float] = []

    def step(self, optimizer: Any, loss: Any) -> None:
        handles_unscaling = getattr(optimizer, "_step_supports_amp_scaling", False)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler is not None and not handles_unscaling:
            self.scaler.unscale_(optimizer)
        self.norms.append(float(torch.nn.utils.get_total_norm(p.grad for p in parameters(optimizer))))
        if self.clip > 0:
            if handles_unscaling:
                raise RuntimeError(f"The current optimizer, {type(optimizer)}, does not allow for gradient clipping")
            clipped(optimizer, self.clip)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["bf16-mixed", "16-mixed"])
@each
def test_lightning_may_clip(name: str, scale: float | None) -> None:
    results = []
    for module in (optim, torch.optim):
        w = torch.nn.Parameter(torch.zeros(2))
        optimizer = getattr(module, name)([w], lr=1.0)
        trainer = Trainer(scale, clip=1.0)
        for _ in range(2):
            optimizer.zero_grad()
            trainer.step(optimizer, (w * torch.tensor([3.0, 4.0])).sum())
        results.append(w.detach())
        assert trainer.norms == [5.0, 5.0]
    torch.testing.assert_close(*results)


def test_hook_before_the_step_sees_unscaled_norms() -> None:
    w = torch.nn.Parameter(torch.zeros(2))
    trainer = Trainer(1024.0, clip=0.0)
    trainer.step(optim.Adam([w]), (w * torch.tensor([0.4, 0.96])).sum())
    assert trainer.norms == pytest.approx([1.04])


# --- B: what others put in place --------------------------------------------------------------------------------------


@apart
@pytest.mark.parametrize("entry", [[1], (1, 2), "text", 5, None, UserDict()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("first", [True, False], ids=["first_step", "later_step"])
@every
def test_state_entry_that_is_no_dict_names_the_parameter(
    name: str, options: dict[str, Any], first: bool, entry: Any
) -> None:
    """Before anything has changed, also where another parameter comes first."""
    params = list(zip(("weight", "bias"), new_parameters((3,), (4,)), strict=True))
    optimizer = build(name, params, **options)
    if not first:
        stepped(optimizer)
    set_gradients(parameters(optimizer), 1)
    kept = optimizer.state.get(params[1][1], {})
    optimizer.state[params[1][1]] = entry
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"bias|parameter 1"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    optimizer.state[params[1][1]] = kept
    optimizer.step()
    assert not torch.equal(params[0][1].detach(), before[0][2])


@apart
@pytest.mark.parametrize("what", ["empty", "with entries", "entries of some", "later", "defaultdict"])
@with_state
def test_plain_dict_as_state_works_or_raises_before_anything_moves(
    name: str, options: dict[str, Any], what: str
) -> None:
    params = small()
    optimizer = build(name, params, **options)
    eager = dict(optimizer.state)
    if what == "empty":
        optimizer.state = {}
    elif what == "defaultdict":
        optimizer.state = defaultdict(dict, eager)
    elif what == "with entries":
        optimizer.state = {p: eager.get(p, {}) for p in params}
    elif what == "entries of some":
        optimizer.state = {params[0]: eager.get(params[0], {})}
    else:
        stepped(optimizer)
        optimizer.state = {p: optimizer.state[p] for p in params[:2]}
    set_gradients(params)
    before = snapshot(optimizer)
    found = outcome(optimizer.step)
    if found is None:
        for (_, key, b), p in zip((x for x in before if x[1] == "parameter"), params, strict=True):
            assert not torch.equal(p.detach(), b), key
        stepped(optimizer)
    else:
        assert found[0] is KeyError and what in ("empty", "entries of some", "later"), found
        for (i, key, b), p in zip((x for x in before if x[1] == "parameter"), params, strict=True):
            assert same_bits(p.detach(), b), f"{key} {i} has moved"
        optimizer.state = defaultdict(dict, optimizer.state)
        for p in params:
            if name == "Adagrad" and p not in optimizer.state:
                optimizer.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}
        stepped(optimizer)


# --- C: what the user let go ------------------------------------------------------------------------------------------


def storages(optimizer: Any) -> list[Any]:
    return [StorageWeakRef(v.untyped_storage()) for s in optimizer.state.values() for v in s.values()]


def prepared(name: str, options: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    p, q = new_parameters((30,), (40,))
    optimizer = build(name, [{"params": [p]}, {"params": [q]}], **options)
    stepped(optimizer, 2)
    p.grad = q.grad = None
    return optimizer, q, storages(optimizer)


@every
def test_dropped_state_is_freed_at_once(name: str, options: dict[str, Any]) -> None:
    """Also while the parameter has no gradient any more, without a step in between."""
    optimizer, _, held = prepared(name, options)
    optimizer.state.clear()
    assert all(s.expired() for s in held)


@every
def test_replaced_parameter_is_freed_at_once(name: str, options: dict[str, Any]) -> None:
    optimizer, q, held = prepared(name, options)
    gone, memory = weakref.ref(q), StorageWeakRef(q.untyped_storage())
    optimizer.param_groups[1]["params"][0] = torch.nn.Parameter(torch.zeros(5))
    optimizer.state.pop(q, None)
    del q
    assert gone() is None and memory.expired()
    assert all(s.expired() for s in held[len(held) // 2 :])


@every
def test_removed_group_is_freed_at_once(name: str, options: dict[str, Any]) -> None:
    optimizer, q, held = prepared(name, options)
    gone = weakref.ref(q)
    optimizer.state.pop(q, None)
    del q, optimizer.param_groups[1]
    assert gone() is None
    assert all(s.expired() for s in held[len(held) // 2 :])


@every
def test_pruned_memory_is_freed_at_once(name: str, options: dict[str, Any]) -> None:
    """As pruning does it: new data and new state, half as long."""
    optimizer, q, held = prepared(name, options)
    memory = StorageWeakRef(q.untyped_storage())
    q.data = q.data[:20].clone()
    for key, value in optimizer.state.get(q, {}).items():
        optimizer.state[q][key] = value.clone() if key == "step" else value[:20].clone()
        del value
    assert memory.expired() and all(s.expired() for s in held[len(held) // 2 :])
    stepped(optimizer)


@every
def test_a_failed_step_holds_nothing(name: str, options: dict[str, Any]) -> None:
    optimizer, q, held = prepared(name, options)
    set_gradients(parameters(optimizer))
    gradient, gone = weakref.ref(q.grad), weakref.ref(q)
    optimizer.param_groups[0]["lr"] = "much"
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    q.grad = None
    assert gradient() is None
    optimizer.state.pop(q, None)
    del q, optimizer.param_groups[1]
    assert gone() is None and all(s.expired() for s in held[len(held) // 2 :])


# --- E: numbers -------------------------------------------------------------------------------------------------------

# (name, options, an option that float32 cannot hold, directly or in what is computed from it)
OVERFLOWS: list[tuple[str, dict[str, Any], str]] = [
    ("Adam", {}, "lr=1e38"),  # divided by 1 - beta1
    ("AdamW", {}, "lr=1e38"),
    *[(name, {}, "lr=1e39") for name in [*FIVE, "Lion"]],
    *[(name, {}, "weight_decay=1e39") for name in [*FIVE, "Lion"]],
    ("AdamW", {"lr": 1e30}, "weight_decay=1e30"),  # their product
    ("SGD", {}, "momentum=1e39"),
    ("SGD", {"momentum": 0.9}, "dampening=-1e39"),
    ("RMSprop", {}, "momentum=1e39"),
    ("Adam", {}, "eps=1e39"),
    ("RMSprop", {}, "eps=1e39"),
    ("Adagrad", {}, "eps=1e39"),
]
overflows = pytest.mark.parametrize(
    ("name", "options", "option"), OVERFLOWS, ids=["-".join([n, *map(str, o), x]) for n, o, x in OVERFLOWS]
)


@pytest.mark.parametrize("late", [False, True], ids=["constructor", "group"])
@overflows
def test_option_that_float32_cannot_hold_is_refused(
    name: str, options: dict[str, Any], option: str, late: bool
) -> None:
    """A float64 parameter in the same group does not move either; alone it steps."""
    key, value = option.split("=")
    params = new_parameters((2,), dtype=torch.float64) + new_parameters((3,))
    if late:
        optimizer = stepped(build(name, params, **options))
        optimizer.param_groups[0][key] = float(value)
        if key == "momentum":  # the state that it needs
            for p in params:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    else:
        optimizer = build(name, params, **options, **{key: float(value)})
    params[0].grad, params[1].grad = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([0.0, 1.0, -1.0])
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match="float32"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    params[1].grad = None
    optimizer.step()
    assert params[0].isfinite().all()


def test_lr_tensor_that_float32_cannot_hold_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([0.0, 1.0])
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = optim.Adam([p], lr=lr)
    optimizer.step()
    lr.fill_(1e39)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="float32"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad"])
def test_eps_that_becomes_zero_in_float32_is_refused(name: str) -> None:
    """An eps of 0 is what somebody asked for, and one that float64 holds is fine there."""
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="eps"):
        build(name, [p], eps=1e-60).step()
    assert p.tolist() == [1, 1]
    build(name, [p], eps=0.0).step()
    assert p.isfinite().all() and p[0] != 1
    q = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    q.grad = torch.ones(2, dtype=torch.float64)
    build(name, [q], eps=1e-60).step()
    assert q.isfinite().all() and q[0] != 1


@every
def test_versions_of_parameters_and_state_are_raised(name: str, options: dict[str, Any]) -> None:
    """All that a step writes, step counts included, and nothing else."""
    p, q, idle = new_parameters((3,), (4,), (5,))
    optimizer = stepped(build(name, [p, q, idle], **options))
    idle.grad = None
    written = [t for x in (p, q) for t in (x, *optimizer.state.get(x, {}).values()) if isinstance(t, torch.Tensor)]
    others = [t for t in (idle, *optimizer.state.get(idle, {}).values()) if isinstance(t, torch.Tensor)]
    others += [p.grad, q.grad]
    for _ in range(3):
        before = [t._version for t in written], [t._version for t in others]
        optimizer.step()
        assert all(t._version > v for t, v in zip(written, before[0], strict=True))
        assert [t._version for t in others] == before[1]


@with_state
def test_backward_through_state_that_a_step_has_written_raises(name: str, options: dict[str, Any]) -> None:
    (p,) = new_parameters((3,))
    optimizer = stepped(build(name, [p], **options))
    for key, value in optimizer.state[p].items():
        x = torch.ones(value.shape, requires_grad=True)
        product = (x * value).sum()
        stepped(optimizer)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        (x * value).sum().backward()
        assert torch.equal(x.grad, value), key


@every
def test_a_failed_step_raises_no_versions(name: str, options: dict[str, Any]) -> None:
    optimizer = stepped(build(name, small(), **options))
    tensors = [t for p in parameters(optimizer) for t in (p, *optimizer.state.get(p, {}).values())]
    before = [t._version for t in tensors if isinstance(t, torch.Tensor)]
    optimizer.param_groups[0]["lr"] = "much"
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert [t._version for t in tensors if isinstance(t, torch.Tensor)] == before


# --- F: what a user meant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*torch.optim.__all__, "lr_scheduler", "swa_utils", "Optimizer"}))
def test_public_names_of_torch_optim(name: str) -> None:
    ours, theirs = getattr(optim, name), getattr(torch.optim, name)
    assert name in dir(optim)
    if name in vars(optim):
        assert issubclass(ours, theirs) and ours is not theirs
    else:
        assert ours is theirs


def test_star_import_is_that_of_torch_optim_and_more() -> None:
    found: dict[str, Any] = {}
    exec("from pyopt.torch import *", found)
    assert set(torch.optim.__all__) | {"Lion", "explain"} <= set(found)
    assert found["Adam"] is optim.Adam and issubclass(found["Adam"], found["Optimizer"])


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Adamm"):
        _ = optim.Adamm


def test_scheduler_from_the_same_module() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = optim.SGD([p], lr=1.0)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert p.item() == -1.75


def test_class_without_a_kernel_steps_and_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = optim.LBFGS([p])
    optimizer.step(lambda: p.sum())
    q = torch.nn.Parameter(torch.ones(3))
    q.grad = torch.ones(3)
    torch.optim.LBFGS([q]).step(lambda: q.sum())
    assert same_bits(p.detach(), q.detach())
    optim.explain(optimizer)
    text = capsys.readouterr().out
    assert "parameter 0" in text and "torch.optim.LBFGS" in text


def fastest(*runs: Callable[[], Any], rounds: int = 15) -> list[float]:
    """The least time of each, in turns."""
    times = [[] for _ in runs]
    for _ in range(rounds):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [min(found) for found in times]


@pytest.mark.filterwarnings(SPARSE_WARNING)
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_cost_what_torchs_step_costs(name: str) -> None:
    steps = []
    for module in (optim, torch.optim):
        params = new_parameters(*[(20, 4)] * 26)
        for p in params:
            p.grad = sparse(p)
        steps.append(getattr(module, name)(params).step)
    ours, theirs = fastest(*steps)
    # Generous, for busy machines; an exception thrown per tensor and step made it 20 to 70 times.
    assert ours <= 10 * theirs, f"{ours * 1e6:.0f} us, torch {theirs * 1e6:.0f} us"


def called(names: list[str], run: Callable[[], Any]) -> dict[str, int]:
    """How often functions of the module torch are called."""
    counts = dict.fromkeys(names, 0)

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(torch, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with mock.patch.multiple(torch, **{name: counting(name) for name in names}):
        run()
    return counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "function"), [("Adam", "_fused_adam_"), ("AdamW", "_fused_adamw_"), ("Adagrad", "_fused_adagrad_")]
)
def test_fused_reaches_what_is_left_to_torch(name: str, function: str, dtype: Any) -> None:
    """Half precision beside covered parameters: torch's fused step of these, in its bits."""
    halves = []
    for module in (optim, torch.optim):
        base = new(70, dtype=dtype)  # shared, so that it is left
        params = [torch.nn.Parameter(base), torch.nn.Parameter(base[:30]), *new_parameters((4,))]
        optimizer = getattr(module, name)(params, lr=0.1, fused=True)
        counts = called([function], lambda o=optimizer: stepped(o, 3))
        assert counts[function] == (3 if module is optim else 6)
        halves.append(params[:2])
    for p, q in zip(*halves, strict=True):
        assert same_bits(p.detach(), q.detach())


def test_foreach_reaches_what_is_left_to_torch() -> None:
    params = [torch.nn.Parameter(new(70, 2, dtype=torch.bfloat16)[:, i]) for i in range(2)]
    counts = called(["_foreach_lerp_"], lambda: stepped(optim.Adam(params, lr=0.1, foreach=True), 3))
    assert counts["_foreach_lerp_"] == 3


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad"])
def test_fused_gives_way_where_torchs_is_wrong(name: str) -> None:
    """A gradient in another memory order: torch's fused step misreads it, its for-loop does not."""
    results = []
    for module, options in ((optim, {"fused": True}), (torch.optim, {})):
        p = torch.nn.Parameter(new(4, 6, 2, dtype=torch.bfloat16)[..., 1])
        optimizer = getattr(module, name)([p], lr=0.1, **options)
        for seed in range(2):
            p.grad = new(6, 4, dtype=torch.bfloat16, seed=seed).t()
            optimizer.step()
        results.append(p.detach())
    assert same_bits(*results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_compiled_function_breaks_once_and_is_not_compiled_again(name: str) -> None:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    params = small() + new_parameters((3, 3), (6,))
    optimizer = build(name, params, lr=0.1)
    set_gradients(params)

    @torch.compile(backend="eager")
    def run(x: Any) -> Any:
        y = x * 2
        optimizer.step()
        return y + 1

    before = [p.detach().clone() for p in params]
    with dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            assert run(torch.ones(2)).tolist() == [3, 3]
    breaks = dynamo.utils.counters["graph_break"]
    dynamo.reset()
    assert sum(breaks.values()) <= 1, breaks
    twin = build(name, small() + new_parameters((3, 3), (6,)), lr=0.1)
    for p, b in zip(parameters(twin), before, strict=True):
        assert same_bits(p.detach(), b)
    set_gradients(parameters(twin))
    for _ in range(4):
        twin.step()
    for p, q in zip(params, parameters(twin), strict=True):
        assert same_bits(p.detach(), q.detach())


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor], ids=lambda t: t.__name__)
def test_checkpoint_from_numpy_side_loads_with_weights_only(number: Any) -> None:
    """Options that were NumPy's numbers are Python's in what torch saves."""
    if number is torch.tensor:
        optimizer = optim.Adam(small(), lr=0.5)
        optimizer.param_groups[0]["weight_decay"] = np.float64(0.25)
        stepped(optimizer)
        optimizer.param_groups[0]["weight_decay"] = 0.25
        saved_and_loaded(optimizer.state_dict())
        return
    options = {"lr": number(0.5), "betas": (number(0.5), number(0.25)), "weight_decay": number(0.25)}
    p = pyopt.Parameter(np.ones(3, np.float32), np.ones(3, np.float32))
    optimizer = pyopt.Adam([p], **options)
    optimizer.step()
    group = saved_and_loaded(optim.to_torch(optimizer.state_dict()))["param_groups"][0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.5, 0.25), 0.25)
    assert {type(group[key]) for key in ("lr", "weight_decay")} == {float}


OWN_KEYS = {"name": "head", "lr_scale": 0.5, "layer_id": 3}


@every
def test_own_keys_of_groups_survive(name: str, options: dict[str, Any]) -> None:
    p, q = new_parameters((3,), (4,))
    optimizer = stepped(build(name, [{"params": [p], **OWN_KEYS}, {"params": [q]}], **options))
    for o in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {key: o.param_groups[0][key] for key in OWN_KEYS} == OWN_KEYS
    other = build(name, [{"params": [torch.nn.Parameter(p.detach())]}, {"params": [torch.nn.Parameter(q.detach())]}])
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    stepped(other)
    assert {key: other.param_groups[0][key] for key in OWN_KEYS} == OWN_KEYS


@every
def test_own_keys_of_groups_travel_to_numpy_and_back(name: str, options: dict[str, Any]) -> None:
    p = new_parameters((3,))[0]
    source = stepped(build(name, [{"params": [p], **OWN_KEYS}], **options))
    middle = getattr(pyopt, name)([pyopt.Parameter(p.detach().numpy().copy())], **options)
    middle.load_state_dict(optim.from_torch(source.state_dict()))
    assert {key: middle.param_groups[0][key] for key in OWN_KEYS} == OWN_KEYS
    back = saved_and_loaded(optim.to_torch(middle.state_dict()))
    assert {key: back["param_groups"][0][key] for key in OWN_KEYS} == OWN_KEYS


@every
def test_own_state_survives(name: str, options: dict[str, Any]) -> None:
    """As Lookahead keeps its slow weights: through steps, copies, saving and loading, on both sides."""
    (p,) = new_parameters((3,))
    slow = new(3, seed=9)
    optimizer = stepped(build(name, [p], **options))
    optimizer.state[p]["slow"] = slow
    optimizer.state[p]["note"] = 5
    stepped(optimizer, 2)
    assert optimizer.state[p]["slow"] is slow and same_bits(slow, new(3, seed=9))
    loaded = build(name, [torch.nn.Parameter(p.detach().clone())], **options)
    loaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for o in (loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        stepped(o)
        state = o.state[parameters(o)[0]]
        assert same_bits(state["slow"], slow) and state["note"] == 5
    middle = getattr(pyopt, name)([pyopt.Parameter(p.detach().numpy().copy())], **options)
    middle.load_state_dict(optim.from_torch(optimizer.state_dict()))
    back = optim.to_torch(middle.state_dict())["state"][0]
    assert same_bits(back["slow"], slow) and back["note"] == 5


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_own_state_before_the_first_step_of_sgd(options: dict[str, Any]) -> None:
    def scenario(cls: Any) -> Any:
        optimizer = cls(small(), lr=0.1, **options)
        for p in parameters(optimizer):
            optimizer.state[p]["slow"] = p.detach().clone()
        return stepped(optimizer, 3)

    assert_as_torch("SGD", scenario)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Lion"])
def test_own_state_before_the_first_step_works_or_raises_before_anything_moves(name: str) -> None:
    """torch's raise a KeyError then: it makes state only where there is none."""
    params = small()
    optimizer = build(name, params)
    optimizer.state[params[1]]["slow"] = torch.ones(7)
    set_gradients(params)
    before = [p.detach().clone() for p in params]
    found = outcome(optimizer.step)
    assert found is None or found[0] is KeyError
    assert [same_bits(p.detach(), b) for p, b in zip(params, before, strict=True)] == [found is not None] * 3


class Wrapper:
    """As accelerate and HF hold an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


class Sharded:
    """As ZeroRedundancyOptimizer holds it."""

    def __init__(self, optimizer: Any) -> None:
        self.optim = optimizer


class OptimizerWrapper(torch.optim.Optimizer):
    """accelerate's is a subclass of torch's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        Sharded,
        OptimizerWrapper,
        lambda o: Wrapper(Sharded(o)),
        lambda o: Sharded(OptimizerWrapper(Wrapper(o))),
    ],
)
def test_explain_looks_through_wrappers(wrap: Any, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = optim.Adam(list(zip(("first", "second"), new_parameters((3,), (4,)), strict=True)))
    set_gradients(parameters(optimizer))
    optim.explain(optimizer)
    expected = capsys.readouterr().out
    optim.explain(wrap(optimizer))
    assert capsys.readouterr().out == expected and "first" in expected


class Circular:
    @property
    def optimizer(self) -> Any:
        return self


@apart
@pytest.mark.parametrize(
    "what", [5, None, "Adam", torch.nn.Linear(1, 1), Wrapper(7), Circular(), [1], Wrapper], ids=repr
)
def test_explain_of_something_else_names_its_class(what: Any) -> None:
    with pytest.raises(TypeError) as error:
        optim.explain(what)
    assert type(what).__name__ in str(error.value)


# --- H: tensors, found by a fuzz --------------------------------------------------------------------------------------


def expanded(*shape: int, value: float = 1.0) -> Any:
    return torch.full((1,) * len(shape), value).expand(shape)


def transposed(*shape: int, seed: int = 0) -> Any:
    """In the other memory order."""
    return new(*shape[::-1], seed=seed).permute(*reversed(range(len(shape))))


ORDERS: dict[str, Callable[..., Any]] = {
    "expanded": expanded,
    "transposed": transposed,
    "every other": lambda *shape: new(*shape[:-1], shape[-1] * 2)[..., ::2],
    "negated": lambda *shape: torch._neg_view(transposed(*shape)),
    "conjugated": lambda *shape: torch.complex(new(*shape), new(*shape, seed=1)).conj().imag,
}
SHAPES = [
    ((0, 3), (1, 3)),
    ((4, 3), (2, 3)),
    ((2, 3), (4, 3)),
    ((3, 4), (4, 3)),
    ((2, 6), (3, 4)),
    ((12, 1), (2, 6)),
    ((2, 3), (2, 3, 1, 2)),
    ((1, 5), (0, 5)),
    ((2, 3, 4), (4, 3)),
]


@apart
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda s: "to".join("x".join(map(str, x)) for x in s))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FIVE)
def test_shape_changes_under_a_gradient_in_another_order(name: str, order: str, shapes: Any) -> None:
    """p.data and its state get another shape while the gradient needs a private copy, before and after."""

    def scenario(cls: Any) -> Any:
        (p, q) = new_parameters(shapes[0], (3,))
        optimizer = cls([p, q], lr=0.1)
        for shape in (*shapes, shapes[0]):
            p.data, p.grad = torch.ones(shape), None
            for key, _value in optimizer.state.get(p, {}).items():
                if key != "step":
                    optimizer.state[p][key] = torch.full(shape, 0.5)
            for seed in range(2):
                q.grad = new(3, seed=seed)
                p.grad = ORDERS[order](*shape)
                optimizer.step()
        return optimizer

    assert_as_torch(name, scenario, 6)


@apart
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (24, 9)], ids=str)
@pytest.mark.parametrize("order", ["expanded", "transposed", "negated"])
@pytest.mark.parametrize("name", FIVE)
def test_dtype_changes_under_a_gradient_in_another_order(name: str, order: str, shape: Any, dtypes: Any) -> None:
    """The private copy of the gradient is that of the new dtype."""

    def scenario(cls: Any) -> Any:
        (p,) = new_parameters(shape)
        optimizer = cls([p], lr=0.1)
        for dtype in (*dtypes, dtypes[0]):
            p.grad = None
            p.data = p.data.to(dtype)
            for key, value in optimizer.state.get(p, {}).items():
                if key != "step":
                    optimizer.state[p][key] = value.to(dtype)
            for seed in range(2):
                p.grad = (
                    ORDERS[order](*shape).to(dtype)
                    if order != "negated"
                    else torch._neg_view(transposed(*shape, seed=seed).to(dtype))
                )
                optimizer.step()
        return optimizer

    assert_as_torch(name, scenario, 6, torch.float32)


def two(cls: Any, dtype: Any = torch.bfloat16, **options: Any) -> tuple[Any, Any, Any]:
    """A parameter that is left to torch, then one that is covered."""
    left, covered = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype)[:, 1]), torch.nn.Parameter(torch.ones(2))
    return cls([left, covered], lr=0.1, **options), left, covered


@apart
@pytest.mark.parametrize("left_first", [True, False], ids=["left first", "covered first"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad"])
def test_step_count_shared_by_a_left_and_a_covered_row(name: str, dtype: Any, left_first: bool) -> None:
    def scenario(cls: Any) -> Any:
        left, covered = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype)[:, 1]), torch.nn.Parameter(torch.ones(2))
        optimizer = cls([left, covered] if left_first else [covered, left], lr=0.1)
        for k in range(4):
            left.grad, covered.grad = torch.ones_like(left), torch.full((2,), 1.0 + k)
            optimizer.step()
            if k == 1:
                optimizer.state[left]["step"] = optimizer.state[covered]["step"]
        return optimizer

    assert_as_torch(name, scenario)


def test_step_count_shared_by_rows_at_the_first_step() -> None:
    def scenario(cls: Any) -> Any:
        optimizer, left, covered = two(cls)
        step = torch.tensor(0.0)
        for p in (left, covered):
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    assert_as_torch("Adam", scenario)


# A row left to torch, and memory that it shares with one that is covered: (of the left one, of the covered one).
SHARED = {
    "gradient is a covered parameter": ("grad", "parameter"),
    "gradient is a covered state": ("grad", "state"),
    "parameter is a covered gradient": ("parameter", "grad"),
    "parameter is a covered state": ("parameter", "state"),
    "state is a covered parameter": ("state", "parameter"),
    "state is a covered gradient": ("state", "grad"),
    "state is a covered state": ("state", "state"),
}
REASONS: dict[str, Callable[[Any], Any]] = {
    # Elements that do not lie side by side: left to torch; their memory is part of a float32 buffer.
    "strided": lambda memory: torch.as_strided(memory, (3,), (2,)),
    # A negative bit is left or followed; torch's result either way.
    "negated": lambda memory: torch._neg_view(memory),
    "subclass": lambda memory: memory.as_subclass(Tagged),
    "view": lambda memory: memory[:3],
}


class Tagged(torch.Tensor):
    """A subclass of tensor, which goes to torch."""


def slot(optimizer: Any, p: Any, what: str) -> str:
    return next(key for key in optimizer.state[p] if key != "step")


@apart
@pytest.mark.parametrize("left_first", [True, False], ids=["left first", "covered first"])
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("what", SHARED)
@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {"momentum": 0.5}), ("Adam", {}), ("RMSprop", {}), ("Adagrad", {})]
)
def test_left_row_shares_memory_with_a_covered_row(
    name: str, options: dict[str, Any], what: str, reason: str, left_first: bool
) -> None:
    """Its parameter, gradient or state with the other's: torch's own order of updates."""

    def scenario(cls: Any) -> Any:
        if reason == "strided":
            left = torch.nn.Parameter(torch.as_strided(torch.ones(5), (3,), (2,)))
        elif reason == "subclass":
            left = torch.nn.Parameter(torch.ones(3).as_subclass(Tagged))
        else:
            left = torch.nn.Parameter(torch.ones(5)[:3] if reason == "view" else torch.ones(5))
        covered = torch.nn.Parameter(torch.arange(1.0, 6.0))
        optimizer = cls([left, covered] if left_first else [covered, left], lr=0.1, **options)
        covered.grad, left.grad = torch.arange(2.0, 7.0), torch.full_like(left, 0.5)
        optimizer.step()
        mine, other = SHARED[what]
        memory = {
            "parameter": covered.detach(),
            "grad": covered.grad,
            "state": optimizer.state[covered][slot(optimizer, covered, other)],
        }[other]
        view = REASONS[reason](memory)
        if view.shape != left.shape:
            view = view[: len(left)]
        if mine == "grad":
            left.grad = view
        elif mine == "parameter":
            left.data = view
        else:
            optimizer.state[left][slot(optimizer, left, mine)] = view
        for _ in range(2):
            optimizer.step()
        return optimizer

    assert_as_torch(name, scenario)


@apart
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.float32], ids=str)
def test_gradient_of_a_left_row_is_an_earlier_covered_parameter(dtype: Any) -> None:
    """It is read when the other has moved: [0, 0] moves the later one by nothing."""

    def scenario(cls: Any) -> Any:
        covered, left = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2, dtype=dtype))
        optimizer = cls([covered, left], lr=1.0)
        covered.grad = torch.ones(4)
        left.grad = covered.detach().view(dtype)[:2]
        optimizer.step()
        return optimizer

    ours = assert_as_torch("SGD", scenario, 1)
    assert parameters(ours)[1].tolist() == [1, 1]


@apart
@pytest.mark.parametrize("third", [False, True], ids=["", "a third one moves"])
@pytest.mark.parametrize("at_once", [False, True], ids=["", "moves in the step that is sat out"])
@pytest.mark.parametrize("sits_out", [0, 1])
@pytest.mark.parametrize(
    "shared", ["state and parameter", "state and state", "state and gradient", "state and expanded gradient"]
)
@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.5}), ("Adam", {}), ("RMSprop", {})])
def test_sharing_is_seen_when_a_parameter_comes_back(
    name: str, options: dict[str, Any], shared: str, sits_out: int, at_once: bool, third: bool
) -> None:
    """One sits out a step while another's memory moves, onto its state."""

    def scenario(cls: Any) -> Any:
        params = [torch.nn.Parameter(torch.full((2,), float(k + 1))) for k in range(3)]
        optimizer = cls(params, lr=1.0, **options)
        for p in params:
            p.grad = torch.ones(2)
        optimizer.step()
        away, other = params[sits_out], params[1 - sits_out]
        away.grad = None
        if not at_once:
            optimizer.step()
        state = optimizer.state[away]
        memory = state[slot(optimizer, away, "")]
        if shared == "state and parameter":
            other.data = memory
        elif shared == "state and state":
            optimizer.state[other][slot(optimizer, other, "")] = memory
        else:
            other.grad = memory if shared == "state and gradient" else memory[:1].expand(2)
        optimizer.step()
        if third:
            params[2].data = torch.full((2,), 7.0)
        away.grad = torch.ones(2)
        for k in range(3):
            if third:
                params[2].data = torch.full((2,), 8.0 + k)
            optimizer.step()
        return optimizer

    assert_as_torch(name, scenario)


@apart
@pytest.mark.parametrize("what", ["parameter", "state", "step"])
@pytest.mark.parametrize("name", FIVE)
def test_sharing_that_was_noticed_is_remembered(name: str, what: str) -> None:
    """Two rows on one memory, and a third that moves between the steps."""

    def scenario(cls: Any) -> Any:
        a, b, c = (torch.nn.Parameter(torch.full((4,), float(k + 1))) for k in range(3))
        optimizer = cls([a, b, c], lr=0.5)
        for p in (a, b, c):
            p.grad = torch.ones(4)
        optimizer.step()
        key = "step" if what == "step" else next((k for k in optimizer.state.get(a, {}) if k != "step"), None)
        if what == "parameter":
            b.data = a.data
        elif key in optimizer.state.get(a, {}):
            optimizer.state[b][key] = optimizer.state[a][key]
        for k in range(4):
            optimizer.step()
            c.data = torch.full((4,), float(k))
            if k == 2:
                c.grad = None
        return optimizer

    assert_as_torch(name, scenario, 6)


@apart
@pytest.mark.parametrize("where", ["data", "set_", "state", "step"])
@pytest.mark.parametrize("name", FIVE)
def test_written_memory_lands_on_a_live_gradient(name: str, where: str) -> None:
    """An earlier parameter's memory becomes the gradient of a later one, which is then read when it has moved."""

    def scenario(cls: Any) -> Any:
        q, p = torch.nn.Parameter(torch.full((4,), 3.0)), torch.nn.Parameter(torch.ones(4))
        optimizer = cls([q, p], lr=0.5, **({"momentum": 0.5} if name == "SGD" else {}))
        p.grad, q.grad = torch.arange(1.0, 5.0), torch.ones(4)
        for _ in range(2):
            optimizer.step()
        if where == "data":
            q.data = p.grad
        elif where == "set_":
            with torch.no_grad():
                q.set_(p.grad)
        elif where == "state":
            optimizer.state[q][slot(optimizer, q, "")] = p.grad
        elif "step" in optimizer.state[q]:
            optimizer.state[q]["step"] = p.grad[2]
        for _ in range(2):
            optimizer.step()
        return optimizer

    assert_as_torch(name, scenario)


@apart
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("order", ["q first", "p first"])
@pytest.mark.parametrize("name", FIVE)
def test_strided_gradient_reaches_over_another_parameter(name: str, order: str, offset: int) -> None:
    """Its elements lie far apart, so it ends where its number of elements does not say."""

    def scenario(cls: Any) -> Any:
        memory = torch.arange(1.0, 41.0)
        p, q = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.zeros(3))
        q.data = memory[30 + offset : 33 + offset]
        p.grad = torch.as_strided(memory, (5,), (8,), 0 if offset != 5 else 3)
        q.grad = torch.ones(3)
        optimizer = cls([q, p] if order == "q first" else [p, q], lr=0.5)
        for _ in range(3):
            optimizer.step()
        return optimizer

    assert_as_torch(name, scenario)


@apart
@pytest.mark.parametrize("kind", ["strided", "expanded", "2d", "reversed order"])
@pytest.mark.parametrize("name", FIVE)
def test_strided_gradient_lies_on_its_own_parameter(name: str, kind: str) -> None:
    """torch updates as a whole, operation by operation, whatever lies where: its result."""

    def scenario(cls: Any) -> Any:
        memory = torch.arange(1.0, 41.0)
        p = torch.nn.Parameter(torch.zeros(4))
        p.data = memory[8:12]
        if kind == "strided":
            p.grad = torch.as_strided(memory, (4,), (3,), 0)
        elif kind == "expanded":
            p.grad = memory[9:10].expand(4)
        else:
            p.data = memory[8:12].view(2, 2)
            p.grad = (
                torch.as_strided(memory, (2, 2), (1, 2), 8)
                if kind == "reversed order"
                else torch.as_strided(memory, (2, 2), (8, 1), 2)
            )
        optimizer = cls([p], lr=0.5)
        for _ in range(2):
            optimizer.step()
        return optimizer

    theirs = outcome(lambda: scenario(getattr(torch.optim, name)))
    assert_as_torch(name, scenario, fails=isinstance(theirs, tuple))


def rebind_negated(state: dict[str, Any], key: str, how: str) -> None:
    if how == "_neg_view":
        state[key] = torch._neg_view(state[key])
    elif how == "set_data":
        state[key].data = torch._neg_view(state[key])
    else:
        value = torch.complex(torch.zeros_like(state[key]), state[key])
        state[key] = value.conj().imag


@apart
@pytest.mark.parametrize("how", ["_neg_view", "set_data", "imag"])
@with_state
def test_negative_bit_of_state_at_the_same_address(name: str, options: dict[str, Any], how: str) -> None:
    """The same memory means the negative of it then, and again what it was when the bit goes."""
    if name == "Lion":
        (p,) = new_parameters((5,))
        optimizer = stepped(build(name, [p], **options))
        twin = copy.deepcopy(optimizer)
        rebind_negated(optimizer.state[p], "exp_avg", how)
        q = parameters(twin)[0]
        twin.state[q]["exp_avg"] = -twin.state[q]["exp_avg"]
        for seed in (1, 2):
            stepped(optimizer, seed=seed), stepped(twin, seed=seed)
        torch.testing.assert_close(p, q)
        return

    def scenario(cls: Any) -> Any:
        optimizer = stepped(cls(new_parameters((5,), (4,)), **options), 2)
        p = parameters(optimizer)[0]
        for key in list(optimizer.state[p]):
            if key == "exp_avg" or (key == "momentum_buffer" and name == "SGD"):  # those with a sign
                for _ in range(2):
                    rebind_negated(optimizer.state[p], key, how)
                    stepped(optimizer, 2, seed=5)
        return optimizer

    assert_as_torch(name, scenario, 6)


def explained(optimizer: Any, capsys: Any) -> list[str]:
    optim.explain(optimizer)
    lines = capsys.readouterr().out.splitlines()
    return ["torch" if " torch" in line else "pyopt" for line in lines if " torch" in line or " pyopt" in line]


def test_explain_sees_a_gradient_that_aliases_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """And does not send the next clean step to torch."""
    p, q = new_parameters((4,), (4,))
    optimizer = optim.Adam([p, q])
    set_gradients([p, q])
    assert explained(optimizer, capsys) == ["pyopt", "pyopt"]
    optimizer.step()
    q.grad = p.detach()
    assert explained(optimizer, capsys)[1] == "torch"
    q.grad = torch.ones(4)
    assert explained(optimizer, capsys) == ["pyopt", "pyopt"]
    with mock.patch.object(ADAM, "_single_tensor_adam", side_effect=AssertionError("torch's step ran")):
        optimizer.step()


@pytest.mark.parametrize("what", ["grad", "state", "parameter", "step"])
def test_explain_says_what_the_step_does(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    p, q = new_parameters((4,), (4,))
    optimizer = optim.Adam([p, q])
    set_gradients([p, q])
    optimizer.step()
    if what == "grad":
        q.grad = p.detach()[:]
    elif what == "parameter":
        q.data = p.data
    else:
        key = "exp_avg" if what == "state" else "step"
        optimizer.state[q][key] = optimizer.state[p][key]
    paths = explained(optimizer, capsys)
    steps: list[int] = []
    original = ADAM._single_tensor_adam

    def spy(params: Any, *args: Any, **kwargs: Any) -> Any:
        steps.extend(map(id, params))
        return original(params, *args, **kwargs)

    with mock.patch.object(ADAM, "_single_tensor_adam", spy):
        optimizer.step()
    assert paths == ["torch" if id(x) in steps else "pyopt" for x in (p, q)]
    assert "torch" in paths


@pytest.mark.parametrize("late", [False, True], ids=["group of the constructor", "changed later"])
@pytest.mark.parametrize("betas", [(0.9, 1.1), (1.1, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan"))], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas_out_of_bounds_in_a_group_are_named(name: str, betas: Any, late: bool) -> None:
    """torch does not check groups and divides by zero, or takes roots of negative numbers."""
    p, q = new_parameters((3,), (4,))
    optimizer = build(name, [{"params": [p]}, {"params": [q], **({} if late else {"betas": betas})}])
    if late:
        stepped(optimizer)
        optimizer.param_groups[1]["betas"] = betas
    set_gradients([p, q])
    before = snapshot(optimizer)
    found = outcome(optimizer.step)
    if betas == (0.9, 1.1):
        assert found is not None
    if found is not None:
        assert found[0] is ValueError and "betas" in found[1], found
        assert_unchanged(optimizer, before)


# --- what the suite did not notice ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inside torch
@pytest.mark.parametrize("what", ["gradient", "gradient of one", "parameter", "later"])
@brief
def test_forward_mode_differentiation_sees_the_step(name: str, options: dict[str, Any], what: str) -> None:
    """Tangents of gradients and parameters reach parameters and state as in torch, or raise as there (amsgrad)."""

    def run(module: Any) -> list[Any]:
        with fwAD.dual_level():
            values = [torch.arange(1.0, 4.0), torch.arange(2.0, 6.0)]
            if what == "parameter":
                values[1] = fwAD.make_dual(values[1], torch.full((4,), 0.5))
            optimizer = getattr(module, name)(values, **options)
            for k in range(3):
                for i, p in enumerate(values):
                    g = torch.linspace(1, 2 + k, p.numel())
                    dual = what == "gradient" or (what == "gradient of one" and i == 1) or (what == "later" and k == 1)
                    p.grad = fwAD.make_dual(g, torch.linspace(1, 2, p.numel())) if dual else g
                optimizer.step()
            tensors = [*values, *(v for s in optimizer.state.values() for v in s.values() if v is not None)]
            return [tuple(fwAD.unpack_dual(t)) for t in tensors]

    ours, theirs = (outcome(lambda module=module: run(module)) for module in (optim, torch.optim))
    if isinstance(theirs, tuple):
        assert ours == theirs
        return
    assert any(t is not None for _, t in theirs)
    for (a, s), (e, t) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)
        assert (s is None) == (t is None), "a tangent was dropped"
        if t is not None:
            torch.testing.assert_close(s, t, equal_nan=True)


@pytest.mark.parametrize("switch", [{}, {"fused": True}, {"foreach": True}], ids=str)
@both_dtypes
@pytest.mark.parametrize("name", FUSED)
def test_step_counts_of_fused_are_float32_whatever_the_default(name: str, dtype: Any, switch: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = (
            stepped(getattr(m, name)(new_parameters((3,), dtype=dtype), **switch)) for m in (optim, torch.optim)
        )
        assert_same_layout(ours.state_dict(), theirs.state_dict())
        if "step" in ours.state_dict()["state"].get(0, {}):
            assert ours.state_dict()["state"][0]["step"].dtype == (
                torch.float32 if "fused" in switch else torch.float64
            )
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize("shared", [False, True])
def test_sparse_gradient_of_a_view_behind_the_start_of_its_storage(name: str, shared: bool) -> None:
    """torch adds it at twice the distance, beyond the end of the memory."""
    found = []
    for view in (True, False):
        memory = new(12, seed=1)
        p = torch.nn.Parameter(new(12, seed=1)[4:8].clone())
        if view:
            p.data = memory[4:8]
        params = [p, torch.nn.Parameter(memory[:6])] if shared and view else [p]
        optimizer = getattr(optim, name)(params, lr=0.5)
        for _ in range(3):
            p.grad = torch.tensor([-2.0, 0, 0, 1]).to_sparse()
            optimizer.step()
        found.append((p.detach().clone(), *(optimizer.state[p][key].clone() for key in optimizer.state[p])))
        assert same_bits(memory[:4], new(12, seed=1)[:4])
        assert same_bits(memory[8:], new(12, seed=1)[8:])
    for a, b in zip(*found, strict=True):
        assert same_bits(a, b)
