"""step(max_norm=, nonfinite=, zero_grad=) of pyopt.torch: for kernels and for what is left to torch alike."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest

import pyopt
from apart import apart
from extras import clip_factor, exact_norm
from test_torch_interruption import ByCall, interrupted
from test_torch_mixed import SPARSE_WARNING, sparse_gradient
from torch_extras import (
    LEFT_TO_TORCH,
    alike,
    arrays,
    as_array,
    cleared,
    every,
    every_dtype,
    few,
    gradient_bits,
    gradients,
    numbers,
    raw,
    set_gradients,
)
from torch_or_skip import new, new_parameters, optim, parameters, torch

BAD = [math.nan, math.inf, -math.inf]
LEFT = [list(LEFT_TO_TORCH), *([kind] for kind in LEFT_TO_TORCH)]
left_to_torch = pytest.mark.parametrize("left", LEFT, ids=lambda kinds: " ".join(kinds))
mixed = pytest.mark.parametrize("name", ["SGD", "Adam", "Lion", "LAMB"])


def exact(opt: Any) -> float:
    return exact_norm([as_array(g) for g in gradients(opt) if g is not None])


# --- max_norm ---------------------------------------------------------------------------------------------------------


@every_dtype
def test_max_norm_is_clipping_before_the_step(name: str, options: Any, dtype: Any) -> None:
    """Gradients stay, parameters and state are those of gradients that were clipped before, in bits."""
    ours, by_hand, by_call = alike(name, options, 3, dtype, steps=1)
    for step, (max_norm, scale) in enumerate([(0.1, 1.0), (1e9, 1.0), (3, 100.0)]):
        set_gradients(ours, by_hand, by_call, seed=step, scale=scale)
        before = gradient_bits(ours)
        ours.step(max_norm=max_norm)
        assert gradient_bits(ours) == before, "a gradient was written"
        assert isinstance(ours.last_grad_norm, float) and ours.last_grad_norm == pytest.approx(exact(ours), rel=1e-13)
        factor = clip_factor(max_norm, ours.last_grad_norm)
        for p in parameters(by_hand):
            p.grad = p.grad * torch.tensor(factor, dtype=p.dtype)
        optim.clip_grad_norm_(parameters(by_call), max_norm)
        for other in (by_hand, by_call):
            other.step()
            assert numbers(ours) == numbers(other)


@left_to_torch
@mixed
def test_max_norm_of_what_is_left_to_torch(name: str, left: list[str]) -> None:
    """One norm for all; each is clipped by it, whoever steps it."""
    ours, by_call = alike(name, {"lr": 0.1}, left=left)
    for step, max_norm in enumerate((0.1, 1e9)):
        set_gradients(ours, by_call, seed=step)
        before = gradient_bits(ours)
        ours.step(max_norm=max_norm)
        assert gradient_bits(ours) == before
        assert ours.last_grad_norm == pytest.approx(exact(ours), rel=1e-2)
        optim.clip_grad_norm_(parameters(by_call), max_norm)
        by_call.step()
        if name == "LAMB":  # its formula for what the kernels leave does not round the clipped gradient to a short type
            torch.testing.assert_close(parameters(ours), parameters(by_call), rtol=1e-2, atol=1e-2)
        else:
            assert numbers(ours) == numbers(by_call)


def test_bits_are_the_numpy_sides() -> None:
    (ours,) = alike("Adam", {"lr": 0.1}, 1, steps=0)
    params = [pyopt.Parameter(as_array(p).copy(), as_array(p.grad).copy()) for p in parameters(ours)]
    theirs = pyopt.Adam([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=0.1)
    for max_norm in (0.1, 1e9):
        ours.step(max_norm=max_norm)
        theirs.step(max_norm=max_norm)
        assert ours.last_grad_norm == theirs.last_grad_norm
        assert [a.tobytes() for a in arrays(ours)] == [p.data.tobytes() for p in params]


@pytest.mark.filterwarnings(SPARSE_WARNING)
def test_max_norm_with_sparse_gradients() -> None:
    """As dense ones, or an error that says so before anything has changed."""
    ours, dense = ([torch.nn.Parameter(p.detach().clone()) for p in new_parameters((5, 4), (6,))] for _ in range(2))
    opts = [optim.SGD(params, lr=0.1) for params in (ours, dense)]
    ours[0].grad, dense[0].grad = sparse_gradient(ours[0]), sparse_gradient(ours[0]).to_dense()
    ours[1].grad = dense[1].grad = new(6)
    before = [raw(p) for p in ours]
    try:
        opts[0].step(max_norm=0.1)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        assert "sparse" in str(error).lower() and [raw(p) for p in ours] == before
    else:
        opts[1].step(max_norm=0.1)
        torch.testing.assert_close(ours, dense)


@few
def test_closures_and_torchs_schedulers(name: str, options: Any) -> None:
    """A scheduler of torch's wraps the step; the extras reach it, and the closure's gradients count."""
    ours, plain = alike(name, options)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in (ours, plain)]
    for step in range(3):

        def closure_of(opt: Any, step: int = step) -> Any:
            def closure() -> Any:
                assert torch.is_grad_enabled()
                set_gradients(opt, seed=step)
                return torch.tensor(3.0)

            return closure

        assert ours.step(closure_of(ours), max_norm=0.5, zero_grad=True) == 3
        assert all(cleared(g) for g in gradients(ours))
        closure_of(plain)()
        optim.clip_grad_norm_(parameters(plain), 0.5)
        plain.step()
        assert numbers(ours) == numbers(plain)
        for scheduler in schedulers:
            scheduler.step()


def test_hooks_see_the_arguments() -> None:
    (opt,) = alike("Adam", {}, 1)
    seen = []
    with (
        opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(kwargs["max_norm"])),
        opt.register_step_post_hook(lambda o, args, kwargs: seen.append(all(map(cleared, gradients(o))))),
    ):
        opt.step(max_norm=0.5, zero_grad=True)
    assert seen == [0.5, True]


# --- under a GradScaler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [[], ["not dense"], ["shared memory"]], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "Lion"])
def test_under_a_scaler(name: str, left: list[str]) -> None:
    """fused=True: divided, measured and clipped in the step; the norm is that of the divided gradients."""
    options = {"lr": 0.1} if name == "Lion" else {"lr": 0.1, "fused": True}
    ours, plain = alike(name, options, left=left)
    average = pyopt.averaging.EMA(ours, decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for step in range(4):
        set_gradients(ours, plain, seed=step)
        expected = exact(plain)
        for p in parameters(ours):
            p.grad *= 1024
        if step == 2:
            parameters(ours)[-1].grad.view(-1)[3] = math.inf
        before, n = numbers(ours), average.n_averaged
        scaler.step(ours, max_norm=0.1, zero_grad=True)
        if step == 2:
            assert numbers(ours) == before and average.n_averaged == n
            scaler.update(1024.0)
            continue
        scaler.update(1024.0)
        assert average.n_averaged == n + 1
        assert all(cleared(g) for g in gradients(ours))
        assert ours.last_grad_norm == pytest.approx(expected, rel=1e-13 if not left else 1e-6)
        plain.step(max_norm=0.1)
        assert numbers(ours) == numbers(plain)


# --- nonfinite --------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
def test_raise_and_skip_change_nothing(name: str, options: Any, steps: int) -> None:
    """Then the steps are those of an optimizer that never saw such gradients."""
    ours, never = alike(name, options, steps=steps)
    for count, (bad, where) in enumerate(itertools.product(BAD, (0, -1)), 1):
        parameters(ours)[where].grad.view(-1)[-1] = bad
        before, grads = numbers(ours), gradient_bits(ours)
        with pytest.raises(ValueError, match=f"parameter {where % len(parameters(ours))}\\b.*gradient"):
            ours.step(nonfinite="raise")
        ours.step(nonfinite="skip", max_norm=0.5)
        assert (numbers(ours), gradient_bits(ours), ours.skipped_steps) == (before, grads, count)
        assert not math.isfinite(ours.last_grad_norm)
        set_gradients(ours)
    for step in range(3):
        set_gradients(ours, never, seed=step)
        ours.step(nonfinite="skip")
        never.step()
        assert numbers(ours) == numbers(never)


@left_to_torch
@mixed
def test_what_is_left_to_torch_is_looked_at(name: str, left: list[str]) -> None:
    """A NaN there stops all the others, and one with the others stops it."""
    ours, never = alike(name, {"lr": 0.1}, left=left)
    for where in (0, 1, -1):
        parameters(ours)[where].grad[..., 0] = math.nan
        before = numbers(ours)
        with pytest.raises(ValueError, match=f"parameter {where % len(parameters(ours))}\\b"):
            ours.step(nonfinite="raise")
        ours.step(nonfinite="skip")
        assert numbers(ours) == before
        set_gradients(ours, never)
        ours.step(nonfinite="skip")
        never.step()
        assert numbers(ours) == numbers(never)


def test_names_of_parameters() -> None:
    model = torch.nn.Linear(2, 3)
    opt = optim.SGD(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    model.bias.grad[1] = math.inf
    with pytest.raises(ValueError, match=r"bias.*gradient"):
        opt.step(nonfinite="raise")


# --- zero_grad --------------------------------------------------------------------------------------------------------


@every
def test_zero_grad_in_the_pass(name: str, options: Any) -> None:
    """The very tensors are zeros, and set_to_none drops them; the step is that without."""
    ours, plain = alike(name, options)
    tensors = gradients(ours)
    ours.step(zero_grad=True)
    plain.step()
    assert numbers(ours) == numbers(plain)
    assert all(p.grad is g and cleared(g) for p, g in zip(parameters(ours), tensors, strict=True))
    set_gradients(ours, plain, seed=3)
    tensors, before = gradients(ours), gradient_bits(ours)
    ours.step(max_norm=0.1, zero_grad="set_to_none")
    plain.step(max_norm=0.1)
    assert numbers(ours) == numbers(plain)
    assert gradients(ours) == [None] * len(tensors) and [raw(g) for g in tensors] == before


@left_to_torch
@mixed
def test_zero_grad_of_what_is_left_to_torch(name: str, left: list[str]) -> None:
    ours, plain = alike(name, {"lr": 0.1}, left=left)
    tensors = gradients(ours)
    for _ in range(2):
        ours.step(zero_grad=True, max_norm=0.3)
        plain.step(max_norm=0.3)
        assert numbers(ours) == numbers(plain)
        assert all(p.grad is g and cleared(g) for p, g in zip(parameters(ours), tensors, strict=True))
        for p, q in zip(parameters(ours), parameters(plain), strict=True):
            p.grad += q.grad


def gradient_of(p: Any, kind: str, others: list[Any]) -> tuple[Any, bool]:
    """A gradient of a (4, 6) parameter, and whether it can be cleared in place."""
    g = new(4, 6, seed=9)
    if kind == "expanded":
        return new(6, seed=9).expand(4, 6), False
    if kind == "transposed":
        return g.t().contiguous().t(), True
    if kind == "every other":
        return torch.stack([g, g], -1)[..., 0], True
    if kind == "its own parameter":
        return p.detach(), False
    if kind == "another parameter":
        return others[0].detach(), False
    if kind == "another's gradient":
        return others[0].grad, False
    if kind == "part of another's gradient":
        others[0].grad = new(6, 6, seed=9)[:4]
        return others[0].grad._base[2:], False
    raise AssertionError(kind)


GRADIENTS = ["expanded", "transposed", "every other", "its own parameter", "another parameter"]
GRADIENTS += ["another's gradient", "part of another's gradient"]


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("name", ["SGD", "Adam", "LAMB", "Adafactor", "Lion"])
def test_zero_grad_of_other_gradients(name: str, kind: str) -> None:
    """What cannot be cleared alone becomes None; the step is that of copies."""
    opts = [getattr(optim, name)(new_parameters((4, 6), (4, 6), (5,)), lr=0.1) for _ in range(2)]
    set_gradients(*opts)
    ours, plain = opts
    p, *others = parameters(ours)
    p.grad, in_place = gradient_of(p, kind, others)
    for q, g in zip(parameters(plain), gradients(ours), strict=True):
        q.grad = g.clone(memory_format=torch.contiguous_format)
    tensors = gradients(ours)
    ours.step(zero_grad=True, max_norm=1.0)
    plain.step(max_norm=1.0)
    if "parameter" in kind:  # torch's own step, whose bits are others
        torch.testing.assert_close(parameters(ours), parameters(plain))
    else:
        assert numbers(ours) == numbers(plain)
    dropped = {0} if not in_place else set()
    if "another's" in kind:
        dropped.add(1)
    for i, (q, g) in enumerate(zip(parameters(ours), tensors, strict=True)):
        assert q.grad is None if i in dropped else (q.grad is g and cleared(g)), f"parameter {i}"


@pytest.mark.filterwarnings(SPARSE_WARNING)
def test_zero_grad_of_sparse_gradients() -> None:
    ours, plain = (optim.SGD(new_parameters((5, 4), (6,)), lr=0.1) for _ in range(2))
    for opt in (ours, plain):
        set_gradients(opt)
        parameters(opt)[0].grad = sparse_gradient(parameters(opt)[0])
    ours.step(zero_grad=True)
    plain.step()
    assert numbers(ours) == numbers(plain)
    assert parameters(ours)[0].grad is None and cleared(parameters(ours)[1].grad)


def test_backward_accumulates_after_it() -> None:
    """A model trained with it is one trained with zero_grad(), and backward writes into the tensors that stay."""
    models = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, plain = (optim.AdamW(model.parameters(), lr=0.1) for model in models)
    tensors = []
    for step in range(6):
        for model in models:
            for part in range(2):
                model(new(8, 4, seed=10 * step + part)).square().mean().backward()
        ours.step(zero_grad=True, max_norm=0.5)
        plain.step(max_norm=0.5)
        plain.zero_grad(set_to_none=False)
        assert numbers(ours) == numbers(plain)
        tensors.append(gradients(ours))
        assert all(a is b and cleared(a) for a, b in zip(tensors[0], tensors[-1], strict=True))


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True:UserWarning")
def test_gradients_with_history() -> None:
    """Of create_graph=True: cleared as torch's zero_grad(set_to_none=False) does it, without their history."""
    grads = []
    for ours in (True, False):
        p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        opt = optim.SGD([p], lr=0.1)
        p.pow(3).sum().backward(create_graph=True)
        assert p.grad.requires_grad
        opt.step(max_norm=1.0, zero_grad=ours)
        if not ours:
            opt.zero_grad(set_to_none=False)
        assert not p.grad.requires_grad and p.grad.grad_fn is None and cleared(p.grad)
        (p * 2).sum().backward()
        grads.append(p.grad.tolist())
    assert grads[0] == grads[1] == [2.0, 2.0]


