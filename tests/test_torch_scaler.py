"""pyopt.torch under torch.amp.GradScaler: unscaled in the pass, skipped where a gradient is not finite."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest

from test_torch_mixed import SPARSE_WARNING, mixed, mixed_gradients, uncovered_of
from torch_or_skip import FIVE, Twins, brief, optim, parameters, random_gradients, same_bits, small, torch

from torch.optim.optimizer import register_optimizer_step_pre_hook  # isort: skip


class Scaled:
    """An optimizer with a scaler of its own, and its steps on given unscaled gradients."""

    def __init__(self, optimizer: Any, scale: float) -> None:
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)

    def step(self, grads: list[Any], unscale_first: bool) -> None:
        scale = self.scaler.scale(torch.ones(()))
        for p, g in zip(parameters(self.optimizer), grads, strict=True):
            p.grad = None if g is None else g * scale.to(g.dtype)
        if unscale_first:
            self.scaler.unscale_(self.optimizer)
        before = [None if p.grad is None else p.grad.clone() for p in parameters(self.optimizer)]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.untouched = all(
            b is None or same_bits(p.grad, b) for p, b in zip(parameters(self.optimizer), before, strict=True)
        )


def assert_scaler_agrees(twins: Twins, make_grads: Callable[[int], list[Any]], scale: float) -> None:
    in_the_pass = getattr(twins.ours, "_step_supports_amp_scaling", False)
    ours, theirs = (Scaled(optimizer, scale) for optimizer in twins)
    for step in range(8):
        before = [p.detach().clone() for p in parameters(twins.ours)]
        counts = [s["step"].item() for s in twins.ours.state.values() if "step" in s]
        for side in (ours, theirs):
            side.step(make_grads(step), unscale_first=step == 5)
        assert ours.untouched or not in_the_pass, "a gradient was written"
        assert ours.scaler.get_scale() == theirs.scaler.get_scale()
        assert not hasattr(twins.ours, "grad_scale") and not hasattr(twins.ours, "found_inf")
        if step in SPOILED:
            assert all(same_bits(p, b) for p, b in zip(parameters(twins.ours), before, strict=True))
            assert [s["step"].item() for s in twins.ours.state.values() if s.get("step")] == [c for c in counts if c]
        if step:  # a first step that is skipped may leave state at zero
            twins.steps += 1
            twins.check()


SPOILED = {0: float("inf"), 3: float("nan"), 6: -float("inf")}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [65536.0, 3.0])
@brief
def test_grad_scaler(name: str, options: dict[str, Any], scale: float, fused: bool) -> None:
    """Steps with an inf are skipped and not counted, the first among them; the pass leaves scaled gradients alone."""
    if fused and name == "RMSprop":
        return
    twins = Twins(name, small, {**options, "fused": True} if fused else options, options)
    assert getattr(twins.ours, "_step_supports_amp_scaling", False) == fused

    def grads(step: int) -> list[Any]:
        values = random_gradients(twins.theirs, torch.Generator().manual_seed(step))
        if step in SPOILED:
            values[1][3] = SPOILED[step]
        return values

    assert_scaler_agrees(twins, grads, scale)


def test_fused_unscales_in_the_pass() -> None:
    """Only where the user asked for it, as in torch: the scaler unscales for the others, and for a copy."""
    optimizer = optim.Adam(small(), fused=True)
    for o in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), optim.Adam(small())):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        for p in parameters(o):
            p.grad = torch.full_like(p, 8.0)
        scaler.step(o)
        assert all((p.grad == (8 if o is optimizer else 1)).all() for p in parameters(o))
        assert all(torch.allclose(o.state[p]["exp_avg"], torch.tensor(0.1)) for p in parameters(o))


def test_grad_scaler_with_lion() -> None:
    """torch has none to compare with: the scale is a power of two, so the bits are those without a scaler."""
    scaled, plain = optim.Lion(small(), weight_decay=0.1), optim.Lion(small(), weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for step in range(4):
        for p, q, g in zip(parameters(scaled), parameters(plain), small(), strict=True):
            p.grad, q.grad = g.detach() * 8, g.detach()
        if step == 1:
            parameters(scaled)[2].grad.fill_(float("inf"))
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update(8.0)
    for p, q in zip(parameters(scaled), parameters(plain), strict=True):
        assert same_bits(p, q) and same_bits(scaled.state[p]["exp_avg"], plain.state[q]["exp_avg"])


@pytest.mark.filterwarnings(SPARSE_WARNING)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_mixed_model_with_grad_scaler(name: str, fused: bool) -> None:
    """Unscale and skip reach the parameters that go to torch as well."""
    what = [
        w for w in uncovered_of(name) if w not in ("complex", "float16", "wrapper", "subclass", "subclass of gradient")
    ]
    if fused:
        what.remove("bfloat16")  # other bits than those of the for-loop
    twins = Twins(name, mixed(what), {"lr": 0.1, "fused": fused}, {"lr": 0.1})

    def grads(step: int) -> list[Any]:
        values = [g.clone() for g in mixed_gradients(what, twins.theirs)]
        if step in SPOILED:
            values[0][0] = SPOILED[step]
        return values

    assert_scaler_agrees(twins, grads, 64.0)


def clip(optimizer: Any, *_: Any) -> None:
    torch.nn.utils.clip_grad_norm_(parameters(optimizer), 1.0)


def with_pre_hook(module: Any) -> Callable[[Any], Any]:
    def build(params: Any) -> Any:
        optimizer = module.SGD(params, lr=0.1)
        optimizer.register_step_pre_hook(clip)
        return optimizer

    return build


def with_global_hook(module: Any) -> Callable[[Any], Any]:
    return lambda params: module.SGD(params, lr=0.1)


def with_own_step(module: Any) -> Callable[[Any], Any]:
    class Clipping(module.SGD):  # type: ignore[name-defined,misc]
        def step(self, closure: Any = None) -> Any:
            clip(self)
            return super().step(closure)

    return lambda params: Clipping(params, lr=0.1)


def with_patched_step(module: Any) -> Callable[[Any], Any]:
    def build(params: Any) -> Any:
        optimizer = module.SGD(params, lr=0.1)
        step = optimizer.step
        optimizer.step = lambda: (clip(optimizer), step())
        return optimizer

    return build


@pytest.mark.parametrize("build", [with_pre_hook, with_global_hook, with_own_step, with_patched_step])
def test_who_looks_at_gradients_sees_them_unscaled(build: Any) -> None:
    """Hooks and steps of the user's own: the scaler unscales, and an inf skips them."""
    handle = register_optimizer_step_pre_hook(clip) if build is with_global_hook else None
    results = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = build(module)([p])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            loss = (p * p * 3).sum() * (float("inf") if step == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(p.detach())
    if handle is not None:
        handle.remove()
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def test_scheduler_leaves_the_unscaling_to_the_pass() -> None:
    """It wraps the step of the optimizer."""
    optimizer = optim.SGD([torch.nn.Parameter(torch.ones(3))], fused=True)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" in vars(optimizer) and optimizer._step_supports_amp_scaling


# --- what a scaler leaves on the optimizer ----------------------------------------------------------------------------


def test_wrapped_step_sees_gradients_unscaled() -> None:
    """A wrapper that clips, by functools.wraps, and one around a fused step, which as in torch sees the scale."""
    for fused, moved in ((False, [-0.6, -0.8]), (True, [-0.6 / 1024, -0.8 / 1024])):
        w = torch.nn.Parameter(torch.zeros(2))
        optimizer = optim.SGD([w], lr=1.0, fused=fused)
        step = optimizer.step

        @functools.wraps(step)
        def clipped(*args: Any, step: Any = step, w: Any = w, **kwargs: Any) -> Any:
            torch.nn.utils.clip_grad_norm_([w], 1.0)
            return step(*args, **kwargs)

        optimizer.step = clipped
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale((w * torch.tensor([3.0, 4.0])).sum()).backward()
        scaler.step(optimizer)
        torch.testing.assert_close(w.detach(), torch.tensor(moved))


def test_frameworks_may_clip() -> None:
    """Lightning refuses to where an optimizer says that it unscales by itself."""
    for name in FIVE:
        assert not getattr(getattr(optim, name)(small()), "_step_supports_amp_scaling", False)


def raising(how: str, o: Any) -> None:
    """Make the next step of an optimizer raise."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if how == "pre hook":
        o.register_step_pre_hook(interrupt)
    elif how == "post hook":
        o.register_step_post_hook(interrupt)
    elif how == "wrapper":
        o.step = functools.wraps(o.step)(interrupt)
    elif how == "group":
        o.param_groups[0]["lr"] = "fast"


@pytest.mark.parametrize("how", ["pre hook", "post hook", "wrapper", "group"])
def test_what_raises_leaves_no_scale(how: str) -> None:
    """A later step without a scaler is not divided by the scale, nor is it in that of the next with one."""
    p = torch.nn.Parameter(torch.zeros(3))
    o = optim.SGD([p], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    p.grad = torch.full((3,), 1024.0)
    raising(how, o)
    with pytest.raises((KeyboardInterrupt, TypeError)):
        scaler.step(o)
    assert not hasattr(o, "grad_scale") and not hasattr(o, "found_inf")
    o._optimizer_step_pre_hooks.clear()
    o._optimizer_step_post_hooks.clear()
    o.param_groups[0]["lr"] = 1.0
    o.__dict__.pop("step", None)
    with torch.no_grad():
        p.zero_()
    p.grad = torch.ones(3)
    o.step()
    assert p.tolist() == [-1.0] * 3
    p.grad = torch.full((3,), 1024.0)
    scaler.update()
    scaler.scale(torch.ones(()))
    scaler.step(o)
    assert p.tolist() == [-2.0] * 3


def test_interrupt_at_every_call_within_a_scalers_step() -> None:
    """Also between the scaler's own lines: where it has set the scale and the step has not begun, or is over."""
    points, interrupted = 0, 0
    while True:
        p = torch.nn.Parameter(torch.zeros(3))
        o = optim.SGD([p], lr=1.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        p.grad = torch.zeros(3)
        o.step()
        p.grad = torch.full((3,), 1024.0)
        points += 1
        left = points

        def interrupt(frame: Any, event: str, argument: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return interrupt

        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            scaler.step(o)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # torch.no_grad() may have been interrupted on its way out
        if left > 0:
            break
        assert not hasattr(o, "grad_scale") and not hasattr(o, "found_inf")
        with torch.no_grad():
            p.zero_()
        p.grad = torch.ones(3)
        o.step()
        assert p.tolist() == [-1.0] * 3, points
    assert interrupted > 50


def test_scale_of_the_users_own_stays() -> None:
    """As in torch, until it is deleted."""
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.zeros(3))
        o = module.SGD([p], lr=1.0, fused=True)
        o.grad_scale, o.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        for moved in (-1, -2):
            p.grad = torch.full((3,), 4.0)
            o.step()
            assert p.tolist() == [moved] * 3
        o.found_inf = torch.tensor(1.0)
        o.step()
        assert p.tolist() == [-2] * 3
        del o.grad_scale, o.found_inf
        assert not hasattr(o, "grad_scale") and not hasattr(o, "found_inf")
