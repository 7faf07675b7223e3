"""Models that pyopt's kernels cover in part: the rest is torch's, per parameter, and explain says so."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from torch_or_skip import (
    Twins,
    assert_same_layout,
    each,
    new,
    new_parameters,
    optim,
    outcome,
    parameters,
    same_bits,
    torch,
)


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


def every_other(n: int, dtype: Any) -> Any:
    """A parameter whose elements do not lie side by side."""
    return torch.nn.Parameter(new(n, 2, dtype=dtype)[:, 1])


def single_elements(p: Any) -> Any:
    """A sparse gradient of elements, not of rows."""
    dense = torch.zeros_like(p)
    dense[0, 1], dense[2, 0] = 1.0, -2.0
    return dense.to_sparse()


def as_subclass(value: Any) -> Any:
    return value.clone().as_subclass(Tagged)


# What: (parameter, gradient, part of the reason that explain gives).
UNCOVERED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "sparse": (lambda: new_parameters((5, 4))[0], single_elements, "sparse"),
    "complex": (lambda: torch.nn.Parameter(torch.complex(new(5), new(5, seed=1))), torch.ones_like, "complex"),
    "bfloat16": (lambda: every_other(67, torch.bfloat16), torch.ones_like, "side by side"),
    "float16": (lambda: every_other(67, torch.float16), torch.ones_like, "side by side"),
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
    """What the kernels do not cover goes to torch's step, in the bits of its for-loop, and the rest does not notice."""
    if name == "RMSprop" and "fused" in options:
        options = {"centered": True}
    what = [w for w in uncovered_of(name) if not options or w not in ("bfloat16", "float16")]  # their bits differ
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


def explained(optimizer: Any, capsys: Any) -> list[str]:
    """The lines about parameters, whether explain prints or returns them."""
    returned = optim.explain(optimizer)
    text = capsys.readouterr().out or returned or ""
    return [line for line in text.splitlines() if re.search(r"(?<![\w.])(pyopt|torch)(?![\w.])", line)]


def path_of(line: str) -> str:
    return re.search(r"(?<![\w.])(pyopt|torch)(?![\w.])", line)[1]


def test_another_dtype_under_a_gradient_in_another_order_stays_with_the_kernels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The private copy of the gradient, which is kept from step to step, is not that of the old dtype."""
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = optim.SGD([p])
    for dtype in (torch.float32, torch.float64):
        p.grad = None
        p.data = p.data.to(dtype)
        p.grad = torch.ones(3, 4, dtype=dtype).T
        assert [path_of(line) for line in explained(optimizer, capsys)] == ["pyopt"]
        optimizer.step()


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
    unused, strided = new_parameters((4,))[0], torch.nn.Parameter(torch.zeros(4, 2)[..., 1])
    for param in (p, q, strided):
        param.grad = torch.ones_like(param)
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


def test_explain_keeps_no_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    (p,) = new_parameters((5,))
    p.grad = torch.ones(5)
    gradient = weakref.ref(p.grad)
    optimizer = optim.Adam([p])
    explained(optimizer, capsys)
    p.grad = None
    assert gradient() is None
