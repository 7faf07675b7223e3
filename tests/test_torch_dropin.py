"""pyopt.torch in the places where people use torch.optim: numbers, layouts, autograd, mixed models, copies, hooks."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import subprocess
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cases import BRIEF as NUMPY_BRIEF
from cases import CASES, SIZES, Case, assert_same_bits, gradients
from cases import DTYPES as NUMPY_DTYPES
from cases import parameters as numpy_parameters
from torch_or_skip import (
    BRIEF,
    BRIEF_IDS,
    FIVE,
    Twins,
    assert_same_layout,
    optim,
    outcome,
    parameters,
    random_gradients,
    same_bits,
    torch,
)

from pyopt.torch._tensors import use_exchange_api  # isort: skip
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook  # isort: skip

DTYPES = [torch.float32, torch.float64]
brief = pytest.mark.parametrize(("name", "options"), BRIEF, ids=BRIEF_IDS)
each = pytest.mark.parametrize("name", FIVE)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def new(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def new_parameters(*shapes: tuple[int, ...], dtype: Any = torch.float32) -> list[Any]:
    return [torch.nn.Parameter(new(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]


def small() -> list[Any]:
    return new_parameters((5, 4), (7,), ())


# --- the numbers ------------------------------------------------------------------------------------------------------


def assert_same_as_numpy(case: Case, shapes: list[Any], dtype: Any, steps: int) -> None:
    arrays = numpy_parameters(shapes, dtype)
    tensors = [torch.tensor(p.data) for p in arrays]
    theirs = case.optimizer(arrays, **case.options)
    ours = getattr(optim, case.optimizer.__name__)(tensors, **case.options)
    rng = np.random.default_rng(1)
    for _ in range(steps):
        for p, t, g in zip(arrays, tensors, gradients(arrays, rng), strict=True):
            p.grad, t.grad = g, torch.tensor(g)
        theirs.step()
        ours.step()
    for i, (p, t) in enumerate(zip(arrays, tensors, strict=True)):
        assert_same_bits(t.numpy(), p.data, f"{case}: parameter {i}")
        assert list(ours.state.get(t, {})) == list(theirs.state.get(p, {}))
        for name, value in theirs.state.get(p, {}).items():
            if name == "step":
                assert ours.state[t][name].item() == value
            else:
                assert_same_bits(ours.state[t][name].numpy(), value, f"{case}: {name} of parameter {i}")


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_the_numpy_side(case: Case, dtype: Any) -> None:
    assert_same_as_numpy(case, [(), (1,), (0,), (17,), (33, 31), (4099,)], dtype, 5)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("case", NUMPY_BRIEF, ids=str)
def test_bits_of_the_numpy_side_at_every_size(case: Case, dtype: Any) -> None:
    assert_same_as_numpy(case, SIZES, dtype, 2)


@both_dtypes
@brief
def test_sizes(name: str, options: dict[str, Any], dtype: Any) -> None:
    """Every width of a vector, more and less, aligned and not; no gradient is zero."""

    def build() -> list[Any]:
        whole = [new(size + 1, dtype=dtype, seed=size) for size in SIZES]
        return [torch.nn.Parameter(t[1:] if i % 2 else t[:-1]) for i, t in enumerate(whole)]

    Twins(name, build, options).run(2)


def test_lion() -> None:
    """A subclass of torch's base; the rule, the state and the defaults of pyopt.Lion."""
    assert issubclass(optim.Lion, torch.optim.Optimizer) and optim.Lion.__name__ == "Lion"
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = optim.Lion([p], lr=0.5)
    p.grad = torch.tensor([0.1, -20.0, 0.0])
    optimizer.step()
    assert p.tolist() == [0.5, 1.5, 1.0] and list(optimizer.state[p]) == ["exp_avg"]
    arguments = {k: v.default for k, v in inspect.signature(optim.Lion).parameters.items() if k != "params"}
    assert arguments == {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0, "maximize": False}
    assert inspect.signature(optim.Lion).parameters["maximize"].kind is inspect.Parameter.KEYWORD_ONLY
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError):
            optim.Lion([p], **bad)
    torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    again = optim.Lion([p])
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.5 and torch.equal(again.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
    assert repr(pickle.loads(pickle.dumps(optimizer))) == repr(optimizer)


# --- layouts ----------------------------------------------------------------------------------------------------------
# Each makes a tensor of the same values in another memory order; `base` is the storage behind it.

SHAPE = (4, 6, 5, 7)


def inside(shape: tuple[int, ...], index: Any) -> Callable[[Any], Any]:
    """The values in a part of a larger tensor, of which the rest holds 99."""

    def make(values: Any) -> Any:
        base = torch.full(shape, 99.0, dtype=values.dtype)
        base[index].copy_(values)
        return base[index]

    return make


def strided(strides: tuple[int, ...], offset: int = 0) -> Callable[[Any], Any]:
    def make(values: Any) -> Any:
        base = torch.full((offset + 1 + sum((n - 1) * s for n, s in zip(SHAPE, strides, strict=True)),), 99.0)
        view = base.to(values.dtype).as_strided(SHAPE, strides, offset)
        return view.copy_(values)

    return make


DENSE: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda v: v.contiguous(),
    "transposed": lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
    "F-ordered": lambda v: v.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
    "permuted": strided((5, 140, 1, 20), 3),
    "misaligned": strided((210, 35, 7, 1), 1),
}
NON_DENSE: dict[str, Callable[[Any], Any]] = {
    "last of pairs": inside((*SHAPE, 2), (..., 1)),
    "first of many": inside((*SHAPE, 33), (..., 0)),
    "every second": inside((2 * SHAPE[0], *SHAPE[1:]), slice(None, None, 2)),
    "inner rows": inside((4, 6, 7, 7), (slice(None), slice(None), slice(1, -1))),
    "inner columns": inside((4, 6, 5, 10), (..., slice(2, 9))),
    "holes": strided((211, 35, 7, 1)),
    "F-ordered with holes": strided((2, 9, 60, 310), 5),
}