def test_a_graph_that_needs_the_gradient_notices() -> None:
    p = torch.nn.Parameter(new(50))
    opt = optim.SGD([p], lr=0.1)
    p.grad = new(50, seed=1)
    w = torch.ones(50, requires_grad=True)
    loss = (w * p.grad).sum()
    opt.step(zero_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["SGD", "Adam", "LAMB"])
def test_gradients_that_are_views_of_one_buffer(name: str) -> None:
    """As DDP's buckets: they stay views of it, and it is zeros."""
    ours, plain = (getattr(optim, name)(new_parameters((5, 4), (7,), (), (30, 40)), lr=0.1) for _ in range(2))
    flat = new(sum(p.numel() for p in parameters(ours)))
    begin = 0
    for p, q in zip(parameters(ours), parameters(plain), strict=True):
        p.grad = flat[begin : begin + p.numel()].view(p.shape)
        q.grad = p.grad.clone()
        begin += p.numel()
    views = gradients(ours)
    ours.step(max_norm=0.5, zero_grad=True)
    plain.step(max_norm=0.5)
    assert numbers(ours) == numbers(plain) and cleared(flat)
    flat += 1
    assert all(p.grad is g and (g == 1).all() for p, g in zip(parameters(ours), views, strict=True))


def test_zero_grad_with_what_is_not_finite() -> None:
    for nonfinite in ("apply", "skip", "raise"):
        (opt,) = alike("Adam", {}, 1)
        parameters(opt)[0].grad[0, 0] = math.nan
        before = gradient_bits(opt)
        if nonfinite == "raise":
            with pytest.raises(ValueError, match="parameter 0"):
                opt.step(nonfinite="raise", zero_grad=True)
            assert gradient_bits(opt) == before
        else:
            opt.step(nonfinite=nonfinite, zero_grad=True)
            assert all(cleared(g) for g in gradients(opt))


