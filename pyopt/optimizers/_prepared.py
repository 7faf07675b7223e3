"""Steps that need numbers of a whole array first: computed aside, where they may fail, then written at once."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from pyopt import _state_dict
from pyopt._asked import Asked
from pyopt._matrix import Writes
from pyopt.checks import MOST_STEPS, plain
from pyopt.optimizer import Group, Optimizer
from pyopt.parameter import (
    Parameter,
    apart_from,
    check_data,
    check_no_overlap,
    check_state,
    check_state_values,
    label,
    memory_ranges,
    parameter_ranges,
    same_order,
)

Array = np.ndarray[Any, Any]
Shapes = dict[str, tuple[int, ...]]


class PreparedOptimizer(Optimizer):
    """Base of the optimizers of matrices.

    A subclass says which state an array of a shape has (`state_shapes`, `counts`) and collects what a step will write
    (`prepare`). Both are class methods on plain arrays, for pyopt.torch too.
    """

    # Every name of a state array that `state_shapes` may return.
    state_names: ClassVar[dict[str, str | None]] = {}

    @classmethod
    def state_shapes(cls, group: Group, shape: tuple[int, ...]) -> Shapes:
        """The state arrays of a parameter of this shape, with their shapes; zero at first."""
        raise NotImplementedError

    @classmethod
    def counts(cls, group: Group, shape: tuple[int, ...]) -> bool:
        """Whether the state of a parameter of this shape holds "step"."""
        return cls.counts_steps

    @classmethod
    def prepare(cls, writes: Writes, group: Group, step: int, p: Array, g: Array, state: dict[str, Array]) -> None:
        """Collect what the step writes to an array and its state; nothing is written here.

        Args:
            writes: takes it.
            group: the hyper-parameters.
            step: the number of the step, from 1, where steps are counted.
            p, g: the array, dense, and its gradient, of the same memory order.
            state: the arrays of its state; those of the shape of p lie in memory as p does, the others in C order.
        """
        raise NotImplementedError

    @classmethod
    def check_shape(cls, what: str, group: Group, shape: tuple[int, ...]) -> None:
        """Raise for a parameter of a shape that the optimizer cannot step."""

    def add_param_group(self, param_group: Group) -> None:
        with self._workspace:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            first = len(self._parameters()) - len(group["params"])
            try:
                for i, p in enumerate(group["params"], first):
                    self.check_shape(label(i, p), group, p.data.shape)
            except BaseException:
                del self.param_groups[-1]
                raise

    def _move(self, grads: list[Any] | None, what: Asked | None) -> None:
        self._workspace.step_by(self._prepare_all, self, grads, what)

    def _prepare_all(self, grads: list[Any] | None, factor: float) -> Writes:
        rows = self._rows_to_update(grads, factor)
        places = {p: label(i, p) for i, p in enumerate(self._parameters())}
        ranges = parameter_ranges(self._parameters())
        found = []
        for live_group, p, grad in rows:
            group = plain(live_group)
            self.check_shape(places[p], group, p.data.shape)
            entry = self.state.setdefault(p, {})
            step, state, made = self._state_of(places[p], group, p.data, entry)
            for name, array in state.items():
                ranges += [(b, e, f"{places[p]}: state {name!r}", -1) for b, e, _, _ in memory_ranges([array])]
            found.append((group, p.data, grad, entry, step, state, made))
        ranges = check_no_overlap(ranges)
        writes = Writes()
        for group, data, grad, entry, step, state, made in found:
            g = in_order(data, apart_from(ranges, grad))
            self.prepare(writes, group, step, data, g, state)
            if made or step:
                writes.add_entry(entry, {**({"step": step} if step else {}), **made})
        return writes

    def _state_of(
        self, what: str, group: Group, data: Array, entry: dict[str, Any]
    ) -> tuple[int, dict[str, Array], dict[str, Array]]:
        """The number of the step, 0 where none is counted, the arrays of the state, and those that are new."""
        shapes, counts = self.state_shapes(group, data.shape), self.counts(group, data.shape)
        if entry.keys().isdisjoint({*shapes, *(["step"] if counts else [])}):
            made = {name: new_array(data, shape) for name, shape in shapes.items()}
            return int(counts), made, made
        for name, shape in shapes.items():
            check_state_array(what, name, entry, data, shape)
        step = 0
        if counts:
            if "step" not in entry:
                raise KeyError(f"{what}: state has no 'step', only {sorted(map(str, entry))}")
            step = min(_state_dict.saved_count(f"{what}: state 'step'", entry["step"]) + 1, MOST_STEPS)
        return step, {name: entry[name] for name in shapes}, {}

    def _check_entry(self, what: str, entry: dict[str, Any], p: Parameter, group: Group) -> None:
        shapes, counts = self.state_shapes(plain(group), p.data.shape), self.counts(plain(group), p.data.shape)
        known = {*self.state_names, "step"}
        if entry and not known & entry.keys():  # the user's own alone
            return
        if counts:
            if "step" not in entry:
                raise KeyError(f"{what}: state_dict has no 'step', only {sorted(map(str, entry))}")
            entry["step"] = _state_dict.saved_count(f"{what}: state_dict: step", entry["step"])
        for name, shape in shapes.items():
            check_own_values(what, name, entry, p.data, shape)
        if foreign := sorted((known & entry.keys()) - {*shapes, *(["step"] if counts else [])}):
            raise ValueError(
                f"{what}: state_dict has {foreign[0]!r}, which a parameter of shape {p.data.shape} has not"
            )


def blank(data: Array, shape: tuple[int, ...]) -> Array:
    """An array of a shape and the type of another, in no memory of its own, to compare with."""
    return np.broadcast_to(np.zeros((), data.dtype), shape)


def check_own_values(what: str, name: str, entry: dict[str, Any], data: Array, shape: tuple[int, ...]) -> None:
    """Raise unless the state has an array of this name and shape, of the parameter's type."""
    check_state_values(what, name, entry, blank(data, shape))
    if entry[name].dtype != data.dtype:
        raise TypeError(
            f"{what}: state {name!r} has dtype {entry[name].dtype}, must be {data.dtype} like the parameter"
        )


def new_array(data: Array, shape: tuple[int, ...]) -> Array:
    """Zeros, in the memory order of a parameter where they have its shape."""
    return np.zeros_like(data, subok=False) if shape == data.shape else np.zeros(shape, data.dtype)


def check_state_array(what: str, name: str, entry: dict[str, Any], data: Array, shape: tuple[int, ...]) -> None:
    """Raise unless the state has an array of this name and shape that can be written to where it lies."""
    if shape == data.shape:
        check_own_values(what, name, entry, data, shape)
        check_state(what, name, entry, data)
        return
    check_own_values(what, name, entry, data, shape)
    if not check_data(f"{what}: state {name!r}", entry[name]).flags.c_contiguous:
        raise ValueError(f"{what}: state {name!r} has strides {entry[name].strides}, must be in C order")


def in_order(data: Array, grad: Array) -> Array:
    """A gradient in the memory order of its parameter."""
    if same_order(data.shape, data.strides, grad.strides) and grad.flags.aligned:
        return grad
    copy = np.empty_like(data, subok=False)
    np.copyto(copy, grad)
    return copy


def lerp(a: Any, b: Any, weight: float) -> Any:
    """a moved towards b, from the nearer end, as pyopt/_rules.pxd does."""
    return a + weight * (b - a) if weight < 0.5 else b - (1 - weight) * (b - a)
