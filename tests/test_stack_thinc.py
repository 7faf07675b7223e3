"""pyopt.thinc against thinc's own optimizers, call by call, in its models, and in a spaCy pipeline from a config."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stacks import need

need("thinc")

import thinc.api
import thinc.optimizers

import pyopt.thinc as ours

KINDS = ["Adam", "RAdam", "SGD"]
SHAPES = {(1, "W"): (17, 5), (1, "b"): (17,), (2, "E"): (3, 4, 5)}
EXACT = {"rtol": 3e-6, "atol": 5e-6}  # float32 after many steps, each with the clip's 1e-6


def weights() -> dict[Any, Any]:
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype("f") for key, shape in SHAPES.items()}


def run(optimizer: Any, steps: int, lr_scale: float = 1.0, params: Any = None, first: int = 0) -> dict[Any, Any]:
    params = weights() if params is None else params
    for step in range(first, first + steps):
        rng = np.random.default_rng([1, step])
        for key, w in params.items():
            g = (rng.standard_normal(w.shape) * rng.choice([0.05, 1])).astype("f")
            returned, zeros = optimizer(key, w, g, lr_scale=lr_scale)
            assert np.shares_memory(returned, w) and np.shares_memory(zeros, g) and not g.any()
        optimizer.step_schedules()
    return params


def schedule() -> Iterator[float]:
    yield from (0.01, 0.03, 0.02)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"grad_clip": 0.0, "use_averages": False},
    {"L2": 0.1},
    {"L2": 0.1, "L2_is_weight_decay": False},
    {"L2": 0.1, "L2_is_weight_decay": False, "grad_clip": 0.0},
    {"grad_clip": 0.3},
    {"learn_rate": schedule},
    {"learn_rate": lambda: thinc.api.warmup_linear(0.05, 4, 30), "L2": lambda: thinc.api.decaying(0.1, 0.5)},
    {"learn_rate": lambda: [0.1, 0.01], "grad_clip": lambda: [1.0, 0.5, 0.0]},
]
OF_ADAM = [{"beta1": 0.5, "beta2": 0.9, "eps": 1e-3}, {"beta1": lambda: [0.5, 0.9], "eps": lambda: [1e-8, 1e-4]}]


def made(module: Any, kind: str, options: dict[str, Any]) -> Any:
    options = {"learn_rate": 0.01, **options}
    return getattr(module, kind)(**{k: v() if callable(v) else v for k, v in options.items()})


CASES = [(k, o) for k in KINDS for o in [*OPTIONS, *(OF_ADAM if k != "SGD" else [])]]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{k}-{'-'.join(o) or 'usual'}" for k, o in CASES])
def test_thincs_result(kind: str, options: dict[str, Any]) -> None:
    """Weights, averages, moments and counts after 20 steps are thinc's up to float32 rounding."""
    optimizers = [made(module, kind, options) for module in (ours, thinc.optimizers)]
    found = [run(optimizer, 20) for optimizer in optimizers]
    for key in SHAPES:
        np.testing.assert_allclose(found[0][key], found[1][key], **EXACT)
    assert optimizers[0].nr_update == optimizers[1].nr_update
    for name in ("averages", "mom1", "mom2"):
        mine, theirs = getattr(optimizers[0], name), getattr(optimizers[1], name)
        assert (mine is None) == (theirs is None)
        for key in theirs or ():
            assert mine[key].shape == theirs[key].shape
            np.testing.assert_allclose(mine[key], theirs[key], rtol=1e-5, atol=EXACT["atol"])


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_lr_scale(kind: str) -> None:
    found = [run(made(module, kind, {"L2": 0.1}), 10, lr_scale=0.25) for module in (ours, thinc.optimizers)]
    for key in SHAPES:
        np.testing.assert_allclose(found[0][key], found[1][key], **EXACT)


def test_clip_is_exact_in_double() -> None:
    """The norm of an array whose squares float32 cannot hold."""
    optimizer = ours.SGD(1.0, grad_clip=1.0, use_averages=False)
    w, g = np.zeros(4, "f"), np.full(4, 1e30, "f")
    optimizer((0, "W"), w, g)
    np.testing.assert_allclose(w, -0.5, rtol=1e-6)


