"""The numbers of pyopt.torch: the bits of the NumPy side and torch's values, at every size and memory layout."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cases import BRIEF as NUMPY_BRIEF
from cases import CASES, SIZES, Case, assert_same_bits, gradients
from cases import DTYPES as NUMPY_DTYPES
from cases import parameters as numpy_parameters
from torch_or_skip import (
    Twins,
    both_dtypes,
    brief,
    each,
    new,
    new_parameters,
    optim,
    outcome,
    parameters,
    same_bits,
    torch,
)

from pyopt.torch.fallback import fused_sgd_is_right  # isort: skip
from pyopt.torch._tensor_views import use_exchange_api  # isort: skip


def assert_same_as_numpy(case: Case, shapes: list[Any], dtype: Any, steps: int) -> None:
    arrays = numpy_parameters(shapes, dtype)
    tensors = [torch.tensor(p.data) for p in arrays]
    theirs = case.optimizer(arrays, **case.options)
    ours = getattr(optim, case.optimizer.__name__)(tensors, **case.options)
    rng = np.random.default_rng(1)
    if case.optimizer.number_states:  # torch keeps them in the default dtype
        torch.set_default_dtype(torch.float64)
    try:
        for _ in range(steps):
            for p, t, g in zip(arrays, tensors, gradients(arrays, rng), strict=True):
                p.grad, t.grad = g, torch.tensor(g)
            theirs.step()
            ours.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for i, (p, t) in enumerate(zip(arrays, tensors, strict=True)):
        assert_same_bits(t.numpy(), p.data, f"{case}: parameter {i}")
        assert list(ours.state.get(t, {})) == list(theirs.state.get(p, {}))
        for name, value in theirs.state.get(p, {}).items():
            if type(value) in (int, float):
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
    arguments = {k: v.default for k, v in inspect.signature(optim.Lion).parameters.items()}
    del arguments["params"], arguments["storage"]
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
    """torch 2.13 does not update whole vectors of bfloat16; ours does what its for-loop does where it is so."""
    results = []
    for module, switch in ((optim, {"fused": True}), (torch.optim, {}), (torch.optim, {"fused": True})):
        p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        module.SGD([p], lr=0.5, **switch).step()
        results.append(p.detach())
    ours, loop, fused = results
    assert torch.equal(ours, loop) and torch.equal(fused, loop) == fused_sgd_is_right(torch.bfloat16)


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


# --- shared memory ----------------------------------------------------------------------------------------------------


def covered_and_strided(base: Any) -> list[Any]:
    return [torch.nn.Parameter(base), torch.nn.Parameter(base[:, 0])]


def real_and_complex(base: Any) -> list[Any]:
    values = torch.view_as_complex(base.reshape(-1, 2))
    return [torch.nn.Parameter(torch.view_as_real(values)), torch.nn.Parameter(values)]


@pytest.mark.parametrize("share", [covered_and_strided, real_and_complex])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
def test_memory_shared_with_what_is_left_to_torch(share: Any, late: bool) -> None:
    """The order of the updates counts."""
    results = []
    for module in (optim, torch.optim):
        base = torch.arange(1.0, 17).reshape(4, 4)
        params = share(base)
        optimizer = module.SGD(share(base + 1) if late else params, lr=0.1, weight_decay=0.5)
        for step in range(4):
            if late and step == 1:
                for p, q in zip(parameters(optimizer), params, strict=True):
                    p.data = q.data
            for p in parameters(optimizer):
                p.grad = torch.arange(1.0, 1 + p.numel()).reshape(p.shape).to(p.dtype)
            optimizer.step()
        results.append(base)
    torch.testing.assert_close(*results)


GRADIENTS_IN_THE_WAY: dict[str, Callable[[Any, Any, Any], Any]] = {
    "another parameter": lambda o, p, q: q.detach(),
    "another parameter, expanded": lambda o, p, q: q.detach()[:1].expand(3),
    "own state": lambda o, p, q: o.state[p]["momentum_buffer"],
    "another's state": lambda o, p, q: o.state[q]["momentum_buffer"],
    "part of the parameter": lambda o, p, q: p.base[2:5],
}


@pytest.mark.parametrize("what", GRADIENTS_IN_THE_WAY)
def test_gradient_lies_where_the_step_writes(what: str) -> None:
    results = []
    for module in (optim, torch.optim):
        base = torch.arange(1.0, 7)
        q, p = torch.nn.Parameter(torch.tensor([4.0, 5.0, 6.0])), torch.nn.Parameter(base[:3])
        p.base = base
        optimizer = module.SGD([q, p], lr=0.1, momentum=0.5)
        q.grad, p.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        for _ in range(3):
            q.grad = torch.ones(3)
            p.grad = GRADIENTS_IN_THE_WAY[what](optimizer, p, q)
            found = outcome(optimizer.step)
        results.append((found, q.detach(), p.detach()))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1:], results[1][1:])


def test_nan_in_lion() -> None:
    """In the kernel as in the loop for what it does not cover."""
    results = []
    for layout in (DENSE["contiguous"], NON_DENSE["holes"]):
        p = torch.nn.Parameter(layout(torch.ones(SHAPE)))
        optimizer = optim.Lion([p], lr=0.1, weight_decay=0.1)
        for _ in range(2):
            p.grad = torch.ones(SHAPE)
            p.grad[0, 0, 0, 1] = float("nan")
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, equal_nan=True)
    assert results[0].isnan().sum() == 1


def test_nan_in_the_state_shows() -> None:
    """torch.maximum of the second moments keeps it, whichever of the two it is in."""
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        results = []
        for module in (optim, torch.optim):
            p = torch.nn.Parameter(torch.ones(40))
            optimizer = module.Adam([p], lr=0.1, amsgrad=True)
            for step in range(3):
                p.grad = torch.arange(1.0, 41)
                optimizer.step()
                if step == 0:
                    optimizer.state[p][key][7] = float("nan")
            results.append([p.detach(), *optimizer.state[p].values()])
        torch.testing.assert_close(*results, equal_nan=True)
        assert results[0][0].isnan().sum() == 1


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