def unaligned(values: Any) -> Any:
    buffer = bytearray(3) + values.contiguous().numpy().tobytes()
    return torch.frombuffer(buffer, dtype=values.dtype, offset=3).view(SHAPE)


ODD: dict[str, Callable[[Any], Any]] = {
    "negative bit": lambda v: torch._neg_view(v.neg()),  # a real tensor whose memory has the other sign
    "unaligned": unaligned,
    "copy on write": lambda v: torch._lazy_clone(v.clone()),
}
LAYOUTS = {**DENSE, **NON_DENSE, **ODD}
# Gradients that stand for more values than their memory holds. Each gives its own values.
GRADIENTS: dict[str, Callable[[Any], Any]] = {
    "expanded scalar": lambda v: v[0, 0, 0, 0].expand(SHAPE),
    "expanded rows": lambda v: v[:1].expand(SHAPE),
    "expanded columns": lambda v: v[..., :1].expand(SHAPE),
    "expanded middle": lambda v: v[:, :1].expand(SHAPE),
    "overlapping windows": lambda v: v.flatten().as_strided(SHAPE, (3, 2, 1, 1)),
    "requires grad": lambda v: v.clone().requires_grad_(),
    "parameter": lambda v: torch.nn.Parameter(v.clone()),
}


def one(layout: Callable[[Any], Any], dtype: Any) -> Callable[[], Any]:
    return lambda: [torch.nn.Parameter(layout(new(*SHAPE, dtype=dtype)))]


def base_of(tensor: Any) -> Any:
    """All the memory of which the tensor is a view."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def outside(tensor: Any) -> Any:
    """The elements of its memory that are not the tensor's."""
    mask = torch.ones_like(base_of(tensor), dtype=torch.bool)
    mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    return base_of(tensor)[mask]


@both_dtypes
@brief
def test_layouts(name: str, options: dict[str, Any], dtype: Any) -> None:
    """Every layout of a parameter with every one of a gradient, against torch's for-loop; nothing else is written."""
    names = [(p, g) for p in LAYOUTS for g in (*LAYOUTS, *GRADIENTS)]
    twins = Twins(name, lambda: [one(LAYOUTS[p], dtype)()[0] for p, _ in names], options)
    for (p, _), q in zip(names, parameters(twins.ours), strict=True):
        assert outside(q).numel() > 0 if p in NON_DENSE else outside(q).numel() < 5, p
    layouts = {**LAYOUTS, **GRADIENTS}
    for step in range(3):
        values = new(*SHAPE, dtype=dtype, seed=step + 1).abs() + 0.5  # more than the decay, against cancellation
        twins.step([layouts[g](values) for _, g in names])
    for q in parameters(twins.ours):
        assert (outside(q) == 99).all()


