"""The optimizers of matrices on arrays: against independent transcriptions in float64, and as steps of this package."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import numpy as np
import pytest

import pyopt
from pyopt import LBFGS, Adafactor, AdamW, Muon, MuonAdamW, Parameter
from pyopt._engine import get_parallel_cost, set_parallel_cost
from pyopt._isa import LEVELS, kernels, supported_levels
from pyopt._matrix import MatrixJob, Writes, dot

SHAPES = [(), (1,), (7,), (1, 1), (5, 1), (1, 9), (33, 70), (127, 31), (128, 32), (129, 33), (3, 5, 7), (2, 2, 4, 33)]
DTYPES = ["float32", "float64"]


@pytest.fixture
def shared_among_threads() -> Any:
    """Steps of any size use threads."""
    before = get_parallel_cost()
    set_parallel_cost(0)
    yield
    set_parallel_cost(-1)
    assert get_parallel_cost() == before


def arrays(shape: tuple[int, ...], dtype: str, n: int, order: str = "C") -> list[Any]:
    random = np.random.default_rng(len(shape) * 7 + n)
    scale = 10.0 ** random.uniform(-3, 2, size=n)
    return [np.array(random.standard_normal(shape) * s, dtype, order=order) for s in scale]  # type: ignore[call-overload]


# --- transcriptions, in float64 ---------------------------------------------------------------------------------------


def adafactor(p: Any, grads: list[Any], **options: Any) -> Any:
    """The steps by the formula in torch's documentation, with V written out."""
    o = {"lr": 1e-2, "beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0, "weight_decay": 0.0, "maximize": False}
    o |= {"relative_step": True, "scale_parameter": True, **options}
    eps1 = np.finfo(p.dtype).eps if o["eps"][0] is None else o["eps"][0]
    p = p.astype(np.float64)
    rows: Any = 0
    columns: Any = 0
    v: Any = 0
    for t, g in enumerate(grads, 1):
        g = (-1 if o["maximize"] else 1) * g.astype(np.float64)
        beta = 1 - t ** o["beta2_decay"]
        rate = min(o["lr"], 1 / np.sqrt(t)) if o["relative_step"] else o["lr"]
        alpha = rate * (max(o["eps"][1], np.sqrt(np.mean(p**2))) if o["scale_parameter"] else 1)
        p = p - o["lr"] * o["weight_decay"] * p
        if p.ndim > 1:
            rows = beta * rows + (1 - beta) * np.mean(g**2, axis=-1, keepdims=True)
            columns = beta * columns + (1 - beta) * np.mean(g**2, axis=-2, keepdims=True)
            v = rows * columns / np.maximum(rows.mean(axis=-2, keepdims=True), eps1)
        else:
            v = beta * v + (1 - beta) * g**2
        u = g / np.maximum(np.sqrt(v), eps1)
        p = p - alpha * u / max(1, np.sqrt(np.mean(u**2)) / o["d"])
    return p


def adafactor_of_trainers(p: Any, grads: list[Any], lr: float, eps: float) -> Any:
    """With a fixed rate, after the code that trainers use: eps within the squares, factors by rows and columns."""
    p = p.astype(np.float64)
    rows, columns = np.zeros(p.shape[:-1]), np.zeros(p.shape[:-2] + p.shape[-1:])
    for t, g in enumerate(grads, 1):
        g = g.astype(np.float64)
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (g**2 + eps).mean(-1)
        columns = beta * columns + (1 - beta) * (g**2 + eps).mean(-2)
        by_row = 1 / np.sqrt(rows / rows.mean(-1, keepdims=True))
        u = by_row[..., None] / np.sqrt(columns)[..., None, :] * g
        p = p - lr * u / max(1, np.sqrt(np.mean(u**2)))
    return p


def muon(p: Any, grads: list[Any], **options: Any) -> Any:
    """The steps with the singular values themselves: the polynomial acts on each by itself."""
    o = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "adjust_lr_fn": None, "ns_steps": 5}
    o |= options
    p = p.astype(np.float64)
    m = np.zeros_like(p)
    for g in grads:
        m = o["momentum"] * m + (1 - o["momentum"]) * g
        u = o["momentum"] * m + (1 - o["momentum"]) * g if o["nesterov"] else m
        left, s, right = np.linalg.svd(u, full_matrices=False)
        s = s / max(np.sqrt(np.sum(s**2)), 1e-7)
        for _ in range(o["ns_steps"]):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        r, c = p.shape
        scales = {"match_rms_adamw": 0.2 * np.sqrt(max(r, c)), "spectral_unclamped": np.sqrt(r / c)}
        scale = scales.get(o["adjust_lr_fn"], np.sqrt(max(1, r / c)))
        p = (1 - o["lr"] * o["weight_decay"]) * p - o["lr"] * scale * (left * s) @ right
    return p