# --- the rest ---------------------------------------------------------------------------------------------------------


@few
def test_wrong_arguments(name: str, options: Any) -> None:
    (opt,) = alike(name, options, 1)
    before = numbers(opt), gradient_bits(opt)
    called: list[int] = []
    for argument, value in [
        *(("max_norm", value) for value in (0.0, -1.0, math.nan, "1", True, [1.0])),
        *(("nonfinite", value) for value in ("stop", None, True)),
        *(("zero_grad", value) for value in ("none", None, 1)),
    ]:
        with pytest.raises((TypeError, ValueError), match=re.escape(f"{argument} == {value!r}, must be")):
            opt.step(lambda: called.append(1), **{argument: value})
    with pytest.raises(TypeError, match="positional"):
        opt.step(None, 1.0)
    with pytest.raises(TypeError, match="grads"):
        opt.step(grads=[])
    assert (numbers(opt), gradient_bits(opt)) == before and not called


@every
def test_state_dicts_are_torchs(name: str, options: Any) -> None:
    ours, plain = alike(name, options)
    ours.step(max_norm=1e9, nonfinite="skip", zero_grad=True)
    plain.step()
    saved, expected = ours.state_dict(), plain.state_dict()
    assert list(saved) == list(expected) and numbers(ours) == numbers(plain)
    assert {i: list(s) for i, s in saved["state"].items()} == {i: list(s) for i, s in expected["state"].items()}
    assert saved["param_groups"] == expected["param_groups"]