def test_layouts_of_lion() -> None:
    """What its kernel does not cover takes a loop in Python; no gradient has the momentum cancel."""
    params = [one(layout, torch.float32)()[0] for layout in LAYOUTS.values() for _ in LAYOUTS]
    optimizer = optim.Lion(params, lr=0.01, weight_decay=0.1)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = list(LAYOUTS.values())[i % len(LAYOUTS)](new(*SHAPE, seed=step).abs() + 0.5)
        optimizer.step()
    for p in params:
        torch.testing.assert_close(p, params[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p], optimizer.state[params[0]], rtol=1e-6, atol=1e-6)
        assert (outside(p) == 99).all()


@pytest.fixture(params=[True, False], ids=["exchange_api", "data_ptr"])
def exchange_api(request: pytest.FixtureRequest) -> Iterator[None]:
    assert use_exchange_api(request.param) == request.param
    yield
    assert use_exchange_api(True)


@pytest.mark.usefixtures("exchange_api")
@brief
def test_layout_does_not_change_bits(name: str, options: dict[str, Any]) -> None:
    """Whatever the memory order of a dense parameter and of a gradient, the result is that of contiguous ones."""
    layouts = list(LAYOUTS.values())
    params = [torch.nn.Parameter(layout(new(*SHAPE))) for layout in DENSE.values() for _ in layouts]
    optimizer = getattr(optim, name)(params, **options)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = layouts[i % len(layouts)](new(*SHAPE, seed=step + 1))
        optimizer.step()
    for p in params:
        assert same_bits(p, params[0])
        for key, value in optimizer.state.get(p, {}).items():
            assert same_bits(value, optimizer.state[params[0]][key]), key


FUSED_IS_WRONG = [
    ("contiguous", "F-ordered"),
    ("F-ordered", "contiguous"),
    ("contiguous", "expanded rows"),
    ("first of many", "contiguous"),
]


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
@pytest.mark.parametrize(("parameter", "gradient"), FUSED_IS_WRONG, ids=lambda x: x.replace(" ", "_"))
def test_where_fused_is_wrong(name: str, parameter: str, gradient: str) -> None:
    """torch's fused kernels walk the memory and ignore strides. When this fails, torch has mended them."""
    values = {}
    for impl, module, switch in (
        ("ours", optim, {"fused": True}),
        ("loop", torch.optim, {}),
        ("fused", torch.optim, {"fused": True}),
    ):
        (p,) = one(LAYOUTS[parameter], torch.float32)()
        g = {**LAYOUTS, **GRADIENTS}[gradient](new(*SHAPE, seed=1))
        # Room for the walk past the gradient's memory.
        if gradient == "expanded rows":
            g = torch.cat([g[0], torch.zeros(SHAPE[1:]).repeat(4, 1, 1)])[: SHAPE[1]].expand(SHAPE)
        p.grad = g
        getattr(module, name)([p], lr=0.1, **switch).step()
        values[impl] = (p.detach().clone(), outside(p).clone())
    torch.testing.assert_close(values["ours"][0], values["loop"][0], rtol=1e-6, atol=1e-6)
    assert (values["ours"][1] == 99).all() and (values["loop"][1] == 99).all()
    assert not torch.allclose(values["fused"][0], values["loop"][0], atol=1e-3)
    if parameter == "first of many":
        assert (values["fused"][1] != 99).any(), "fused has written outside of its parameter"


def test_where_fused_sgd_is_wrong_in_bfloat16() -> None:
    """torch 2.13 does not update whole vectors of bfloat16; ours does what its for-loop does."""
    results = []
    for module, switch in ((optim, {"fused": True}), (torch.optim, {}), (torch.optim, {"fused": True})):
        p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        module.SGD([p], lr=0.5, **switch).step()
        results.append(p.detach())
    ours, loop, fused = results
    assert torch.equal(ours, loop) and not torch.equal(fused, loop)