def stepped(optimizer: Any, grads: list[Any]) -> Any:
    """The array of an optimizer of one, after these gradients."""
    for g in grads:
        optimizer.step(grads=[g])
    return optimizer.param_groups[0]["params"][0].data


ADAFACTOR = [
    {},
    {"lr": 1.0, "beta2_decay": -0.5},
    {"weight_decay": 0.1, "d": 2.0, "eps": (1e-3, 0.1)},
    {"maximize": True, "eps": (0.5, 0.0)},
    {"relative_step": False, "lr": 0.1},
    {"scale_parameter": False},
    {"relative_step": False, "scale_parameter": False, "lr": 1e-3, "weight_decay": 0.1},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ADAFACTOR, ids=str)
def test_adafactor(options: dict[str, Any], dtype: str) -> None:
    """Per step a parameter is rounded twice and an update, at most lr-sized, a few times: some eps of the largest."""
    for shape, order in product(SHAPES, "CF"):
        p, *grads = arrays(shape, dtype, 21, order)
        expected = adafactor(p, grads, **options)
        tolerance = 100 * np.finfo(dtype).eps * (1 + np.abs(p).max())
        np.testing.assert_allclose(stepped(Adafactor([p], **options), grads), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adafactor_of_trainers(dtype: str) -> None:
    for shape in [(5, 4), (1, 9), (33, 70), (3, 5, 7)]:
        p, *grads = arrays(shape, dtype, 21)
        expected = adafactor_of_trainers(p, grads, 1e-3, 1e-30)
        options = {"relative_step": False, "scale_parameter": False, "eps": (1e-30, 1e-3)}
        tolerance = 100 * np.finfo(dtype).eps * (1 + np.abs(p).max())
        result = stepped(Adafactor([p], 1e-3, **options), grads)  # type: ignore[arg-type]
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adafactor_of_axes_in_any_order(dtype: str) -> None:
    """Memory order decides the order of sums and nothing else; the gradient may lie otherwise."""
    p, *grads = arrays((4, 3, 6, 5), dtype, 6)
    expected = stepped(Adafactor([p.copy()]), grads)
    for axes in [(0, 1, 3, 2), (1, 2, 3, 0), (3, 2, 1, 0), (0, 2, 3, 1)]:
        back = np.argsort(axes)
        q = np.ascontiguousarray(p.transpose(axes)).transpose(back)
        mine = [np.asfortranarray(g) for g in grads]
        np.testing.assert_allclose(stepped(Adafactor([q]), mine), expected, rtol=20 * np.finfo(dtype).eps, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 0), (0,), ()])
def test_adafactor_of_zero_gradients(shape: tuple[int, ...], dtype: str) -> None:
    """A gradient of 0 moves nothing, with an eps of 0 too; a NaN shows."""
    for eps in (None, 0.0, 1e-30):
        p = np.ones(shape, dtype)
        assert np.array_equal(stepped(Adafactor([p], eps=(eps, 1e-3)), [np.zeros(shape, dtype)]), np.ones(shape))
    if p.size:
        assert np.isnan(stepped(Adafactor([p]), [np.full(shape, np.nan, dtype)])).all()


