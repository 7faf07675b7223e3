"""thinc's optimizers, and so spaCy's, with pyopt's step. Needs thinc: pyopt[thinc].

thinc calls its optimizer for one array after the other, writes the weights that it returns into the model at once, and
nothing tells the optimizer which call is the last of an update (`step_schedules` is called by spaCy's loop, but not by
`nlp.update(sgd=...)` or `spacy pretrain`; the shim of torch clears each gradient right after its call). So each call is
a step of its own: one sweep that clips, updates, averages and clears one array.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import srsly
import thinc.optimizers
from thinc.api import Model

import pyopt
from pyopt._thinc import KINDS, Hyper, PlainSteps, average_weight, scalars
from pyopt.averaging import Averaging
from pyopt.checks import flag, non_negative, number
from pyopt.optimizer import Group
from pyopt.parameter import Parameter, check_state_values

Key = tuple[int, str]
Array = np.ndarray[Any, Any]
FORMAT = 1  # of to_bytes
CONSTANT = "constant"  # thinc's schedule that is none


class _OfThinc:
    """An optimizer of one array with thinc's numbers."""

    kind: ClassVar[int]
    hyper: Hyper
    lr_scale: float

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return scalars(self.kind, self.hyper, self.hyper.lr * self.lr_scale, step)


class _Adam(_OfThinc, pyopt.Adam):
    kind = KINDS["Adam"]


class _RAdam(_OfThinc, pyopt.RAdam):
    kind = KINDS["RAdam"]


class _SGD(_OfThinc, pyopt.SGD):
    kind = KINDS["SGD"]


class _Average(Averaging):
    """thinc's average of one array: from zero on, with a decay that grows up to 0.9999."""

    t: int

    def is_due(self, step: int) -> bool:
        return True

    def weight(self, n: int) -> float:
        return average_weight(self.t)


class _Slot:
    """What belongs to one key: an optimizer of one array, and its average."""

    __slots__ = ("average", "entry", "optimizer", "parameter", "plain")

    def __init__(self, kind: Any, key: Key, weights: Array) -> None:
        self.parameter = Parameter(weights, name=f"{key[1]} of node {key[0]}")
        self.optimizer = kind([self.parameter])
        self.average: _Average | None = None
        self.plain: PlainSteps | None = None  # once there is a state,
        self.entry: dict[str, Any] = {}  # this one

    def start_average(self) -> _Average:
        """A new average, of zeros."""
        self.average = average = _Average(self.optimizer)
        average.arrays[self.parameter].fill(0)
        return average