class OfAnotherClass(np.ndarray):
    """What does not take the shortest way."""


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("L2_is_weight_decay", True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_have_the_same_bits(kind: str, options: dict[str, Any]) -> None:
    """The short way of plain arrays, and the step of an optimizer that all others take."""
    plain, other = made(ours, kind, options), made(ours, kind, options)
    short = run(plain, 12)
    long = run(other, 12, params={key: w.view(OfAnotherClass) for key, w in weights().items()})
    for key in SHAPES:
        assert short[key].tobytes() == long[key].tobytes()
        for name in ("averages", "mom1", "mom2"):
            if getattr(plain, name) and kind != "SGD":
                assert getattr(plain, name)[key].tobytes() == getattr(other, name)[key].tobytes()
    assert plain.nr_update == other.nr_update == dict.fromkeys(SHAPES, 12)


def test_arrays_that_share_memory() -> None:
    """A gradient that is the array itself is copied before anything is written."""
    optimizer, w = ours.SGD(0.5, grad_clip=0.0, use_averages=False), np.ones(4, "f")
    for expected in (0.5, 0.25, 0.125):
        optimizer((0, "W"), w, w)
        assert (w == expected).all()


def test_new_arrays_and_types() -> None:
    """thinc may hand over other arrays each time: the state is that of the key; float64 and Fortran order work."""
    one, other = ours.Adam(0.01), ours.Adam(0.01)
    kept = run(one, 5)
    moved = weights()
    for step in range(5):
        moved = run(other, 1, params={key: w.copy() for key, w in moved.items()}, first=step)
    assert all((kept[key] == moved[key]).all() for key in SHAPES)
    w = np.asfortranarray(np.ones((3, 2)))
    ours.Adam(0.01)((0, "W"), w, np.ones((3, 2)))
    assert np.allclose(w, 0.99)


def test_averages_can_be_taken_away() -> None:
    optimizer = ours.Adam(0.01)
    params = run(optimizer, 2)
    optimizer.averages = None
    run(optimizer, 2, params=params, first=2)
    optimizer.averages = {}
    run(optimizer, 1, params=params, first=4)
    assert set(optimizer.averages) == set(SHAPES)
    expected = (1 - 6 / 15) * params[1, "b"]  # from zero, with the decay of update 5
    np.testing.assert_allclose(optimizer.averages[1, "b"], expected, rtol=1e-6)


def test_nothing_to_step() -> None:
    w, g = np.zeros((0, 3), "f"), np.zeros((0, 3), "f")
    assert ours.Adam(0.01)((0, "W"), w, g) == (w, g)


# --- errors -----------------------------------------------------------------------------------------------------------

FAULTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"learn_rate": -1.0}, ValueError, "learn_rate == -1.0, must be finite and >= 0"),
    ({"beta1": 1.0}, ValueError, "beta1 == 1.0, must be finite and >= 0 and < 1"),
    ({"grad_clip": float("nan")}, ValueError, "grad_clip == nan, must be finite and >= 0"),
    ({"L2_is_weight_decay": 1}, TypeError, "L2_is_weight_decay == 1, must be a bool"),
    ({"learn_rate": []}, ValueError, "Invalid schedule for 'learn_rate'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), FAULTS, ids=[message for *_, message in FAULTS])
def test_bad_option(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ours.Adam(**options)


def test_bad_call_changes_nothing() -> None:
    optimizer = ours.Adam([0.1, -0.1])
    params = run(optimizer, 1)
    before = {key: w.copy() for key, w in params.items()}
    w, g = params[1, "b"], np.ones(17, "f")
    with pytest.raises(ValueError, match=r"learn_rate == -0\.1"):
        optimizer((1, "b"), w, g)
    optimizer.learn_rate = 0.1
    with pytest.raises(ValueError, match=r"'b of node 1': gradient has shape \(3,\), must be \(17,\)"):
        optimizer((1, "b"), w, g[:3])
    with pytest.raises(TypeError, match="gradient has dtype float64"):
        optimizer((3, "new"), w, np.ones(17))
    assert all((params[key] == before[key]).all() for key in SHAPES) and (g == 1).all()
    assert optimizer.nr_update == dict.fromkeys(SHAPES, 1) and set(optimizer.averages) == set(SHAPES)


# --- models -----------------------------------------------------------------------------------------------------------


def network(seed: int = 0) -> Any:
    thinc.api.fix_random_seed(seed)
    model = thinc.api.chain(thinc.api.Relu(16), thinc.api.LayerNorm(), thinc.api.Softmax(3))
    return model.initialize(np.ones((2, 5), "f"), np.ones((2, 3), "f"))


def train(model: Any, optimizer: Any, steps: int, first: int = 0) -> Any:
    for step in range(first, first + steps):
        rng = np.random.default_rng(step)
        X = rng.standard_normal((20, 5)).astype("f")
        Y = np.eye(3, dtype="f")[X[:, :3].argmax(axis=1)]
        guess, backprop = model.begin_update(X)
        backprop((guess - Y) / len(X))
        model.finish_update(optimizer)
        optimizer.step_schedules()
    return model


def values(model: Any) -> list[Any]:
    return [node.get_param(name) for node in model.walk() for name in node.param_names]


@pytest.mark.parametrize("kind", KINDS)
def test_model(kind: str) -> None:
    """A model of thinc learns what it learns with thinc's; its averages go into the model."""
    options = {"L2": 0.01, "learn_rate": lambda: thinc.api.warmup_linear(0.05, 10, 100)}
    found = []
    for module in (ours, thinc.optimizers):
        optimizer = made(module, kind, options)
        model = train(network(), optimizer, 60)
        with model.use_params(optimizer.averages):
            found.append([w.copy() for w in values(model)])
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_models", [False, True])
def test_bytes(kind: str, with_models: bool) -> None:
    """Training goes on from the bytes with the same bits, in models whose nodes have other numbers too."""

    def optimizer() -> Any:
        return made(ours, kind, {"L2": 0.01, "learn_rate": lambda: thinc.api.warmup_linear(0.05, 10, 100)})

    straight, one = network(), optimizer()
    train(straight, one, 7)
    half, saved = network(), optimizer()
    train(half, saved, 4)
    models = [half] if with_models else []
    data = saved.to_bytes(*models)
    assert isinstance(data, bytes)
    if with_models:
        half = network().from_bytes(half.to_bytes())
    again = optimizer().from_bytes(data, *([half] if with_models else []))
    train(half, again, 3, first=4)
    assert all((a == b).all() for a, b in zip(values(straight), values(half), strict=True))
    assert [*again.nr_update.values()] == [*one.nr_update.values()]
    for a, b in zip(one.averages.values(), again.averages.values(), strict=True):
        assert (a == b).all()


def test_bytes_that_do_not_fit() -> None:
    model, adam = network(), ours.Adam(0.01)
    train(model, adam, 2)
    data = adam.to_bytes(model)
    other = ours.Adam(0.01)
    with pytest.raises(ValueError, match="data is of Adam, must be of SGD"):
        ours.SGD(0.01).from_bytes(data, model)
    with pytest.raises(ValueError, match="data was saved with models"):
        other.from_bytes(data)
    with pytest.raises(ValueError, match=r"which the models have not"):
        other.from_bytes(data, thinc.api.Relu(2, 3).initialize())
    wide = thinc.api.chain(thinc.api.Relu(8, 5), thinc.api.LayerNorm(8), thinc.api.Softmax(3, 8)).initialize()
    with pytest.raises(ValueError, match="state 'exp_avg' has shape"):
        other.from_bytes(data, wide)
    with pytest.raises(ValueError, match="not of to_bytes"):
        other.from_bytes(b"\x80")
    with pytest.raises(KeyError, match="is in none of the models"):
        adam.to_bytes(thinc.api.Relu(2, 3).initialize())
    assert not other.nr_update and not other.mom1
    for _ in range(3):
        other.step_schedules()
    with pytest.raises(ValueError, match="schedules are at step 3, cannot go back to 2"):
        other.from_bytes(data, model)


def test_torch_in_thinc() -> None:
    """thinc's shim of torch hands over the memory of tensors: they are stepped where they lie."""
    torch = pytest.importorskip("torch")
    found = []
    for module in (ours, thinc.optimizers):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        model = thinc.api.chain(thinc.api.PyTorchWrapper(layers), thinc.api.softmax_activation())
        train(model, made(module, "Adam", {"L2": 0.01}), 30)
        found.append([p.detach().numpy() for p in layers.parameters()])
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


# --- configs and spaCy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_config(kind: str) -> None:
    """The names are known to thinc without an import of pyopt.thinc: by entry points."""
    text = f'[optimizer]\n@optimizers = "pyopt.{kind}.v1"\nL2 = 0.01\ngrad_clip = 0\n'
    text += '[optimizer.learn_rate]\n@schedules = "warmup_linear.v1"\ninitial_rate = 0.01\n'
    text += "warmup_steps = 2\ntotal_steps = 10\n"
    optimizer = thinc.api.registry.resolve(thinc.api.Config().from_str(text))["optimizer"]
    assert isinstance(optimizer, ours.Optimizer) and optimizer._kind.__name__ == f"_{kind}"
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="thinc_optimizers", name=f"pyopt.{kind}.v1")
    assert entry.load() is getattr(ours, kind)


def test_spacy_classifier() -> None:
    """A text classifier, trained by spaCy's own loop from a config, with averages and a schedule."""
    need("spacy", level=False)
    from spacy_classifier import trained

    nlp, scores = trained("pyopt.Adam.v1", seed=0, steps=60)
    assert max(scores) > 0.9
    assert nlp("very good film").cats["GOOD"] > 0.5 > nlp("very bad film").cats["GOOD"]


def test_docstrings() -> None:
    result = doctest.testmod(ours, extraglobs={"np": np})
    assert result.attempted and not result.failed