MUON = [
    *({}, {"nesterov": False}, {"momentum": 0.0}, {"adjust_lr_fn": "spectral_unclamped"}),
    {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", MUON, ids=str)
def test_muon(options: dict[str, Any], dtype: str) -> None:
    """The polynomial multiplies a relative error of a singular value near 0 by 3.4 per iteration, 500 in all."""
    for shape, order in product([(1, 1), (5, 1), (1, 9), (8, 8), (33, 70), (70, 33)], "CF"):
        p, *grads = arrays(shape, dtype, 11, order)
        result = stepped(Muon([p], ns_dtype=dtype, **options), grads)
        tolerance = 2000 * np.finfo(dtype).eps * 1e-3 + 20 * np.finfo(dtype).eps * np.abs(p).max()
        np.testing.assert_allclose(result, muon(p * 0 + arrays(shape, dtype, 11, order)[0], grads, **options),
                                   rtol=0, atol=tolerance)  # fmt: skip


def test_muon_is_in_float32_by_default() -> None:
    p, *grads = arrays((6, 5), "float64", 4)
    by_default = stepped(Muon([p.copy()]), grads)
    assert np.array_equal(by_default, stepped(Muon([p.copy()], ns_dtype="float32"), grads))
    assert not np.array_equal(by_default, stepped(Muon([p.copy()], ns_dtype="float64"), grads))


def test_muon_adamw_has_the_bits_of_both() -> None:
    shapes = [(4, 5), (7,), (6, 3), (2, 3, 4)]
    values = [arrays(shape, "float32", 6) for shape in shapes]
    mine, theirs = ([v[0].copy() for v in values] for _ in range(2))
    groups = [{"params": mine[:2]}, {"params": mine[2:], "use_muon": False}]
    both = MuonAdamW(groups, lr=0.01, weight_decay=0.2, betas=(0.8, 0.9), momentum=0.9)
    first = Muon(theirs[:1], lr=0.01, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    second = AdamW(theirs[1:], lr=0.01, weight_decay=0.2, betas=(0.8, 0.9))
    for i in range(1, 6):
        grads = [v[i] for v in values]
        both.step(grads=grads)
        first.step(grads=grads[:1])
        second.step(grads=grads[1:])
    for p, q in zip(mine, theirs, strict=True):
        assert np.array_equal(p, q)
    assert [list(entry) for entry in both.state_dict()["state"].values()] == [
        ["momentum_buffer"],
        *[["step", "exp_avg", "exp_avg_sq"]] * 3,
    ]


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 3, 31), (2, 129, 33), (3, 5, 2049), (1, 300, 4100), (70, 2, 3)], ids=str
)
def test_passes(shape: tuple[int, ...], dtype: str, shared_among_threads: None) -> None:
    """Sums are right to the last bits of double, and the same for any number of threads and any level."""
    from importlib import import_module

    p, g, a, b = (arrays(s, dtype, 1)[0] for s in (shape, shape, shape[:2], shape[::2]))
    wide, square = p.astype(np.float64), g.astype(np.float64) ** 2
    most = float(np.median(np.abs(a)) * np.median(np.abs(b)))
    u = g * np.minimum(a[:, :, None] * b[:, None, :], p.dtype.type(most))
    results = []
    for level, threads in product(supported_levels(), (1, 2, 3)):
        passes = import_module(LEVELS[level])
        with pyopt.num_threads(threads):
            q = p.copy()
            job = MatrixJob(q, g)
            found = [*job.squares(passes.squares)]
            job.set_factors(a, b, most)
            found.append(job.total(passes.update_squares))
            found.append(dot(passes.product, p.reshape(-1), g.reshape(-1)))
            writes = Writes()
            writes.add_update(passes.update, job, 0.25, 0.75)
            writes.apply()
            results.append([*found, q])
    for each in results[1:]:
        for x, y in zip(each, results[0], strict=True):
            assert np.array_equal(x, y)
    rows, columns, own, update, inner, q = results[0]
    np.testing.assert_allclose(rows, square.sum(2), rtol=1e-13)
    np.testing.assert_allclose(columns, square.sum(1), rtol=1e-13)
    np.testing.assert_allclose(own, (wide**2).sum(), rtol=1e-13)
    np.testing.assert_allclose(update, (u.astype(np.float64) ** 2).sum(), rtol=1e-13)
    np.testing.assert_allclose(inner, (wide * g).sum(), rtol=1e-9, atol=1e-12 * np.abs(wide * g).sum())
    assert np.array_equal(q, p * p.dtype.type(0.75) - p.dtype.type(0.25) * u)