class Optimizer(thinc.optimizers.Optimizer):
    """thinc's optimizer on NumPy arrays by pyopt's kernels, made by `Adam`, `RAdam` and `SGD`.

    Attributes, schedules, `averages`, `nr_update` and `last_score` are thinc's own. Arrays of other devices take
    thinc's own step.
    """

    __slots__ = ("_given", "_hyper", "_kind", "_slots", "_steps")

    def __init__(self, kind: Any, learn_rate: Any, **options: Any) -> None:
        super().__init__(learn_rate, **options)
        flag("L2_is_weight_decay", self.L2_is_weight_decay)
        self._kind = kind
        self._slots: dict[Key, _Slot] = {}
        self._steps = 0
        self._given: Any = None
        self._hyper = self._now((0, ""))  # wrong options are told of here

    def step_schedules(self) -> None:
        """Go on to the next value of every schedule."""
        super().step_schedules()
        self._steps += 1

    def _now(self, key: Key) -> Hyper:
        """The hyper-parameters as the schedules have them, checked."""
        given = (self.learn_rate, self.b1, self.b2, self.eps, self.L2, self.grad_clip)
        if given == self._given:
            return self._hyper
        values = tuple(self._value(value, key) for value in given)
        for name, value in zip(("learn_rate", "beta1", "beta2", "eps", "L2", "grad_clip"), values, strict=True):
            number(name, value, 0, **({"below": 1} if name.startswith("beta") else {}))
        lr, b1, b2, eps, l2, grad_clip = map(float, values)
        self._hyper = Hyper(lr, b1, b2, eps, l2, self.L2_is_weight_decay, grad_clip)
        self._given = given if not any(map(_changes, given)) else None
        return self._hyper

    def _value(self, value: Any, key: Key) -> Any:
        """A hyper-parameter: in thinc 8 it is a number, in thinc 9 a schedule."""
        if not callable(value):
            return value
        return value(self.step, key=key, last_score=self.last_score)

    def __call__(self, key: Key, weights: Any, gradient: Any, *, lr_scale: float = 1.0) -> tuple[Any, Any]:
        """Step one array, in place, and fill its gradient with zeros.

        Args:
            key: what the array is called: the number of its node and its name.
            weights: float32 or float64, writable, dense in memory.
            gradient: same shape and dtype.
            lr_scale: a factor of the learning rate, >= 0.

        Returns:
            weights and gradient.

        Raises:
            TypeError, ValueError: an array that does not fit, a hyper-parameter out of its bounds. Nothing has changed.
        """
        slot = self._slots.get(key)
        if slot is not None and slot.plain is not None:
            average = None if self.averages is None else self.averages.get(key, False)
            if average is not False and (slot.average is None) == (average is None):
                hyper, count = self._now(key), self.nr_update[key] + 1
                if slot.plain.step(weights, gradient, hyper, lr_scale, count, average, slot.entry, self.nr_update, key):
                    return weights, gradient
        return self._any_call(key, slot, weights, gradient, lr_scale)

    def _any_call(self, key: Key, slot: _Slot | None, weights: Any, gradient: Any, lr_scale: float) -> tuple[Any, Any]:
        """The first call of a key, and those of arrays that are not plain."""
        if not isinstance(weights, np.ndarray):
            return super().__call__(key, weights, gradient, lr_scale=lr_scale)  # type: ignore[no-any-return]
        if len(gradient) < 1:
            return weights, gradient
        non_negative("lr_scale", lr_scale)
        slot = slot or _Slot(self._kind, key, weights)
        parameter, optimizer = slot.parameter, slot.optimizer
        hyper = optimizer.hyper = self._now(key)
        optimizer.lr_scale = lr_scale
        if parameter.data is not weights:
            parameter.data = weights
        is_penalty = hyper.l2 and not self.L2_is_weight_decay
        parameter.grad = gradient + weights.dtype.type(hyper.l2) * weights if is_penalty else gradient
        count = self.nr_update.get(key, 0) + 1
        average = slot.average
        if average is not None and (self.averages is None or key not in self.averages):  # it has been taken away
            average.detach()
            average = slot.average = None
        if self.averages is not None:
            if average is None:
                average = slot.start_average()
            average.arrays[parameter] = self.averages.get(key, average.arrays[parameter])
            average.t = count
        optimizer.step(max_norm=hyper.grad_clip or None, zero_grad=True)
        if is_penalty:
            gradient.fill(0)
        self._keep(key, slot)
        self.nr_update[key] = count
        return weights, gradient

    def _keep(self, key: Key, slot: _Slot) -> None:
        """Remember what belongs to a key, the arrays under thinc's names too."""
        self._slots[key] = slot
        if slot.average is not None:
            self.averages[key] = slot.average.arrays[slot.parameter]
        state = slot.entry = slot.optimizer.state[slot.parameter]
        slot.plain = PlainSteps(slot.optimizer.kind, state.get("exp_avg"), state.get("exp_avg_sq"))
        for name, where in (("exp_avg", self.mom1), ("exp_avg_sq", self.mom2)):
            if name in state:
                where[key] = state[name].reshape(-1, order="A")

    # --- bytes --------------------------------------------------------------------------------------------------------

    def to_bytes(self, *models: Model[Any, Any]) -> bytes:
        """The state as bytes: counts, moments, averages, the position of the schedules. Nothing is pickled.

        Args:
            models: where the arrays are. thinc numbers nodes as they are made, so that they can have other numbers in
                the next process; with models, arrays are called by the place of their node in these.

        Raises:
            KeyError: an array that is in none of the models.
        """
        places = _places(models)
        entries = []
        for key, slot in self._slots.items():
            if models and key[0] not in places:
                raise KeyError(f"{slot.parameter.name!r} is in none of the models")
            state = {k: v for k, v in slot.optimizer.state[slot.parameter].items() if k != "step"}
            average = None if self.averages is None else self.averages.get(key)
            node = places[key[0]] if models else key[0]
            entries.append({"key": [node, key[1]], "updates": self.nr_update[key], "state": state, "average": average})
        document = {
            "format": FORMAT,
            "kind": self._kind.__name__,
            "by_place": bool(models),
            "steps": self._steps,
            "last_score": getattr(self, "_last_score", None),
            "entries": entries,
        }
        return srsly.msgpack_dumps(document)  # type: ignore[no-any-return]

    def from_bytes(self, data: bytes, *models: Model[Any, Any]) -> Optimizer:
        """Go on from what `to_bytes` returned; all of it, or an error and nothing has changed.

        Args:
            data: of an optimizer of the same kind. The hyper-parameters are not in it: this one has been made with
                them. Its schedules go to the position that was saved.
            models: the same ones, in the same order, if `to_bytes` was given any.

        Raises:
            ValueError: data of another kind, or of other models; schedules that would have to go back.
        """
        document = srsly.msgpack_loads(data)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError("data is not of to_bytes of an optimizer of pyopt.thinc, or of a newer one")
        if document["kind"] != self._kind.__name__:
            raise ValueError(f"data is of {document['kind'][1:]}, must be of {self._kind.__name__[1:]}")
        if document["by_place"] != bool(models):
            raise ValueError(
                f"data was saved {'with' if document['by_place'] else 'without'} models, must be loaded so"
            )
        if document["steps"] < self._steps:
            raise ValueError(f"the schedules are at step {self._steps}, cannot go back to {document['steps']}")
        nodes, params = _nodes(models), {}
        found = {}
        for entry in document["entries"]:
            node, name = entry["key"]
            if models and not (0 <= node < len(nodes) and nodes[node].has_param(name)):
                raise ValueError(f"data has {name!r} of node {node}, which the models have not")
            key = (nodes[node].id, name) if models else (node, name)
            params[key] = nodes[node].get_param(name) if models else None
            found[key] = entry
        slots = {key: self._slot_of(key, params[key], entry) for key, entry in found.items()}
        for _ in range(document["steps"] - self._steps):
            self.step_schedules()
        if hasattr(self, "_last_score") and document["last_score"] is not None:
            object.__setattr__(self, "_last_score", tuple(document["last_score"]))
        for where in (self._slots, self.mom1, self.mom2, self.nr_update, self.averages):
            if where is not None:
                where.clear()
        for key, slot in slots.items():
            self._keep(key, slot)
            self.nr_update[key] = found[key]["updates"]
        return self

    def _slot_of(self, key: Key, weights: Array | None, entry: dict[str, Any]) -> _Slot:
        """What belongs to a key, of its entry in the bytes."""
        arrays = [np.array(array) for array in (*entry["state"].values(), entry["average"]) if array is not None]
        if weights is None:
            weights = np.zeros_like(arrays[0]) if arrays else np.zeros(1, np.float32)
        slot = _Slot(self._kind, key, weights)
        state = slot.optimizer.state[slot.parameter]
        for name, value in entry["state"].items():
            state[name] = np.array(value)
            check_state_values(slot.parameter.name or "", name, state, weights)
        if slot.optimizer.counts_steps:
            state["step"] = entry["updates"]
        if self.averages is not None:
            average = slot.start_average().arrays[slot.parameter]
            if entry["average"] is not None:
                saved = {"average": np.array(entry["average"])}
                check_state_values(slot.parameter.name or "", "average", saved, weights)
                average[...] = saved["average"]
        return slot