def test_counts_and_copies() -> None:
    (opt,) = alike("Adam", {}, 1)
    assert opt.last_grad_norm is None and opt.skipped_steps == 0
    opt.step()
    assert opt.last_grad_norm is None
    parameters(opt)[0].grad[0, 0] = math.nan
    opt.step(nonfinite="skip")
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        set_gradients(other)
        other.step(max_norm=1.0)
        assert math.isfinite(other.last_grad_norm) and opt.skipped_steps == 1
    opt.skipped_steps = 0
    opt.step()
    assert opt.last_grad_norm is None and opt.skipped_steps == 0


@apart
@pytest.mark.parametrize("case", ["good", "skipped"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "LAMB"])
def test_interrupted_at_any_call(name: str, case: str) -> None:
    """What the kernels step is as before or as after it, together with its gradients."""
    extras = {"max_norm": 0.5, "nonfinite": "skip", "zero_grad": True}

    def made() -> Any:
        (opt,) = alike(name, {"lr": 0.1}, 1)
        if case == "skipped":
            parameters(opt)[0].grad[0, 0] = math.nan
        return opt

    def found(opt: Any) -> Any:
        return numbers(opt), gradient_bits(opt), opt.skipped_steps

    whole = made()
    shots = [found(whole)]
    whole.step(**extras)
    shots.append(found(whole))
    counts = [0, 0]
    for n in itertools.count(1):
        opt = made()
        reached = interrupted(SimpleNamespace(step=lambda: opt.step(**extras)), ByCall(n))  # noqa: B023
        now = found(opt)
        assert now in shots, f"half a step at event {n}"
        counts[shots.index(now)] += 1
        if not reached:
            break
    assert all(counts)


@pytest.mark.parametrize("name", ["SGD", "Adam", "LAMB", "Adafactor", "Lion"])
def test_gradient_factor_is_a_multiple_of_the_gradients(name: str) -> None:
    ours, plain = alike(name, {"lr": 0.1})
    for step in range(3):
        set_gradients(ours, plain, seed=step)
        for p in parameters(plain):
            p.grad = p.grad * 0.25
        ours.step(gradient_factor=0.25, max_norm=0.5)
        plain.step(max_norm=0.5)
        assert numbers(ours) == numbers(plain)