@each
def test_empty_and_strange_strides(name: str) -> None:
    """Dimensions of one element, or of none, with strides that mean nothing."""

    def build() -> list[Any]:
        return [
            torch.nn.Parameter(torch.ones(12).as_strided((3, 1, 4), (4, 77, 1))),
            torch.nn.Parameter(torch.ones(12).as_strided((1, 12), (0, 1))),
            torch.nn.Parameter(torch.empty(0).as_strided((0, 5), (9, 0))),
            torch.nn.Parameter(torch.ones(())),
            torch.nn.Parameter(torch.ones(1).as_strided((1, 1), (5, 9))),
        ]

    grads = [torch.arange(2.0, 14).as_strided((3, 1, 4), (4, 0, 1)), torch.arange(1.0, 13).as_strided((1, 12), (99, 1))]
    grads += [torch.empty(0, 5), torch.tensor(3.0), torch.tensor([[2.0]]).as_strided((1, 1), (0, 0))]
    twins = Twins(name, build)
    twins.step(grads)
    twins.step([g.clone() for g in grads])


WITHOUT_MEMORY = """
import torch, pyopt.torch as optim
p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
p.grad, q.grad = torch._efficientzerotensor(5), torch.zeros(5)
optimizers = [optim.AdamW([p]), torch.optim.AdamW([q])]
for optimizer in optimizers:
    optimizer.step()
assert torch.equal(p, q), p
"""


def test_gradient_without_memory() -> None:
    """The zeros of forward-mode AD have no memory behind them; in a process of its own, since it may not survive."""
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_MEMORY], check=True)


@each
def test_parameters_that_share_memory(name: str) -> None:
    """Two parameters on the same storage are updated one after the other, as in torch's loop."""

    def build() -> list[Any]:
        base = torch.arange(1.0, 9)
        return [torch.nn.Parameter(base), torch.nn.Parameter(base.view(2, 4)), torch.nn.Parameter(base[2:6])]

    twins = Twins(name, build, {"lr": 0.1, "weight_decay": 0.1})
    for step in range(3):
        twins.step([torch.full((8,), 1.0 + step), torch.full((2, 4), 2.0), torch.full((4,), 3.0)])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
@each
def test_duplicate_parameter(name: str) -> None:
    """torch warns, and steps it twice."""

    def build() -> list[Any]:
        (p,) = new_parameters((9,))
        return [p, p]

    twins = Twins(name, build, {"lr": 0.1, "weight_decay": 0.1})
    g = parameters(twins.ours)[0].detach().sign() * 0.5
    for _ in range(3):
        twins.step([g, g])


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad"])  # AdamW: torch would decay the gradient, too
def test_gradient_is_the_parameter(name: str) -> None:
    twins = Twins(name, lambda: new_parameters((70,)), {"lr": 0.1})
    for _ in range(3):
        for p in (p for pair in twins.pairs() for p in pair):
            p.grad = p.detach()
        twins.step()


@each
def test_state_in_another_layout(name: str) -> None:
    """State of a checkpoint in another memory order than the parameter's."""
    twins = Twins(name, one(DENSE["channels_last"], torch.float32), {"lr": 0.1})
    twins.run(2)
    for optimizer in twins:
        for state in optimizer.state.values():
            for key, layout in zip(list(state), ("F-ordered", "every second", "transposed", "holes"), strict=False):
                if key != "step":
                    state[key] = LAYOUTS[layout](state[key])
    twins.run(2, seed=1)


def test_copy_on_write() -> None:
    """A step on a lazy clone leaves its source alone, and the other way round."""
    for written in (0, 1):
        pair = [torch.ones(1000)]
        pair.append(torch._lazy_clone(pair[0]))
        p = torch.nn.Parameter(pair[written])
        p.grad = torch.ones(1000)
        optim.SGD([p], lr=0.5).step()
        assert (p == 0.5).all() and (pair[1 - written] == 1).all()


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


# --- GradScaler -------------------------------------------------------------------------------------------------------


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
    ours, theirs = (Scaled(optimizer, scale) for optimizer in twins)
    for step in range(8):
        before = [p.detach().clone() for p in parameters(twins.ours)]
        counts = [s["step"].item() for s in twins.ours.state.values() if "step" in s]
        for side in (ours, theirs):
            side.step(make_grads(step), unscale_first=step == 5)
        assert ours.untouched, "a gradient was written"
        assert ours.scaler.get_scale() == theirs.scaler.get_scale()
        assert not hasattr(twins.ours, "grad_scale") and not hasattr(twins.ours, "found_inf")
        if step in SPOILED:
            assert all(same_bits(p, b) for p, b in zip(parameters(twins.ours), before, strict=True))
            assert [s["step"].item() for s in twins.ours.state.values() if s.get("step")] == [c for c in counts if c]
        if step:  # a first step that is skipped may leave state at zero
            twins.steps += 1
            twins.check()