@thinc.registry.optimizers("pyopt.Adam.v1")
def Adam(
    learn_rate: Any = 0.001,
    *,
    L2: Any = 0.0,
    beta1: Any = 0.9,
    beta2: Any = 0.999,
    eps: Any = 1e-8,
    grad_clip: Any = 1.0,
    L2_is_weight_decay: bool = True,
    use_averages: bool = True,
) -> Optimizer:
    """thinc's Adam, by pyopt's kernels: "pyopt.Adam.v1" in a config.

        g = g + L2 * p                                   unless L2_is_weight_decay
        g = g * min(1, grad_clip / (norm(g) + 1e-6))     of each array by itself
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g**2
        p = p - learn_rate * sqrt(1 - beta2**t) / (1 - beta1**t) * m / (sqrt(v) + eps)
        p = p - learn_rate * L2 * p                      if L2_is_weight_decay
        average = average + (1 - min((1 + t) / (10 + t), 0.9999)) * (p - average)

    Args:
        learn_rate, L2, eps, grad_clip: numbers >= 0, or thinc's schedules of such; grad_clip 0 clips nothing.
        beta1, beta2: decay of the two means, >= 0 and < 1, or schedules.
        L2_is_weight_decay: shrink the weights after the step, instead of adding the penalty's gradient before it.
        use_averages: keep the running averages, in `averages` by key.

    Raises:
        TypeError, ValueError: an option out of its bounds; in a call, what a schedule says.

    Example:
        >>> from thinc.api import Relu, chain
        >>> model = chain(Relu(4), Relu(1)).initialize(np.ones((2, 3), "f"), np.ones((2, 1), "f"))
        >>> optimizer = Adam(0.01)
        >>> Y, backprop = model.begin_update(np.ones((2, 3), "f"))
        >>> _ = backprop(Y - 1)
        >>> model.finish_update(optimizer)
        >>> sorted(name for _, name in optimizer.averages)
        ['W', 'W', 'b', 'b']

    Source: thinc.optimizers of thinc 8.3 and 9.1, whose meanings all options have. In thinc the norm is clipped without
    the 1e-6, and beta1 or beta2 of 0 mean other rules. The sums of the norm are in double here.
    """
    return _made(_Adam, learn_rate, L2, grad_clip, L2_is_weight_decay, use_averages, beta1, beta2, eps)


