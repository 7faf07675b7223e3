"""Steps inside jax.jit: the bits of the optimizers on NumPy arrays, in the memory that was donated."""

from __future__ import annotations

import copy
import doctest
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import pyopt  # noqa: E402
import pyopt.jax  # noqa: E402
from pyopt import Parameter  # noqa: E402

SHAPES = {"a": [(3, 5), ()], "b": (0, 4), "c": {"w": (300, 200), "b": (7,)}}


def tree_of(rng: np.random.Generator, dtype: str = "float32") -> Any:
    return jax.tree_util.tree_map(
        lambda shape: rng.standard_normal(shape).astype(dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def leaves(tree: Any) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(x) for x in jax.tree_util.tree_leaves(tree)]


def on_device(tree: Any) -> Any:
    return jax.tree_util.tree_map(lambda x: jnp.array(x, copy=True), tree)


def compare(name: str, options: dict[str, Any], rates: list[Any], dtype: str = "float32", flat: bool = False) -> None:
    """The same steps by both."""
    rng = np.random.default_rng(0)
    start = tree_of(rng, dtype)
    params = [Parameter(p.copy()) for p in leaves(start)]
    optimizer = getattr(pyopt, name)(params, **options)
    ours = getattr(pyopt.jax, name)(**options)
    step = jax.jit(ours.step, donate_argnums=(0, 2))
    tree = on_device(start)
    state = ours.init(tree, flat)
    for rate in rates:
        grads = tree_of(rng, dtype)
        if rate is not None:
            optimizer.param_groups[0]["lr"] = float(np.float32(rate))
        optimizer.step(grads=leaves(grads))
        tree, state = step(tree, grads, state) if rate is None else step(tree, grads, state, rate)
    for p, x in zip(params, leaves(tree), strict=True):
        assert p.data.tobytes() == x.tobytes()
    for key in optimizer.state[params[0]].keys() - {"step"}:
        own = [np.asarray(optimizer.state[p][key]).tobytes() for p in params]
        if flat:
            assert np.asarray(state["flat"][dtype][key]).tobytes() == b"".join(own), key
        else:
            assert [x.tobytes() for x in leaves(state[key])] == own, key
    assert int(state["step"]) == len(rates)


@pytest.mark.parametrize("name", pyopt.jax.NAMES)
def test_bits(name: str) -> None:
    compare(name, {}, [None] * 5)


@pytest.mark.parametrize("name", pyopt.jax.NAMES)
def test_bits_with_flat_state(name: str) -> None:
    compare(name, {}, [None] * 3, flat=True)


@pytest.mark.parametrize(
    "name, options",
    [
        ("Adam", {"lr": 0.1, "betas": (0.8, 0.99), "amsgrad": True, "weight_decay": 0.1, "maximize": True}),
        ("Adam", {"update_clip": True, "cautious": True}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("RMSprop", {"centered": True}),
        ("RMSprop", {"momentum": 0.9}),
        ("LARS", {"momentum": 0.0}),
        ("AdEMAMix", {"alpha_warmup": 3, "beta3_warmup": None}),
    ],
)
def test_bits_with_options(name: str, options: dict[str, Any]) -> None:
    compare(name, options, [None] * 5)


def test_rates_as_operands() -> None:
    """Another rate compiles nothing anew; a traced one is a float32."""
    compare("Adam", {}, [1e-3, 2e-3, np.float32(3e-3), 4e-3])
    adam = pyopt.jax.Adam()
    traces = []

    def step(params: Any, grads: Any, state: Any, lr: Any) -> Any:
        traces.append(lr)
        return adam.step(params, grads, state, lr)

    compiled = jax.jit(step)
    params = {"w": jnp.ones(3)}
    state = adam.init(params)
    for lr in (0.1, 0.2, 0.3):
        params, state = compiled(params, {"w": jnp.ones(3)}, state, lr)
    assert len(traces) == 1


def test_number_has_all_its_bits() -> None:
    """A Python number that the step closes over is not rounded to float32."""
    p = Parameter(np.ones(3), grad=np.ones(3))
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        adam = pyopt.jax.Adam()
        params, state = {"w": jnp.ones(3, jnp.float64)}, None
        state = adam.init(params)
        params, state = jax.jit(lambda *args: adam.step(*args, lr=1e-3))(params, {"w": jnp.ones(3)}, state)
        pyopt.Adam([p], lr=1e-3).step()
        assert np.asarray(params["w"]).tobytes() == p.data.tobytes()


def test_float64() -> None:
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        compare("Adam", {"amsgrad": True}, [None] * 4, "float64")


def test_flat_state_of_two_dtypes() -> None:
    """Many leaves, of both dtypes by turns, with sizes that leave the next one unaligned."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        rng = np.random.default_rng(0)
        adam = pyopt.jax.AdamW(amsgrad=True)
        params = [jnp.array(rng.standard_normal(i % 9), ("float32", "float64")[i % 2]) for i in range(150)]
        other, states = params, [adam.init(params), adam.init(params, flat=True)]
        step = jax.jit(adam.step, donate_argnums=(2,))
        for _ in range(3):
            grads = [jnp.array(rng.standard_normal(p.shape), p.dtype) for p in params]
            params, states[0] = step(params, grads, states[0])
            other, states[1] = step(other, grads, states[1])
        assert [x.tobytes() for x in leaves(params)] == [x.tobytes() for x in leaves(other)]
        for dtype, arrays in states[1]["flat"].items():
            for key, x in arrays.items():
                own = [s for p, s in zip(params, states[0][key], strict=True) if str(p.dtype) == dtype]
                assert np.asarray(x).tobytes() == b"".join(s.tobytes() for s in leaves(own))


@pytest.mark.parametrize("flat", [False, True])
def test_donated_memory_is_written_in_place(flat: bool) -> None:
    adam = pyopt.jax.Adam()
    params = {"w": jnp.ones(100_000), "b": jnp.ones(10)}
    state = adam.init(params, flat)
    step = jax.jit(adam.step, donate_argnums=(0, 2))
    grads = {"w": jnp.ones(100_000), "b": jnp.ones(10)}
    params, state = step(params, grads, state)
    places = [x.unsafe_buffer_pointer() for x in jax.tree_util.tree_leaves((params, state)) if x.size > 1]
    old = params
    params, state = step(params, grads, state)
    assert places == [x.unsafe_buffer_pointer() for x in jax.tree_util.tree_leaves((params, state)) if x.size > 1]
    assert old["w"].is_deleted()


@pytest.mark.parametrize("flat", [False, True])
def test_without_donation_the_old_values_stay(flat: bool) -> None:
    adam = pyopt.jax.Adam(lr=0.5)
    params, grads = {"w": jnp.ones(1000)}, {"w": jnp.ones(1000)}
    state = adam.init(params, flat)
    for step in (adam.step, jax.jit(adam.step)):
        new, new_state = step(params, grads, state)
        assert float(params["w"][0]) == 1 and not any(x.any() for x in leaves(state))
        assert float(new["w"][0]) == 0.5 and int(new_state["step"]) == 1


def test_inside_a_larger_function() -> None:
    """Gradients, the step and a schedule in one compiled loop."""
    adam = pyopt.jax.Adam()

    def loss(params: Any) -> Any:
        return ((params["w"] - 3) ** 2).sum()

    @jax.jit
    def train(params: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            params, state = carry
            return adam.step(params, jax.grad(loss)(params), state, lr=0.1 * 0.99**i)

        return jax.lax.fori_loop(0, 500, body, (params, adam.init(params)))

    params, state = train({"w": jnp.zeros(5)})
    np.testing.assert_allclose(params["w"], 3, atol=1e-2)
    assert int(state["step"]) == 500


def test_large_trees_in_several_threads() -> None:
    """Two compiled steps at once, on XLA's pool, from two Python threads: nobody waits for the other."""

    def work(seed: int) -> bytes:
        adam = pyopt.jax.Adam()
        params = {"w": jnp.array(np.random.default_rng(seed).standard_normal(300_000).astype(np.float32))}
        state = adam.init(params)
        step = jax.jit(adam.step, donate_argnums=(0, 2))
        for _ in range(30):
            params, state = step(params, {"w": jnp.ones(300_000)}, state)
        return np.asarray(params["w"]).tobytes()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, [0, 1, 0, 1]))
    assert together[:2] == together[2:] == [work(0), work(1)]