SPOILED = {0: float("inf"), 3: float("nan"), 6: -float("inf")}


@pytest.mark.parametrize("scale", [65536.0, 3.0])
@brief
def test_grad_scaler(name: str, options: dict[str, Any], scale: float) -> None:
    """Steps with an inf are skipped and not counted, the first among them; the scaled gradients stay as they are."""
    twins = Twins(name, small, options)

    def grads(step: int) -> list[Any]:
        values = random_gradients(twins.theirs, torch.Generator().manual_seed(step))
        if step in SPOILED:
            values[1][3] = SPOILED[step]
        return values

    assert_scaler_agrees(twins, grads, scale)


def test_grad_scaler_unscales_in_the_pass() -> None:
    """The scaler leaves the work to the optimizer, also to a copy of it."""
    optimizer = optim.Adam(small())
    for o in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert o._step_supports_amp_scaling
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        for p in parameters(o):
            p.grad = torch.full_like(p, 8.0)
        scaler.step(o)
        assert all((p.grad == 8).all() for p in parameters(o))
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
    *({"betas": betas} for betas in ([0.8, 0.9], (0, 0), (-0.5, 0.9), (1.0, 0.9), (0.9, 1.0))),
    *({"momentum": momentum} for momentum in (0.5, -0.5, 1.5)),
    *({"weight_decay": 0.1, key: True} for key in ("differentiable", "capturable", "fused", "foreach", "maximize")),
    *({"weight_decay": decay} for decay in (-0.1, 1, torch.tensor(0.1))),
    *({"eps": eps} for eps in (0, -1.0, 0.5)),
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


# --- state ------------------------------------------------------------------------------------------------------------


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
        a.data = LAYOUTS["contiguous"](a.detach() + 1).t().contiguous().t()
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


# --- mixed models -----------------------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A tensor subclass."""


class Weight(torch.nn.Parameter):
    """A subclass of Parameter, as lazy and quantized layers have them."""


def two_tensor(value: Any) -> Any:
    """A wrapper without memory of its own, as DTensor is."""
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(value.clone(), value.clone())


def sparse_gradient(p: Any) -> Any:
    return torch.sparse_coo_tensor([[0, 2]], torch.ones(2, *p.shape[1:], dtype=p.dtype), p.shape, check_invariants=True)


def as_subclass(value: Any) -> Any:
    return value.clone().as_subclass(Tagged)


# What: (parameter, gradient, part of the reason that explain gives).
UNCOVERED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "sparse": (lambda: new_parameters((5, 4))[0], sparse_gradient, "sparse"),
    "complex": (lambda: torch.nn.Parameter(torch.complex(new(5), new(5, seed=1))), torch.ones_like, "complex"),
    "bfloat16": (lambda: new_parameters((67,), dtype=torch.bfloat16)[0], torch.ones_like, "bfloat16"),
    "float16": (lambda: new_parameters((67,), dtype=torch.float16)[0], torch.ones_like, "float16"),
    "subclass": (lambda: torch.nn.Parameter(as_subclass(new(5))), torch.ones_like, "not a plain tensor"),
    "subclass of gradient": (lambda: new_parameters((5,))[0], lambda p: as_subclass(new(5)), "not a plain tensor"),
    "wrapper": (lambda: torch.nn.Parameter(two_tensor(new(5))), torch.ones_like, "not a plain tensor"),
}
SPARSE_WARNING = "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
SUPPORTS_SPARSE = {"SGD", "Adagrad"}


def mixed(what: list[str]) -> Callable[[], list[Any]]:
    """Covered parameters around and between the uncovered ones."""
    return lambda: [p for w in what for p in (*new_parameters((9, 3)), UNCOVERED[w][0]())] + new_parameters((8,))