@thinc.registry.optimizers("pyopt.RAdam.v1")
def RAdam(
    learn_rate: Any = 0.001,
    *,
    beta1: Any = 0.9,
    beta2: Any = 0.999,
    eps: Any = 1e-8,
    L2: Any = 0.0,
    L2_is_weight_decay: bool = True,
    grad_clip: Any = 1.0,
    use_averages: bool = True,
) -> Optimizer:
    """thinc's RAdam, by pyopt's kernels: "pyopt.RAdam.v1" in a config. For the arguments see `Adam`.

    The rule is that of `pyopt.RAdam` at step t + 1: thinc's count is ahead by one.

    Example:
        >>> w, g = np.ones(2, "f"), np.array([0.5, -0.5], "f")
        >>> _ = RAdam(0.1, use_averages=False)((0, "W"), w, g)
        >>> w, g
        (array([0.9736842, 1.0263158], dtype=float32), array([0., 0.], dtype=float32))

    Source: thinc.optimizers of thinc 8.3 and 9.1, which leaves lr_scale out here.
    """
    return _made(_RAdam, learn_rate, L2, grad_clip, L2_is_weight_decay, use_averages, beta1, beta2, eps)


@thinc.registry.optimizers("pyopt.SGD.v1")
def SGD(
    learn_rate: Any,
    *,
    L2: Any = 0.0,
    grad_clip: Any = 1.0,
    L2_is_weight_decay: bool = True,
    use_averages: bool = True,
) -> Optimizer:
    """thinc's SGD, by pyopt's kernels: "pyopt.SGD.v1" in a config. For the arguments see `Adam`.

        p = p - learn_rate * g

    in the place of the rule of `Adam`.

    Example:
        >>> w, g = np.ones(2, "f"), np.array([0.5, -0.5], "f")
        >>> _ = SGD(0.5, use_averages=False)((0, "W"), w, g)
        >>> w
        array([0.75, 1.25], dtype=float32)

    Source: thinc.optimizers of thinc 8.3 and 9.1.
    """
    return _made(_SGD, learn_rate, L2, grad_clip, L2_is_weight_decay, use_averages, 0.0, 0.0, 1e-8)


def _made(
    kind: Any, lr: Any, l2: Any, grad_clip: Any, l2_is_decay: bool, averages: bool, b1: Any, b2: Any, eps: Any
) -> Optimizer:
    return Optimizer(
        kind,
        lr,
        L2=l2,
        beta1=b1,
        beta2=b2,
        eps=eps,
        grad_clip=grad_clip,
        use_averages=averages,
        use_radam=kind is _RAdam,
        L2_is_weight_decay=l2_is_decay,
    )


def _changes(value: Any) -> bool:
    """Whether a hyper-parameter may be another one in the next call: all but numbers and thinc's `constant`."""
    return callable(value) and getattr(value, "name", None) != CONSTANT


def _nodes(models: tuple[Model[Any, Any], ...]) -> list[Any]:
    """The nodes of models, each once, in their order."""
    found: dict[int, Any] = {}

    def walk() -> Iterator[Any]:
        for model in models:
            yield from model.walk()

    for node in walk():
        found.setdefault(node.id, node)
    return list(found.values())


def _places(models: tuple[Model[Any, Any], ...]) -> dict[int, int]:
    return {node.id: place for place, node in enumerate(_nodes(models))}