def test_state_can_be_saved() -> None:
    adam = pyopt.jax.Adam()
    params = {"w": jnp.ones(4)}
    state = adam.init(params)
    params, state = adam.step(params, {"w": jnp.ones(4)}, state)
    saved = copy.deepcopy(jax.tree_util.tree_map(np.asarray, (params, state)))
    a = adam.step(params, {"w": jnp.ones(4)}, state)
    b = adam.step(saved[0], {"w": jnp.ones(4)}, saved[1])
    assert [x.tobytes() for x in leaves(a)] == [x.tobytes() for x in leaves(b)]


def test_empty_tree() -> None:
    adam = pyopt.jax.Adam()
    params, state = adam.step({}, {}, adam.init({}))
    assert params == {} and int(state["step"]) == 1


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_names_and_options() -> None:
    with pytest.raises(ValueError, match="name == 'ASGD', must be one of AdaBelief, Adadelta"):
        pyopt.jax.Optimizer("ASGD")
    with pytest.raises(ValueError, match="lr == -1, must be finite and >= 0"):
        pyopt.jax.Adam(lr=-1)
    with pytest.raises(TypeError, match="Adam has no argument 'beta'"):
        pyopt.jax.Adam(beta=0.9)
    with pytest.raises(TypeError, match=r"no argument 'state_dtype' here: pyopt\.jax has none of pyopt\.Storage"):
        pyopt.jax.Adam(state_dtype="bfloat16")


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda p, g, s: (p, {**g, "w": g["w"][:2]}, s), ValueError, r"grads\['w'\] is float32 of shape \(2,\)"),
        (lambda p, g, s: (p, {"w": g["w"]}, s), ValueError, "grads is PyTreeDef.*, must be a tree like params"),
        (lambda p, g, s: (p, {**g, "b": g["b"].astype("int32")}, s), ValueError, r"grads\['b'\] is int32 of shape"),
        (lambda p, g, s: ({**p, "b": p["b"].astype("int32")}, g, s), TypeError, r"params\['b'\] is int32, must be"),
        (lambda p, g, s: (p, g, {"step": s["step"]}), ValueError, r"state has no 'exp_avg', only \['step'\]"),
        (
            lambda p, g, s: (p, g, pyopt.jax.Adam().init({"w": p["w"]}, flat=True)),
            ValueError,
            r"state 'flat' has {'float32': {'exp_avg': \('float32', \(3,\)\), .*, must have .* \(5,\)",
        ),
        (lambda p, g, s: (p, g, s, jnp.ones(2)), ValueError, r"lr has the shape \(2,\), must be a scalar"),
        (lambda p, g, s: (p, g, s, -1.0), Exception, "slot 0: lr == -1, must be >= 0"),
        (lambda p, g, s: (p, g, {**s, "step": s["step"] - 5}), Exception, "slot 0: step == -4, must be >= 1"),
    ],
)
def test_bad_input(spoil: Any, error: type[Exception], message: str) -> None:
    adam = pyopt.jax.Adam()
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    grads = {"w": jnp.ones(3), "b": jnp.ones(2)}
    with pytest.raises(error, match=message):
        jax.block_until_ready(adam.step(*spoil(params, grads, adam.init(params))))
    with pytest.raises(TypeError, match=r"params\['w'\] is int32, must be float32 or float64"):
        adam.init({"w": jnp.ones(3, "int32")})


def test_repr() -> None:
    assert repr(pyopt.jax.Lion()) == "pyopt.jax.Lion(lr=0.0001, betas=(0.9, 0.99), weight_decay=0, maximize=False)"


def test_examples_of_the_docstrings() -> None:
    assert not doctest.testmod(pyopt.jax).failed


def test_core_imports_no_jax() -> None:
    code = "import sys, pyopt; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