def mixed_gradients(what: list[str], optimizer: Any) -> list[Any]:
    params = parameters(optimizer)
    return [
        UNCOVERED[what[i // 2]][1](p) if i % 2 else new(*p.shape, seed=i) + 2 * p.detach().sign()
        for i, p in enumerate(params)
    ]


def uncovered_of(name: str) -> list[str]:
    return [w for w in UNCOVERED if w != "sparse" or name in SUPPORTS_SPARSE]


@pytest.mark.filterwarnings(SPARSE_WARNING)
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=["plain", "fused", "foreach"])
@each
def test_mixed_model(name: str, options: dict[str, Any]) -> None:
    """What the kernels do not cover goes to torch's for-loop, in its bits, and the rest does not notice."""
    if name == "RMSprop" and "fused" in options:
        options = {"centered": True}
    what = uncovered_of(name)
    oracle = {k: v for k, v in options.items() if k not in ("fused", "foreach")}
    twins = Twins(name, mixed(what), {"lr": 0.1, **options}, oracle={"lr": 0.1, **oracle})
    for _ in range(3):
        twins.step(mixed_gradients(what, twins.theirs))
    for i, (p, q) in enumerate(twins.pairs()):
        if i % 2 and what[i // 2] != "wrapper":
            assert same_bits(p, q), what[i // 2]
    saved = [optimizer.state_dict() for optimizer in twins]
    for state_dict in saved:  # the covered parameters' state may be made first
        state_dict["state"] = dict(sorted(state_dict["state"].items()))
    assert_same_layout(*saved, but=("fused", "foreach"))
    # All the same with only uncovered ones, and with the gradient of some missing.
    alone = Twins(name, lambda: [UNCOVERED[w][0]() for w in what], {"lr": 0.1})
    for step in range(2):
        grads = [UNCOVERED[w][1](p) for w, p in zip(what, parameters(alone.theirs), strict=True)]
        alone.step([None if i == step else g for i, g in enumerate(grads)])


def test_wrapper_parameter_values() -> None:
    """Both halves of the wrapper have moved."""
    p = torch.nn.Parameter(two_tensor(torch.ones(5)))
    p.grad = torch.ones_like(p)
    optim.SGD([p], lr=0.5).step()
    assert p.data.a.tolist() == p.data.b.tolist() == [0.5] * 5


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_sparse_refused_like_torch(name: str) -> None:
    """The same exception, and as in torch no parameter has moved."""
    results = []
    for module in (optim, torch.optim):
        params = new_parameters((5, 4), (5,))
        params[0].grad, params[1].grad = sparse_gradient(params[0]), torch.ones(5)
        results.append(outcome(getattr(module, name)(params).step))
        for p, q in zip(params, new_parameters((5, 4), (5,)), strict=True):
            assert same_bits(p, q), f"{module.__name__}: moved"
    assert results[0] == results[1] and results[0][0] is RuntimeError


@pytest.mark.filterwarnings(SPARSE_WARNING)
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_embedding(name: str) -> None:
    """A model with a sparse embedding, trained by autograd."""
    models = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 1)).double()
        optimizer = getattr(module, name)(model.parameters(), lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.tensor([step, 3, 7])).pow(2).sum().backward()
            assert model[0].weight.grad.is_sparse
            optimizer.step()
        models.append(list(model.parameters()))
    torch.testing.assert_close(*models, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings(SPARSE_WARNING)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_mixed_model_with_grad_scaler(name: str) -> None:
    """Unscale and skip reach the parameters that go to torch as well."""
    what = [
        w for w in uncovered_of(name) if w not in ("complex", "float16", "wrapper", "subclass", "subclass of gradient")
    ]
    twins = Twins(name, mixed(what), {"lr": 0.1})

    def grads(step: int) -> list[Any]:
        values = [g.clone() for g in mixed_gradients(what, twins.theirs)]
        if step in SPOILED:
            values[0][0] = SPOILED[step]
        return values

    assert_scaler_agrees(twins, grads, 64.0)


def explained(optimizer: Any, capsys: Any) -> list[str]:
    """The lines about parameters, whether explain prints or returns them."""
    returned = optim.explain(optimizer)
    text = capsys.readouterr().out or returned or ""
    return [line for line in text.splitlines() if re.search(r"(?<![\w.])(pyopt|torch)(?![\w.])", line)]


def path_of(line: str) -> str:
    return re.search(r"(?<![\w.])(pyopt|torch)(?![\w.])", line)[1]


@pytest.mark.parametrize("what", UNCOVERED)
def test_explain(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    params = mixed([what])()
    optimizer = optim.SGD(params)
    for p, g in zip(params, mixed_gradients([what], optimizer), strict=True):
        p.grad = g
    lines = explained(optimizer, capsys)
    assert [path_of(line) for line in lines] == ["pyopt", "torch", "pyopt"]
    assert UNCOVERED[what][2] in lines[1].lower()


def test_explain_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Differentiable, other devices, and all that our kernels take."""
    p, q = new_parameters((5,), (3, 3))
    unused, strided = new_parameters((4,))[0], one(NON_DENSE["last of pairs"], torch.float32)()[0]
    for each in (p, q, strided):
        each.grad = torch.ones_like(each)
    lines = explained(optim.Adam([p], differentiable=True), capsys)
    assert [path_of(line) for line in lines] == ["torch"] and "differentiable" in lines[0]
    lines = explained(optim.Adam([{"params": [("layer.weight", p), ("layer.bias", q)]}], fused=True), capsys)
    assert [path_of(line) for line in lines] == ["pyopt", "pyopt"]
    assert "layer.weight" in lines[0] and "layer.bias" in lines[1]
    meta = torch.nn.Parameter(torch.empty(3, device="meta"))
    meta.grad = torch.empty(3, device="meta")
    optimizer = optim.Adam([p, meta, strided, unused])
    lines = explained(optimizer, capsys)
    assert [path_of(line) for line in lines] == ["pyopt", "torch", "torch", "pyopt"] and "meta" in lines[1]
    assert "once it has a gradient" in lines[3]
    assert not any(optimizer.state.values()) and all((t == 1).all() for t in (p.grad, strided.grad)), "it has stepped"


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_lazy_parameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A parameter that gets its shape after the optimizer was made, and after a step without gradients."""
    models = []
    for module in (optim, torch.optim):
        model = torch.nn.LazyLinear(3)
        optimizer = getattr(module, name)(model.parameters())
        optimizer.step()
        model(torch.ones(2, 4))
        for i, p in enumerate(model.parameters()):
            p.data = torch.full_like(p, i)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        models.append(list(model.parameters()))
        if module is optim:
            assert [path_of(line) for line in explained(optimizer, capsys)] == ["pyopt", "pyopt"]
    torch.testing.assert_close(*models)


def test_parameter_subclass() -> None:
    """A subclass of Parameter that is no more than that."""
    Twins("Adam", lambda: [Weight(new(6, 5)), *new_parameters((4,))], {"lr": 0.1}).run(3)


# --- older torch ------------------------------------------------------------------------------------------------------

OLD_TORCH = """
import hashlib, sys
import torch
if sys.argv[1] == "old":
    del torch.Tensor.__dlpack_c_exchange_api__
    increment_version = torch.autograd.graph.increment_version
    def increment_one(tensor):
        if not isinstance(tensor, torch.Tensor):
            raise RuntimeError("increment_version expect a Tensor as input")
        increment_version(tensor)
    torch.autograd.graph.increment_version = increment_one
import pyopt.torch as optim
digest = hashlib.sha256()
for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Lion"):
    generator = torch.Generator().manual_seed(0)
    def new(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    base = new(6, 5, 3)
    params = [new(33, 31), new(7, 5).t(), base[..., 1], new(1000).float(), new()[None], new(4, 3, 2, 2)]
    params[-1] = params[-1].contiguous(memory_format=torch.channels_last)
    params = [torch.nn.Parameter(p) for p in params] + [torch.nn.Parameter(new(40).bfloat16())]
    if name == "Lion":  # torch has none for what the kernels do not cover
        del params[2], params[-1]
    optimizer = getattr(optim, name)(params, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = new(*reversed(p.shape)).permute(*reversed(range(p.ndim))).to(p.dtype)
        versions = [p._version for p in params]
        optimizer.step()
        assert all(p._version > v for p, v in zip(params, versions))
    tensors = [base, *(p for p in params), *(v for s in optimizer.state.values() for v in s.values())]
    for t in tensors:
        digest.update(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_older_torch() -> None:
    """The same bits by data_ptr, as before 2.10, and with versions incremented one by one, as in 2.4."""
    digests = {
        how: subprocess.run(
            [sys.executable, "-W", "error", "-c", OLD_TORCH, how], check=True, capture_output=True, text=True
        ).stdout
        for how in ("new", "old")
    }
    assert len(digests["new"]) > 60 and digests["new"] == digests["old"]


def test_explain_keeps_no_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    (p,) = new_parameters((5,))
    p.grad = torch.ones(5)
    gradient = weakref.ref(p.grad)
    optimizer = optim.Adam([p])
    explained(optimizer, capsys)
    p.grad = None
    assert gradient() is None
