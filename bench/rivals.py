"""The contestants: nine update rules, each as pyopt and everybody else would run it, on the same arrays.

All contestants of one comparison share one set of `Tensors` where they can (all but optax, and torch when told to use
its own allocator): where pages lie changes the speed of a machine more than most kernels do. They keep NumPy's memory,
for which NumPy asks the kernel for huge pages; torch's own allocator does not.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from itertools import count as count_from
from math import sqrt
from typing import Any

import numpy as np

import pyopt
from pyopt import Parameter
from roof import Roof

try:
    from numba import prange
except ImportError:
    prange = range

Array = np.ndarray[Any, Any]


class Tensors:
    """Parameters, gradients and state; every array is written once, so that its pages have their place.

    Gradients lie at -1 to -0.5 and 0.5 to 1: no square, and no moment while they change their signs, is denormal.
    """

    def __init__(self, count: int, size: int, states: int, dtype: Any) -> None:
        random = np.random.default_rng(0)
        self.size, self.dtype = size, np.dtype(dtype)
        self.params: list[Array] = [random.random(size, self.dtype) for _ in range(count)]
        self.grads: list[Array] = [random.random(size, self.dtype) for _ in range(count)]
        self.states: list[list[Array]] = [[np.full_like(p, 0) for _ in range(states)] for p in self.params]
        for g in self.grads:
            g *= 0.5
            g += 0.5
            np.negative(g[::2], out=g[::2])

    def flip(self) -> None:
        for g in self.grads:
            np.negative(g, out=g)

    def rows(self) -> list[tuple[Array, Array, list[Array]]]:
        return list(zip(self.params, self.grads, self.states, strict=True))


@dataclass(frozen=True)
class Contestant:
    """One way to make a step: `flip` changes the sign of the gradients, outside of what is timed."""

    step: Callable[[], Any]
    flip: Callable[[], Any]
    params: Callable[[], Iterable[Array]]


# --- naive NumPy: the formulas as one writes them; s is the list of state arrays, t the number of the step ------------


def naive_sgd(p: Array, g: Array, s: list[Array], t: int) -> None:
    p -= 1e-3 * g


def naive_momentum(p: Array, g: Array, s: list[Array], t: int) -> None:
    s[0] = 0.9 * s[0] + g
    p -= 1e-3 * s[0]


def naive_adam(p: Array, g: Array, s: list[Array], t: int, weight_decay: float = 0, amsgrad: bool = False) -> None:
    if weight_decay:
        p *= 1 - 1e-3 * weight_decay
    s[0] = 0.9 * s[0] + 0.1 * g
    s[1] = 0.999 * s[1] + 0.001 * g**2
    v = s[1]
    if amsgrad:
        v = s[2] = np.maximum(s[2], s[1])
    p -= 1e-3 * (s[0] / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def naive_rmsprop(p: Array, g: Array, s: list[Array], t: int) -> None:
    s[0] = 0.99 * s[0] + 0.01 * g**2
    p -= 1e-2 * g / (np.sqrt(s[0]) + 1e-8)


def naive_rmsprop_all(p: Array, g: Array, s: list[Array], t: int) -> None:
    s[0] = 0.99 * s[0] + 0.01 * g**2
    s[2] = 0.99 * s[2] + 0.01 * g
    s[1] = 0.9 * s[1] + g / (np.sqrt(s[0] - s[2] ** 2) + 1e-8)
    p -= 1e-2 * s[1]


def naive_adagrad(p: Array, g: Array, s: list[Array], t: int) -> None:
    s[0] = s[0] + g**2
    p -= 1e-2 * g / (np.sqrt(s[0]) + 1e-10)


def naive_lion(p: Array, g: Array, s: list[Array], t: int) -> None:
    p -= 1e-4 * np.sign(0.9 * s[0] + 0.1 * g)
    s[0] = 0.99 * s[0] + 0.01 * g


# --- NumPy at its best: in place, as few sweeps as the formula allows, over blocks that stay in cache; a is scratch ---


def place_sgd(p: Array, g: Array, s: Sequence[Array], a: Array, t: int) -> None:
    np.multiply(g, 1e-3, out=a)
    np.subtract(p, a, out=p)


def place_momentum(p: Array, g: Array, s: Sequence[Array], a: Array, t: int) -> None:
    (b,) = s
    np.multiply(b, 0.9, out=b)
    np.add(b, g, out=b)
    np.multiply(b, 1e-3, out=a)
    np.subtract(p, a, out=p)


def place_adam(
    p: Array, g: Array, s: Sequence[Array], a: Array, t: int, weight_decay: float = 0, amsgrad: bool = False
) -> None:
    m, v = s[:2]
    if weight_decay:
        np.multiply(p, 1 - 1e-3 * weight_decay, out=p)
    np.multiply(m, 0.9, out=m)
    np.multiply(g, 0.1, out=a)
    np.add(m, a, out=m)
    np.multiply(v, 0.999, out=v)
    np.multiply(a, a, out=a)
    np.multiply(a, 0.001 / 0.1**2, out=a)
    np.add(v, a, out=v)
    if amsgrad:
        v = np.maximum(s[2], v, out=s[2])
    bias2 = sqrt(1 - 0.999**t)
    np.sqrt(v, out=a)
    np.add(a, 1e-8 * bias2, out=a)
    np.divide(m, a, out=a)
    np.multiply(a, 1e-3 * bias2 / (1 - 0.9**t), out=a)
    np.subtract(p, a, out=p)


def place_rmsprop(p: Array, g: Array, s: Sequence[Array], a: Array, t: int) -> None:
    (v,) = s
    np.multiply(v, 0.99, out=v)
    np.multiply(g, 0.1, out=a)
    np.multiply(a, a, out=a)
    np.add(v, a, out=v)
    np.sqrt(v, out=a)
    np.add(a, 1e-8, out=a)
    np.divide(g, a, out=a)
    np.multiply(a, 1e-2, out=a)
    np.subtract(p, a, out=p)


def place_rmsprop_all(p: Array, g: Array, s: Sequence[Array], a: Array, t: int) -> None:
    v, b, mean = s
    np.multiply(v, 0.99, out=v)
    np.multiply(g, 0.1, out=a)
    np.multiply(a, a, out=a)
    np.add(v, a, out=v)
    np.multiply(mean, 0.99, out=mean)
    np.multiply(g, 0.01, out=a)
    np.add(mean, a, out=mean)
    np.multiply(mean, mean, out=a)
    np.subtract(v, a, out=a)
    np.sqrt(a, out=a)
    np.add(a, 1e-8, out=a)
    np.divide(g, a, out=a)
    np.multiply(b, 0.9, out=b)
    np.add(b, a, out=b)
    np.multiply(b, 1e-2, out=a)
    np.subtract(p, a, out=p)


def place_adagrad(p: Array, g: Array, s: Sequence[Array], a: Array, t: int) -> None:
    (v,) = s
    np.multiply(g, g, out=a)
    np.add(v, a, out=v)
    np.sqrt(v, out=a)
    np.add(a, 1e-10, out=a)
    np.divide(g, a, out=a)
    np.multiply(a, 1e-2, out=a)
    np.subtract(p, a, out=p)


def place_lion(p: Array, g: Array, s: Sequence[Array], a: Array, t: int) -> None:
    (m,) = s
    np.subtract(m, g, out=a)  # c = 0.9 m + 0.1 g = 0.9 (m - g) + g, and m = 0.99 (m - g) + g
    np.multiply(a, 0.99, out=m)
    np.add(m, g, out=m)
    np.multiply(a, 0.9, out=a)
    np.add(a, g, out=a)
    np.sign(a, out=a)
    np.multiply(a, 1e-4, out=a)
    np.subtract(p, a, out=p)


# --- numba: one loop each; all numbers come in the dtype of the arrays, so that none is widened to double -------------


def loop_sgd(p, g, lr):  # type: ignore[no-untyped-def]
    for i in prange(p.size):
        p[i] -= lr * g[i]


def loop_momentum(p, g, b, lr, momentum):  # type: ignore[no-untyped-def]
    for i in prange(p.size):
        b[i] = momentum * b[i] + g[i]
        p[i] -= lr * b[i]


def loop_adam(p, g, m, v, size, weight1, beta2, weight2, bias2, eps, decay):  # type: ignore[no-untyped-def]
    for i in prange(p.size):
        m[i] += weight1 * (g[i] - m[i])
        v[i] = beta2 * v[i] + weight2 * g[i] * g[i]
        p[i] = decay * p[i] - size * m[i] / (np.sqrt(v[i]) / bias2 + eps)


def loop_amsgrad(p, g, m, v, u, size, weight1, beta2, weight2, bias2, eps, decay):  # type: ignore[no-untyped-def]
    for i in prange(p.size):
        m[i] += weight1 * (g[i] - m[i])
        v[i] = beta2 * v[i] + weight2 * g[i] * g[i]
        u[i] = max(u[i], v[i])
        p[i] = decay * p[i] - size * m[i] / (np.sqrt(u[i]) / bias2 + eps)


def loop_rmsprop(p, g, v, lr, alpha, weight, eps):  # type: ignore[no-untyped-def]
    for i in prange(p.size):
        v[i] = alpha * v[i] + weight * g[i] * g[i]
        p[i] -= lr * g[i] / (np.sqrt(v[i]) + eps)


def loop_rmsprop_all(p, g, v, b, a, lr, alpha, weight, eps, momentum):  # type: ignore[no-untyped-def]
    for i in prange(p.size):
        v[i] = alpha * v[i] + weight * g[i] * g[i]
        a[i] += weight * (g[i] - a[i])
        b[i] = momentum * b[i] + g[i] / (np.sqrt(v[i] - a[i] * a[i]) + eps)
        p[i] -= lr * b[i]


def loop_adagrad(p, g, v, lr, eps):  # type: ignore[no-untyped-def]
    for i in prange(p.size):
        v[i] += g[i] * g[i]
        p[i] -= lr * g[i] / (np.sqrt(v[i]) + eps)


def loop_lion(p, g, m, lr, beta1, weight1, beta2, weight2, zero):  # type: ignore[no-untyped-def]
    for i in prange(p.size):
        c = beta1 * m[i] + weight1 * g[i]
        m[i] = beta2 * m[i] + weight2 * g[i]
        p[i] -= lr if c > zero else (-lr if c < zero else zero)


def adam_numbers(t: int, decay: float = 1) -> tuple[float, ...]:
    return 1e-3 / (1 - 0.9**t), 0.1, 0.999, 0.001, sqrt(1 - 0.999**t), 1e-8, decay


# --- the cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One optimizer and what every contestant needs of it; `kind` and `options` are those of pyopt and of torch."""

    name: str
    kind: str
    states: tuple[str, ...]  # pyopt's and torch's names of the state arrays, in the order of the rule
    naive: Callable[..., None]
    place: Callable[..., None]
    loop: Callable[..., None]
    numbers: Callable[[int], tuple[float, ...]]  # of `loop`, for step t
    optax: Callable[[Any], Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def streams(self) -> int:
        """Arrays that a step must read or write: p and all state both ways, g one way."""
        return 3 + 2 * len(self.states)

    def optimizer(self, params: list[Parameter]) -> pyopt.Optimizer:
        return getattr(pyopt, self.kind)(params, **self.options)  # type: ignore[no-any-return]


MOMENTS = ("exp_avg", "exp_avg_sq")
CASES = {
    case.name: case
    for case in [
        Case("SGD", "SGD", (), naive_sgd, place_sgd, loop_sgd, lambda t: (1e-3,), lambda x: x.sgd(1e-3)),
        Case(
            "SGD momentum", "SGD", ("momentum_buffer",), naive_momentum, place_momentum, loop_momentum,
            lambda t: (1e-3, 0.9), lambda x: x.sgd(1e-3, momentum=0.9), {"momentum": 0.9},
        ),
        Case("Adam", "Adam", MOMENTS, naive_adam, place_adam, loop_adam, adam_numbers, lambda x: x.adam(1e-3)),
        Case(
            "Adam amsgrad", "Adam", (*MOMENTS, "max_exp_avg_sq"), partial(naive_adam, amsgrad=True),
            partial(place_adam, amsgrad=True), loop_amsgrad, adam_numbers, lambda x: x.amsgrad(1e-3),
            {"amsgrad": True},
        ),
        Case(
            "AdamW", "AdamW", MOMENTS, partial(naive_adam, weight_decay=1e-2), partial(place_adam, weight_decay=1e-2),
            loop_adam, partial(adam_numbers, decay=1 - 1e-3 * 1e-2), lambda x: x.adamw(1e-3, weight_decay=1e-2),
        ),
        Case(
            "RMSprop", "RMSprop", ("square_avg",), naive_rmsprop, place_rmsprop, loop_rmsprop,
            lambda t: (1e-2, 0.99, 0.01, 1e-8), lambda x: x.rmsprop(1e-2, decay=0.99, eps_in_sqrt=False),
        ),
        Case(
            "RMSprop centered momentum", "RMSprop", ("square_avg", "momentum_buffer", "grad_avg"),
            naive_rmsprop_all, place_rmsprop_all, loop_rmsprop_all, lambda t: (1e-2, 0.99, 0.01, 1e-8, 0.9),
            lambda x: x.rmsprop(1e-2, decay=0.99, eps_in_sqrt=False, centered=True, momentum=0.9),
            {"centered": True, "momentum": 0.9},
        ),
        Case(
            "Adagrad", "Adagrad", ("sum",), naive_adagrad, place_adagrad, loop_adagrad, lambda t: (1e-2, 1e-10),
            lambda x: x.adagrad(1e-2, initial_accumulator_value=0, eps=1e-10),
        ),
        Case(
            "Lion", "Lion", ("exp_avg",), naive_lion, place_lion, loop_lion,
            lambda t: (1e-4, 0.9, 0.1, 0.99, 0.01, 0), lambda x: x.lion(1e-4, weight_decay=0),
        ),
    ]
}  # fmt: skip


# --- the contestants --------------------------------------------------------------------------------------------------


def pyopt_optimizer(case: Case, tensors: Tensors) -> pyopt.Optimizer:
    """pyopt's optimizer with the given arrays for parameters, gradients and state."""
    opt = case.optimizer([Parameter(p, g) for p, g, _ in tensors.rows()])
    for p, state in zip(opt.param_groups[0]["params"], tensors.states, strict=True):
        if state:
            step = {"step": 0} if opt.counts_steps else {}
            opt.state[p] = {**step, **dict(zip(case.states, state, strict=True))}
    return opt


def roof_of(opt: pyopt.Optimizer, states: list[list[Array]]) -> Roof:
    """The roof on an optimizer's own buffers."""
    params = opt.param_groups[0]["params"]
    roof = Roof(params, len(states[0]))
    for p, state in zip(params, states, strict=True):
        roof.state[p] = dict(zip("stuv", state, strict=False))
    return roof


def make_pyopt(case: Case, tensors: Tensors) -> Contestant:
    return Contestant(pyopt_optimizer(case, tensors).step, tensors.flip, lambda: tensors.params)


def make_roof(case: Case, tensors: Tensors) -> Contestant:
    roof = roof_of(pyopt_optimizer(case, tensors), tensors.states)
    return Contestant(roof.step, tensors.flip, lambda: tensors.params)


def make_naive(case: Case, tensors: Tensors) -> Contestant:
    rows = [(p, g, list(s)) for p, g, s in tensors.rows()]
    steps = count_from(1)

    def step() -> None:
        t = next(steps)
        for p, g, s in rows:
            case.naive(p, g, s, t)

    return Contestant(step, tensors.flip, lambda: tensors.params)


BLOCK = 1 << 18  # bytes of one stream: the fastest of 4 KiB to 4 MiB, 1.5 times as fast as no blocks


def make_in_place(case: Case, tensors: Tensors) -> Contestant:
    n = BLOCK // tensors.dtype.itemsize
    scratch = np.empty(min(n, tensors.size), tensors.dtype)
    blocks = []
    for p, g, s in tensors.rows():
        for i in range(0, p.size, n):
            block = p[i : i + n]
            blocks.append((block, g[i : i + n], [x[i : i + n] for x in s], scratch[: block.size]))
    steps = count_from(1)

    def step() -> None:
        t = next(steps)
        for p, g, s, a in blocks:
            case.place(p, g, s, a, t)

    return Contestant(step, tensors.flip, lambda: tensors.params)


def torch_optimizer(case: Case, tensors: Tensors, memory: str = "numpy", **how: bool) -> Any:
    """torch's optimizer with the given arrays, or with copies of them in memory of its own."""
    import torch

    def tensor(array: Array) -> Any:
        shared = torch.from_numpy(array)
        return shared.clone() if memory == "torch" else shared

    params = [tensor(p).requires_grad_() for p in tensors.params]
    opt = getattr(torch.optim, case.kind)(params, **case.options, **how)
    for p, g, state in zip(params, tensors.grads, tensors.states, strict=True):
        p.grad = tensor(g)
        opt.state[p] = {"step": torch.tensor(0.0), **dict(zip(case.states, map(tensor, state), strict=True))}
    return opt


def make_torch(case: Case, tensors: Tensors, memory: str, **how: bool) -> Contestant:
    opt = torch_optimizer(case, tensors, memory, **how)
    params = opt.param_groups[0]["params"]

    def flip() -> None:
        for p in params:
            p.grad.neg_()

    return Contestant(opt.step, flip, lambda: [p.detach().numpy() for p in params])


@cache
def compiled(loop: Callable[..., None], parallel: bool) -> Any:
    import numba

    return numba.njit(loop, parallel=parallel, error_model="numpy")  # no cache: it takes the one for the other


def make_numba(case: Case, tensors: Tensors) -> Contestant:
    loop = compiled(case.loop, tensors.size >= 1 << 15)  # below, waking the threads costs more than they bring
    rows = [(p, g, *s) for p, g, s in tensors.rows()]
    steps = count_from(1)

    def step() -> None:
        numbers = tuple(map(tensors.dtype.type, case.numbers(next(steps))))
        for row in rows:
            loop(*row, *numbers)

    return Contestant(step, tensors.flip, lambda: tensors.params)


def make_optax(case: Case, tensors: Tensors) -> Contestant:
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    opt = case.optax(optax)
    params = [jax.numpy.array(p) for p in tensors.params]
    grads = [jax.numpy.array(g) for g in tensors.grads]
    gradients = [grads, [-g for g in grads]]
    state = opt.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(update(params, state, gradients[0]))

    return Contestant(step, gradients.reverse, lambda: map(np.asarray, params))


MAKERS: dict[str, Callable[..., Contestant]] = {
    "pyopt": make_pyopt,
    "roof": make_roof,
    "NumPy": make_naive,
    "NumPy in place": make_in_place,
    "torch": make_torch,
    "torch foreach": partial(make_torch, foreach=True),
    "torch fused": partial(make_torch, fused=True),
    "numba": make_numba,
    "optax": make_optax,
}
PACKAGES = {name: name.split()[0] for name in MAKERS if name.startswith(("torch", "numba", "optax"))}


def has(case: Case, name: str) -> bool:
    """Whether there is such a contestant here."""
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        return False
    if not name.startswith("torch"):
        return True
    import torch

    kind = getattr(torch.optim, case.kind, None)
    return kind is not None and (name != "torch fused" or "fused" in inspect.signature(kind).parameters)


def make(case: Case, name: str, tensors: Tensors, torch_memory: str = "numpy") -> Contestant:
    return MAKERS[name](case, tensors, **({"memory": torch_memory} if name.startswith("torch") else {}))


def available(case: Case, names: Iterable[str] = MAKERS) -> list[str]:
    return [name for name in names if has(case, name)]


def check(case: Case, dtype: Any, names: Iterable[str] = MAKERS, torch_memory: str = "numpy") -> None:
    """Raise unless all contestants change the parameters alike over three steps, and the roof not at all."""

    def change(name: str) -> Array:
        tensors = Tensors(2, BLOCK // np.dtype(dtype).itemsize + 17, len(case.states), dtype)
        before = np.concatenate(tensors.params)
        contestant = make(case, name, tensors, torch_memory)
        for _ in range(3):
            contestant.step()
            contestant.flip()
        after = list(contestant.params())
        if any(p.dtype != tensors.dtype for p in after):
            raise AssertionError(f"{name} does {case.name} in {after[0].dtype}, must be {tensors.dtype}")
        return np.concatenate(after) - before

    right = change("pyopt")
    tolerance = 1e-3 * float(np.abs(right).max()) + 4 * float(np.finfo(dtype).eps)
    for name in available(case, names):
        off = float(np.abs(change(name) - (0 if name == "roof" else right)).max())
        if not off <= tolerance:
            raise AssertionError(f"{name} does {case.name} ({dtype}) wrong: {off:.2g} off, must be <= {tolerance:.2g}")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(n: int) -> None:
    """The number of threads of everybody but NumPy, which has one, and optax, which takes all cores."""
    pyopt.set_num_threads(n)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)
    if "numba" in sys.modules:
        sys.modules["numba"].set_num_threads(n)
