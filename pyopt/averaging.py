"""Averages of parameters, kept by the steps of an optimizer in the pass over memory that they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import starmap
from operator import call
from typing import Any, ClassVar

from pyopt._asked import MOST_AVERAGES, Average
from pyopt._step import Swapped
from pyopt.checks import at_least, count, fraction, non_negative
from pyopt.parameter import label


class Averaging(Average):
    """Base of the averages of an optimizer's parameters: attached, updated by its steps, exchanged, saved.

    An own one overrides `is_due` and `weight`, and names in `options` the attributes that are saved.
    """

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, optimizer: Any) -> None:
        if not hasattr(optimizer, "_stage"):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}, must be one of pyopt or pyopt.torch")
        super().__init__()
        self.optimizer = optimizer
        workspace, _ = optimizer._stage()
        with workspace:
            if len(optimizer._averages) == MOST_AVERAGES:
                raise ValueError(f"the optimizer has {MOST_AVERAGES} averages already, must have at most so many")
            self.require_all()
            optimizer._averages = [*optimizer._averages, self]

    def __reduce__(self) -> Any:
        self._refuse_swapped()
        numbers = {name: getattr(self, name) for name in ("arrays", "joined", "n_averaged", "steps")}
        return _new, (type(self),), (vars(self), numbers)

    def __setstate__(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        vars(self).update(state[0])
        self.restore(**state[1])
        others = vars(self.optimizer).get("_averages")
        if hasattr(self.optimizer, "param_groups") and not any(each is self for each in others or ()):
            self.optimizer._averages = [*(others or ()), self]  # a copy of torch's kind has left it behind

    def require_all(self) -> list[Any]:
        """The parameters, each of which has an average afterwards."""
        workspace, stage = self.optimizer._stage()
        workspace.follow(stage, self)
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def averages(self) -> list[Any]:
        """The averages themselves, in the order of the optimizer's parameters; copies of those before the first."""
        workspace, _ = self.optimizer._stage()
        with workspace:
            return [self.arrays[p] for p in self.require_all()]

    def detach(self) -> None:
        """Stay as it is: later steps of the optimizer do not update it."""
        workspace, _ = self.optimizer._stage()
        with workspace:
            self.optimizer._averages = [each for each in self.optimizer._averages if each is not self]

    def swapped(self) -> AbstractContextManager[None]:
        """A block in which the parameters hold the average, and the average the parameters.

        Both are written in place, whole at the entry and at the end, also after an error. A step in the block is a
        RuntimeError, as is a second such block.

        Example:
            >>> import numpy as np
            >>> import pyopt
            >>> w = np.zeros(2)
            >>> optimizer = pyopt.SGD([w], lr=1.0)
            >>> average = SWA(optimizer)
            >>> for gradient in (-1.0, -1.0):
            ...     optimizer.step(grads=[np.full(2, gradient)])
            >>> with average.swapped():
            ...     print(w)
            [1.5 1.5]
            >>> w
            array([2., 2.])
        """
        return Swapped(self, *self.optimizer._stage())

    def state_dict(self) -> dict[str, Any]:
        """What it is, as plain data and copies of the arrays.

        Raises:
            RuntimeError: inside of `swapped()`.
        """
        workspace, _ = self.optimizer._stage()
        with workspace:
            self._refuse_swapped()
            params = self.require_all()
            arrays = [workspace.copied(label(i, p), self.arrays[p], self.arrays[p]) for i, p in enumerate(params)]
            numbers = {"n_averaged": self.n_averaged, "steps": self.steps}
            joined = [self.joined.get(p, 0) for p in params]
        options = {name: getattr(self, name) for name in self.options}
        return {"kind": type(self).__name__, **numbers, **options, "joined": joined, "averages": arrays}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; all of it, or an error and nothing. Nothing is shared with it.

        Raises:
            TypeError, KeyError, ValueError: one of another kind, number, shape or dtype of arrays.
            RuntimeError: inside of `swapped()`.
        """
        workspace, _ = self.optimizer._stage()
        with workspace:
            deque(starmap(call, self._load_writes(state_dict)), maxlen=0)  # in C: no signal comes between two of them

    def _load_writes(self, state_dict: Any) -> list[tuple[Any, ...]]:
        """The calls that make the average what a state says, all checks done: (function, *arguments)."""
        self._refuse_swapped()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}, must be a dict")
        expected = {"kind", "n_averaged", "steps", "joined", "averages", *self.options}
        if expected != set(state_dict):
            raise KeyError(f"state_dict has the keys {sorted(map(str, state_dict))}, must have {sorted(expected)}")
        if state_dict["kind"] != type(self).__name__:
            raise ValueError(f"state_dict is of {state_dict['kind']!r}, must be of {type(self).__name__!r}")
        count("n_averaged", state_dict["n_averaged"])
        count("steps", state_dict["steps"])
        options = {name: state_dict[name] for name in self.options}
        self.check(**options)
        params, arrays, joined = self.require_all(), list(state_dict["averages"]), list(state_dict["joined"])
        for name, values in (("averages", arrays), ("joined", joined)):
            if len(values) != len(params):
                raise ValueError(f"state_dict has {len(values)} {name}, must have {len(params)}: one per parameter")
        for i, n in enumerate(joined):
            count(f"joined[{i}]", n)
            if n > state_dict["n_averaged"]:
                raise ValueError(f"joined[{i}] == {n}, must be at most n_averaged == {state_dict['n_averaged']}")
        workspace, _ = self.optimizer._stage()
        copies = {
            p: workspace.copied(label(i, p), self.arrays[p], array)
            for i, (p, array) in enumerate(zip(params, arrays, strict=True))
        }
        later = {p: int(n) for p, n in zip(params, joined, strict=True) if n}
        numbers = int(state_dict["n_averaged"]), int(state_dict["steps"])
        return [(vars(self).update, options), (self.restore, copies, later, *numbers)]

    def check(self, **options: Any) -> None:
        """Raise for an option out of its bounds."""

    def _refuse_swapped(self) -> None:
        if self.is_swapped:
            raise RuntimeError("the average has changed places with the parameters: leave the block of swapped() first")

    def to_averaged_model(self, model: Any) -> Any:
        """A torch.optim.swa_utils.AveragedModel of this average; see `load_averaged_model`.

        Args:
            model: the module whose parameters the optimizer has. Its buffers are copied as they are.
        """
        from pyopt.torch.averaged import to_averaged_model

        return to_averaged_model(self, model)

    def load_averaged_model(self, averaged_model: Any, model: Any) -> None:
        """Take the averages and their count from a torch.optim.swa_utils.AveragedModel.

        Args:
            averaged_model: of `model`, whose parameters the optimizer has.
        """
        from pyopt.torch.averaged import load_averaged_model

        load_averaged_model(self, averaged_model, model)


def _new(cls: type[Averaging]) -> Averaging:
    return cls.__new__(cls)


class EMA(Averaging):
    """The exponential moving average of the parameters.

        average = average + (1 - d) * (p - average)
        d = min(decay, (1 + n) / (warmup + n)) in update n, from 1, with warmup, else decay

    after each step; the first update, number 0, copies the parameters.

    Args:
        optimizer: of pyopt or pyopt.torch; its steps update the average from now on, until `detach()`.
        decay: 0 to 1.
        warmup: >= 0; larger ones let the average forget its beginning sooner. 0: none; 10 is usual.
        every: 1 or more; only each so many steps is the average updated.

    Raises:
        TypeError, ValueError: an argument out of its bounds.

    Example:
        >>> import numpy as np
        >>> import pyopt
        >>> w = np.zeros(1)
        >>> optimizer = pyopt.SGD([w], lr=1.0)
        >>> ema = EMA(optimizer, decay=0.5)
        >>> for _ in range(3):
        ...     optimizer.step(grads=[-np.ones(1)])
        >>> w, ema.averages[0], ema.n_averaged
        (array([3.]), array([2.25]), 3)

    Parameters without a gradient are averaged too; those that come later begin with a copy. The average of short types
    is float32. Steps that are skipped do not count. Source: B. T. Polyak and A. B. Juditsky, "Acceleration of
    stochastic approximation by averaging" (1992); warm-up as in TensorFlow's ExponentialMovingAverage. torch's
    AveragedModel with get_ema_multi_avg_fn has the same formula; buffers (of batch norm) are the model's business here.
    """

    options: ClassVar[tuple[str, ...]] = ("decay", "warmup", "every")
    decay: float
    warmup: float
    every: int

    def __init__(self, optimizer: Any, decay: float = 0.999, warmup: float = 0, every: int = 1) -> None:
        self.check(decay=decay, warmup=warmup, every=every)
        self.decay, self.warmup, self.every = decay, warmup, every
        super().__init__(optimizer)

    def check(self, *, decay: Any, warmup: Any, every: Any) -> None:  # type: ignore[override]
        fraction("decay", decay)
        non_negative("warmup", warmup)
        at_least(1)("every", every)

    def is_due(self, step: int) -> bool:
        return step % self.every == 0

    def weight(self, n: int) -> float:
        if n == 0:
            return 1.0
        return 1 - (min(self.decay, (1 + n) / (self.warmup + n)) if self.warmup else self.decay)


class SWA(Averaging):
    """Stochastic weight averaging: the mean of the parameters after some of the steps.

        average = average + (p - average) / (n + 1)

    in update n, from 0, which copies the parameters.

    Args:
        optimizer: of pyopt or pyopt.torch; its steps update the average from now on, until `detach()`.
        start: the first step that counts, from 1; steps before are left out.
        every: 1 or more; of the steps from `start` on each so many counts: an epoch's, for example.

    Raises:
        TypeError, ValueError: an argument out of its bounds.

    Example:
        >>> import numpy as np
        >>> import pyopt
        >>> w = np.zeros(1)
        >>> optimizer = pyopt.SGD([w], lr=1.0)
        >>> swa = SWA(optimizer, start=2, every=2)
        >>> for _ in range(4):
        ...     optimizer.step(grads=[-np.ones(1)])
        >>> swa.averages[0]
        array([3.])

    Source: P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (2018), section 3.
    torch's AveragedModel has the same formula. For the rest see `EMA`.
    """

    options: ClassVar[tuple[str, ...]] = ("start", "every")
    start: int
    every: int

    def __init__(self, optimizer: Any, start: int = 0, every: int = 1) -> None:
        self.check(start=start, every=every)
        self.start, self.every = start, every
        super().__init__(optimizer)

    def check(self, *, start: Any, every: Any) -> None:  # type: ignore[override]
        count("start", start)
        at_least(1)("every", every)

    def is_due(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0

    def weight(self, n: int) -> float:
        return 1 / (n + 1)
