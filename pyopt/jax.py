"""Steps inside jax.jit: the optimizers of pyopt on JAX arrays in the memory of a CPU.

Needs JAX (`pip install pyopt[jax]`). The step runs on XLA's own threads.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pyopt
from pyopt._xla import option_names, step_handler

TARGET = "pyopt_step_1"
jax.ffi.register_ffi_target(TARGET, step_handler, platform="cpu")

# Of one call: XLA compiles in the square of its operands, two minutes for a thousand leaves at once.
MOST_LEAVES = 32
FLAT = "flat"  # in the place of the states, those of `init(flat=True)`

# Those that keep no numbers but the count of the steps.
NAMES = (
    *("AdaBelief", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Adan", "AdEMAMix", "ADOPT", "FTRL", "LAMB"),
    *("LARS", "Lion", "RAdam", "RMSprop", "Rprop", "SGD"),
)
Tree = Any
State = dict[str, Any]


class Optimizer:
    """An optimizer of pyopt for trees of JAX arrays: a pair of pure functions, with the bits of the class in pyopt.

    Args:
        name: of the class in pyopt: "Adam". `pyopt.jax.Adam(...)` is `pyopt.jax.Optimizer("Adam", ...)`.
        options: of the class.

    Raises:
        TypeError, ValueError: as the class in pyopt; a name that is none of NAMES.

    Example:
        >>> import jax, jax.numpy as jnp, pyopt.jax
        >>> adam = pyopt.jax.Adam(lr=0.5)
        >>> params = {"w": jnp.ones(2)}
        >>> state = adam.init(params)
        >>> step = jax.jit(adam.step, donate_argnums=(0, 2))
        >>> params, state = step(params, {"w": jnp.array([4.0, -0.25])}, state)
        >>> params["w"].round(6).tolist()
        [0.5, 1.5]
    """

    def __init__(self, name: str, **options: Any) -> None:
        if name not in NAMES:
            raise ValueError(f"name == {name!r}, must be one of {', '.join(NAMES)}")
        self.name = name
        # The class checks the options, and knows the states.
        if stored := sorted(options.keys() & pyopt.Storage.__annotations__.keys()):
            raise TypeError(f"{name} has no argument {stored[0]!r} here: pyopt.jax has none of pyopt.Storage")
        self._optimizer: pyopt.Optimizer = getattr(pyopt, name)([np.zeros(0)], **options)
        self._group: dict[str, Any] = self._optimizer.param_groups[0]
        streams = self._optimizer.state_streams(self._group)
        self._states = {state: i for i, state in enumerate(streams) if state is not None}
        self._options = np.array([self._option(option) for option in option_names(name)])

    def _option(self, name: str) -> float:
        """An option by its name in C, where a pair has two."""
        option, _, rest = name.partition("[")
        value = self._group[option]
        value = value[int(rest[:-1])] if rest else value
        return float("nan") if value is None else float(value)

    def __repr__(self) -> str:
        options = {key: value for key, value in self._group.items() if key not in ("params", "param_names")}
        return f"pyopt.jax.{self.name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"

    def init(self, params: Tree, flat: bool = False) -> State:
        """The state before the first step.

        Args:
            params: a tree of arrays, float32 or float64.
            flat: keep each state in one array for all parameters of a dtype, in the order of the tree's leaves. JAX
                spends more on each array that goes into a compiled function and out of it than a step on a small one.

        Returns:
            "step", an int32, and per state of the optimizer ("exp_avg") a tree like params; with flat, "step" and
            "flat", per dtype ("float32") a dict of one array per state.

        Raises:
            TypeError: an array of another dtype.
        """
        for path, p in jax.tree_util.tree_leaves_with_path(params):
            _check_dtype(path, p)
        state: State = {"step": jnp.zeros((), jnp.int32)}
        first = {name: self._optimizer.initial_value(name, self._group) for name in self._states}
        if flat:
            sizes = _sizes(jax.tree_util.tree_leaves(params))
            state[FLAT] = {
                dtype: {name: jnp.full(size, value, dtype) for name, value in first.items()}
                for dtype, size in sizes.items()
            }
        else:
            for name, value in first.items():
                state[name] = jax.tree_util.tree_map(lambda p, value=value: jnp.full_like(p, value), params)
        return state

    def step(self, params: Tree, grads: Tree, state: State, lr: Any = None) -> tuple[Tree, State]:
        """One step of all parameters; under jax.jit, with params and state donated, where they lie.

        Args:
            params: a tree of arrays.
            grads: their gradients, a tree of the same form, dtypes and shapes.
            state: from `init` or the last step.
            lr: the learning rate in place of the option's: a number, with all its bits, or a scalar array, so that
                another one compiles nothing anew. It must be >= 0.

        Returns:
            The new params and state.

        Raises:
            TypeError, ValueError: trees, shapes or dtypes that do not match; when it is run, an lr out of its bounds.
        """
        leaves, form = jax.tree_util.tree_flatten(params)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        gradients = _like(form, paths, leaves, grads, "grads")
        step = state["step"] + 1
        numbers = (_rate(self._group["lr"] if lr is None else lr), step)
        if FLAT in state:
            new, flat = self._step_flat(leaves, gradients, state[FLAT], numbers)
            return form.unflatten(new), {"step": step, FLAT: flat}
        streams = [leaves]
        for name in self._states:
            if name not in state:
                raise ValueError(f"state has no {name!r}, only {sorted(state)}: it must come from init() or step()")
            streams.append(_like(form, paths, leaves, state[name], f"state {name!r}"))
        results: list[list[Any]] = [[] for _ in streams]
        for i in range(0, len(leaves), MOST_LEAVES):
            n = len(leaves[i : i + MOST_LEAVES])
            written = self._call([x for stream in streams for x in stream[i : i + n]], gradients[i : i + n], numbers)
            for j, result in enumerate(results):
                result += written[j * n : (j + 1) * n]
        trees = [form.unflatten(result) for result in results]
        return trees[0], {"step": step, **dict(zip(self._states, trees[1:], strict=True))}

    def _step_flat(self, leaves: list[Any], gradients: list[Any], flat: Tree, numbers: Any) -> tuple[list[Any], Tree]:
        """The step where all parameters of a dtype have their states in one array each."""
        sizes = _sizes(leaves)
        given = {
            dtype: {name: (str(x.dtype), jnp.shape(x)) for name, x in arrays.items()} for dtype, arrays in flat.items()
        }
        due = {dtype: {name: (dtype, (size,)) for name in self._states} for dtype, size in sizes.items()}
        if given != due:
            raise ValueError(f"state {FLAT!r} has {given}, must have {due}, as of init(params, flat=True)")
        new, flat = list(leaves), dict(flat)
        for dtype in sizes:
            places = [i for i, p in enumerate(leaves) if str(jnp.result_type(p)) == dtype]
            arrays, offset = [flat[dtype][name] for name in self._states], 0
            for i in range(0, len(places), MOST_LEAVES):
                some = places[i : i + MOST_LEAVES]
                own = [new[k] for k in some]
                written = self._call([*own, *arrays], [gradients[k] for k in some], numbers, offset)
                for k, result in zip(some, written[: len(some)], strict=True):
                    new[k] = result
                arrays, offset = written[len(some) :], offset + sum(_sizes(own).values())
            flat[dtype] = dict(zip(self._states, arrays, strict=True))
        return new, flat

    def _call(self, arrays: list[Any], gradients: list[Any], numbers: Any, offset: int | None = None) -> list[Any]:
        """The step of some leaves: parameters, then states, which are what is returned too.

        offset: where those of the first leaf begin in states that are flat.
        """
        call = jax.ffi.ffi_call(
            TARGET,
            [jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in arrays],
            input_output_aliases={i: i for i in range(len(arrays))},
        )
        present = np.array(list(self._states.values()), np.int64)
        begin = np.array([] if offset is None else [offset], np.int64)
        return [
            *call(*arrays, *gradients, *numbers, rule=self.name, options=self._options, present=present, flat=begin)
        ]


def _sizes(leaves: list[Any]) -> dict[str, int]:
    """How many elements there are of each dtype."""
    sizes: dict[str, int] = {}
    for p in leaves:
        sizes[str(jnp.result_type(p))] = sizes.get(str(jnp.result_type(p)), 0) + int(np.prod(jnp.shape(p)))
    return sizes


def _rate(lr: Any) -> Any:
    """The learning rate as an operand: of a Python number all its bits, in two halves."""
    if isinstance(lr, (int, float)) and not isinstance(lr, bool):
        return np.frombuffer(struct.pack("=d", lr), np.uint32)
    rate = jnp.asarray(lr)
    if rate.shape != ():
        raise ValueError(f"lr has the shape {rate.shape}, must be a scalar")
    return rate if rate.dtype == jnp.float64 else rate.astype(jnp.float32)


def _check_dtype(path: Any, p: Any) -> None:
    if jnp.result_type(p) not in (jnp.float32, jnp.float64):
        raise TypeError(f"params{jax.tree_util.keystr(path)} is {jnp.result_type(p)}, must be float32 or float64")


def _like(form: Any, paths: list[Any], leaves: list[Any], tree: Tree, what: str) -> list[Any]:
    """The leaves of a tree that must be like the parameters."""
    found: list[Any]
    found, own = jax.tree_util.tree_flatten(tree)
    if own != form:
        raise ValueError(f"{what} is {own}, must be a tree like params, {form}")
    for path, p, x in zip(paths, leaves, found, strict=True):
        _check_dtype(path, p)
        if jnp.shape(x) != jnp.shape(p) or jnp.result_type(x) != jnp.result_type(p):
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)} is {jnp.result_type(x)} of shape {jnp.shape(x)}, must be "
                f"{jnp.result_type(p)} of shape {jnp.shape(p)} as its parameter"
            )
    return found


AdaBelief = partial(Optimizer, "AdaBelief")
Adadelta = partial(Optimizer, "Adadelta")
Adagrad = partial(Optimizer, "Adagrad")
Adam = partial(Optimizer, "Adam")
AdamW = partial(Optimizer, "AdamW")
Adamax = partial(Optimizer, "Adamax")
Adan = partial(Optimizer, "Adan")
AdEMAMix = partial(Optimizer, "AdEMAMix")
ADOPT = partial(Optimizer, "ADOPT")
FTRL = partial(Optimizer, "FTRL")
LAMB = partial(Optimizer, "LAMB")
LARS = partial(Optimizer, "LARS")
Lion = partial(Optimizer, "Lion")
RAdam = partial(Optimizer, "RAdam")
RMSprop = partial(Optimizer, "RMSprop")
Rprop = partial(Optimizer, "Rprop")
SGD = partial(Optimizer, "SGD")