# --- L-BFGS -----------------------------------------------------------------------------------------------------------


class Rosenbrock:
    def __init__(self, dtype: str = "float64", n: int = 2) -> None:
        self.p = Parameter(np.tile([-1.5, 1.0], n // 2).astype(dtype))
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        x, y = self.p.data[::2].astype(np.float64), self.p.data[1::2].astype(np.float64)
        g = np.stack([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)], axis=1)
        self.p.grad = g.reshape(-1).astype(self.p.dtype)
        return float(np.sum(100 * (y - x**2) ** 2 + (1 - x) ** 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lbfgs_finds_the_minimum(dtype: str) -> None:
    f = Rosenbrock(dtype, 6)
    o = LBFGS([f.p], max_iter=100, tolerance_change=0.0, line_search_fn="strong_wolfe")
    first = o.step(f)
    assert first == 3 * 162.5
    np.testing.assert_allclose(f.p.data, 1, rtol=1e-3 if dtype == "float32" else 1e-7)
    assert o.state[f.p]["func_evals"] == f.calls < 60
    for line_search in (None, "strong_wolfe"):
        A = np.diag([1.0, 4.0, 9.0]) + 0.5
        p = Parameter(np.array([3.0, -2.0, 1.0]))

        def quadratic(p: Parameter = p, A: Any = A) -> float:
            p.grad = A @ p.data
            return float(0.5 * p.data @ A @ p.data)

        lr = 1 if line_search else 0.5
        LBFGS([p], lr, 100, tolerance_change=0.0, line_search_fn=line_search).step(quadratic)
        np.testing.assert_allclose(p.data, 0, atol=1e-6)


def test_lbfgs_solves_a_regression_as_the_normal_equations_do() -> None:
    """Two parameters of different shapes and memory orders, as one vector."""
    random = np.random.default_rng(0)
    x, y = random.standard_normal((40, 3)), random.standard_normal((40, 2))
    w, b = Parameter(np.asfortranarray(np.zeros((3, 2)))), Parameter(np.zeros(2))

    def closure() -> float:
        r = x @ w.data + b.data - y
        w.grad, b.grad = x.T @ r, r.sum(0)
        return float(0.5 * np.sum(r**2))

    LBFGS([w, b], max_iter=50, tolerance_change=0.0, line_search_fn="strong_wolfe").step(closure)
    expected = np.linalg.lstsq(np.c_[x, np.ones(40)], y, rcond=None)[0]
    np.testing.assert_allclose(np.r_[w.data, [b.data]], expected, atol=1e-7)


def test_lbfgs_has_the_same_bits_for_any_threads(shared_among_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        f = Rosenbrock("float32", 5000)
        with pyopt.num_threads(threads):
            LBFGS([f.p], max_iter=30, line_search_fn="strong_wolfe", history_size=5).step(f)
        results.append(f.p.data)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_climbs_as_it_descends(line_search: str | None) -> None:
    """To the bit what it does with the negative loss and gradient; it returns the closure's own number."""
    results = []
    for maximize in (False, True):
        f = Rosenbrock()

        def closure(f: Any = f, sign: int = -1 if maximize else 1) -> float:
            loss = f()
            f.p.grad *= sign
            return sign * loss

        o = LBFGS([f.p], 0.1, 5, line_search_fn=line_search, maximize=maximize)
        losses = [o.step(closure) * (-1 if maximize else 1) for _ in range(3)]
        assert losses[2] < losses[0]
        state = o.state_dict()["state"]
        results.append((losses, f.p.data, f.calls, state))
    assert same(results[0], results[1])


def test_lbfgs_refuses() -> None:
    p, q = Parameter(np.ones(2)), Parameter(np.ones(2))
    o = LBFGS([p])
    with pytest.raises(ValueError, match="one param group"):
        o.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match="one param group"):
        LBFGS([{"params": [p]}, {"params": [q]}])
    with pytest.raises(TypeError, match="closure is a NoneType, must be callable"):
        o.step()
    with pytest.raises(TypeError, match="grads"):
        o.step(lambda: 1.0, grads=[np.ones(2)])
    for bad in ({"max_iter": 0}, {"max_eval": 0}, {"history_size": 0}, {"line_search_fn": "armijo"}, {"lr": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LBFGS([p], **bad)  # type: ignore[arg-type]

    def rebinding() -> float:
        p.data = np.zeros(2)
        p.grad = np.ones(2)
        return 1.0

    with pytest.raises(RuntimeError, match="another array"):
        o.step(rebinding)


# --- as steps of this package -----------------------------------------------------------------------------------------

FOUR = [(Adafactor, {}), (Muon, {}), (MuonAdamW, {}), (LBFGS, {"lr": 0.01, "max_iter": 3})]
four = pytest.mark.parametrize("cls, options", FOUR, ids=[cls.__name__ for cls, _ in FOUR])
three = pytest.mark.parametrize("cls, options", FOUR[:3], ids=[cls.__name__ for cls, _ in FOUR[:3]])


def new(cls: Any, options: dict[str, Any]) -> tuple[Any, list[Parameter]]:
    shapes = [(4, 5), (6, 3)] if cls is Muon else [(4, 5), (6, 3), (7,)]
    params = [Parameter(arrays(shape, "float32", 1)[0]) for shape in shapes]
    return cls(params, **options), params


def closure_of(params: list[Parameter]) -> Any:
    """The gradients of a quadratic."""

    def closure() -> float:
        for i, p in enumerate(params, 1):
            p.grad = p.data * np.float32(i)
        return float(sum(i * np.sum(p.data.astype(np.float64) ** 2) / 2 for i, p in enumerate(params, 1)))

    return closure


def everything(o: Any, params: list[Parameter]) -> Any:
    return copy.deepcopy(([p.data for p in params], o.state_dict()))


def same(a: Any, b: Any) -> bool:
    return pickle.dumps(a) == pickle.dumps(b)


@four
def test_goes_on_from_a_checkpoint(cls: Any, options: dict[str, Any]) -> None:
    o, params = new(cls, options)
    for _ in range(3):
        o.step(closure_of(params))
    saved = pickle.loads(pickle.dumps(o.state_dict()))
    twin = [Parameter(p.data.copy()) for p in params]
    q = cls(twin, lr=0.5)
    q.load_state_dict(saved)
    for _ in range(3):
        o.step(closure_of(params))
        q.step(closure_of(twin))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(params, twin, strict=True))
    assert same(o.state_dict(), q.state_dict())
    deep, (first, *_) = (lambda c: (c, c.param_groups[0]["params"]))(copy.deepcopy(o))
    o.step(closure_of(params))
    deep.step(closure_of(deep.param_groups[0]["params"]))
    assert np.array_equal(first.data, params[0].data)


@three
def test_an_error_in_the_middle_changes_nothing(cls: Any, options: dict[str, Any], monkeypatch: Any) -> None:
    """The last parameter fails, in a first step and a later one: when it is prepared, by its gradient, its state."""
    for steps in (0, 2):
        o, params = new(cls, options)
        for _ in range(steps):
            o.step(closure_of(params))
        closure_of(params)()
        before = everything(o, params)
        prepare = cls.prepare.__func__
        calls = []

        def stop(klass: Any, *args: Any, prepare: Any = prepare, calls: Any = calls) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            prepare(klass, *args)

        with monkeypatch.context() as patch:
            patch.setattr(cls, "prepare", classmethod(stop))
            with pytest.raises(KeyboardInterrupt):
                o.step()
        assert len(calls) == 2 and same(everything(o, params), before)
        params[-1].grad = np.ones(3)
        with pytest.raises(TypeError, match="gradient has dtype float64"):
            o.step()
        assert same(everything(o, params), before)
        entry = o.state.pop(params[-1], {})
        o.state[params[-1]] = [entry]
        with pytest.raises(TypeError, match="its state is a list, must be a dict"):
            o.step()
        o.state[params[-1]] = entry
        closure_of(params)()
        if steps:
            name = list(o.state[params[-1]])[-1]
            array = o.state[params[-1]][name]
            o.state[params[-1]][name] = array[..., :-1]
            with pytest.raises(ValueError, match=f"state {name!r} has shape"):
                o.step()
            o.state[params[-1]][name] = o.state[params[0]][
                next(iter({"row_var", "momentum_buffer"} & {*o.state[params[0]]}))
            ]
            with pytest.raises((ValueError, TypeError)):
                o.step()
            o.state[params[-1]][name] = array
        assert same(everything(o, params), before)
        o.step()
        assert not same(everything(o, params), before)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_a_closure_that_raises_changes_nothing(line_search: str | None) -> None:
    for steps, calls in product((0, 2), range(4)):
        f = Rosenbrock()
        o = LBFGS([f.p], max_iter=4, max_eval=10, line_search_fn=line_search)
        for _ in range(steps):
            o.step(f)
        before = everything(o, [f.p])
        left = iter(range(calls))

        def closure(f: Any = f, left: Any = left) -> float:
            value = f()
            if next(left, None) is None:
                raise KeyboardInterrupt
            return float(value)

        with pytest.raises(KeyboardInterrupt):
            o.step(closure)
        assert same(everything(o, [f.p]), before)


@three
def test_what_shares_memory_is_refused(cls: Any, options: dict[str, Any]) -> None:
    o, params = new(cls, options)
    o.step(closure_of(params))
    name = next(name for name in o.state[params[0]] if name != "step")
    state = o.state[params[0]][name]
    o.state[params[0]][name] = params[1].data.reshape(-1)[: state.size].reshape(state.shape) if state.size <= 18 else (
        params[0].data
    )  # fmt: skip
    before = [p.data.copy() for p in params]
    with pytest.raises(ValueError, match="share"):
        o.step(closure_of(params))
    assert all(np.array_equal(p.data, b) for p, b in zip(params, before, strict=True))


@three
def test_a_gradient_may_lie_in_what_is_written(cls: Any, options: dict[str, Any]) -> None:
    o, params = new(cls, options)
    q, others = new(cls, options)
    for _ in range(3):
        o.step(grads=[p.data for p in params])
        q.step(grads=[p.data.copy() for p in others])
    assert all(np.array_equal(a.data, b.data) for a, b in zip(params, others, strict=True))


@three
def test_same_bits_for_any_threads(cls: Any, options: dict[str, Any], shared_among_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        params = [Parameter(arrays((300, 90), "float32", 1)[0])]
        o = cls(params, **options)
        with pyopt.num_threads(threads):
            for _ in range(4):
                o.step(closure_of(params))
        results.append(everything(o, params))
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_a_parameter_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter 1 has shape \(3,\), must be a matrix for Muon"):
        Muon([np.ones((2, 2)), np.ones(3)])
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(3,\), must be a matrix with use_muon == True"):
        MuonAdamW([np.ones(3)], use_muon=True)
    o = Muon([np.ones((2, 2))])
    with pytest.raises(ValueError, match="parameter 1"):
        o.add_param_group({"params": [np.ones(3)]})
    assert len(o.param_groups) == 1
    o.step(grads=[np.ones((2, 2))])


@pytest.mark.parametrize(
    "cls, options",
    [
        (Adafactor, {"lr": -1.0}),
        (Adafactor, {"beta2_decay": 0.1}),
        (Adafactor, {"eps": (-1.0, 0.0)}),
        (Adafactor, {"eps": (None, None)}),
        (Adafactor, {"d": 0.5}),
        (Adafactor, {"weight_decay": float("nan")}),
        (Adafactor, {"relative_step": 1}),
        (Muon, {"momentum": 1.5}),
        (Muon, {"ns_coefficients": (1.0, 2.0)}),
        (Muon, {"ns_steps": 100}),
        (Muon, {"ns_steps": 2.0}),
        (Muon, {"adjust_lr_fn": "other"}),
        (Muon, {"ns_dtype": "bfloat16"}),
        (MuonAdamW, {"use_muon": 1}),
        (MuonAdamW, {"betas": (0.9, 1.0)}),
    ],
    ids=str,
)
def test_options_out_of_bounds(cls: Any, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        cls([np.ones((2, 2))], **options)


def test_checkpoints_of_others_are_refused() -> None:
    o, params = new(Adafactor, {})
    o.step(closure_of(params))
    before = everything(o, params)
    for change, error in (
        (lambda s: s["state"][0].pop("row_var"), KeyError),
        (lambda s: s["state"][0].pop("step"), KeyError),
        (lambda s: s["state"][0].update(row_var=np.zeros((5, 1), np.float32)), ValueError),
        (lambda s: s["state"][2].update(row_var=np.zeros((7, 1), np.float32)), ValueError),
        (lambda s: s["param_groups"][0].update(d=0.1), ValueError),
    ):
        saved = o.state_dict()
        change(saved)  # type: ignore[no-untyped-call]
        with pytest.raises(error):
            o.load_state_dict(saved)
        assert same(everything(o, params), before)
    f = Rosenbrock()
    o = LBFGS([f.p], max_iter=3)
    o.step(f)
    before = everything(o, [f.p])
    for change, error, message in (
        (
            lambda s: s.update(d=np.zeros(3)),
            ValueError,
            r"holds an array of shape \(3,\), must be floats of shape \(2,\)",
        ),
        (lambda s: s.pop("H_diag"), KeyError, "state has no 'H_diag', only"),
        (lambda s: s["ro"].pop(), TypeError, "'old_dirs', 'old_stps' and 'ro' must be lists of one length"),
    ):
        saved = o.state_dict()
        change(saved["state"][0])  # type: ignore[no-untyped-call]
        with pytest.raises(error, match=message):
            o.load_state_dict(saved)
        assert same(everything(o, [f.p]), before)


def test_state_that_was_changed_by_hand_is_refused() -> None:
    o, params = new(Adafactor, {})
    o.step(closure_of(params))
    state = o.state[params[0]]
    for name, value, error, message in (
        ("step", None, KeyError, "parameter 0: state has no 'step', only"),
        ("row_var", np.zeros((8, 1))[::2], TypeError, "has dtype float64"),
        ("row_var", np.repeat(state["row_var"], 2, axis=0)[::2], ValueError, "must be (in C order|dense)"),
    ):
        kept = dict(state)
        state.pop(name) if value is None else state.update({name: value})
        before = [p.data.copy() for p in params]
        with pytest.raises(error, match=message):
            o.step()
        assert all((p.data == data).all() for p, data in zip(params, before, strict=True))
        state.update(kept)
    o.step()


def test_lbfgs_at_the_minimum_stays() -> None:
    p = Parameter(np.ones(3))

    def flat() -> float:
        p.grad = np.zeros(3)
        return 2.0

    o = LBFGS([p])
    assert o.step(flat) == 2 and p.data.tolist() == [1, 1, 1] and o.state[p]["func_evals"] == 1


def test_coefficients_of_muon_are_three() -> None:
    with pytest.raises(TypeError, match=r"ns_coefficients == \(1.0, 2.0\), must be three numbers"):
        Muon([np.ones((2, 2))], ns_coefficients=(1.0, 2.0))


def test_an_own_entry_of_the_state_stays() -> None:
    o, params = new(Adafactor, {})
    o.state[params[0]]["mine"] = 5
    o.step(closure_of(params))
    assert list(o.state[params[0]]) == ["mine", "step", "row_var", "col_var"]
    o.load_state_dict(o.state_dict())
    assert o.state[params[0]]["mine"] == 5


def test_kernels_have_the_passes_of_every_level() -> None:
    assert all(hasattr(kernels, name) for name in ("squares", "update_squares", "update", "product"))
