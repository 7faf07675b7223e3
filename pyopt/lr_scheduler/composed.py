"""Schedules made of schedules: one after the other, and one on top of the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

from pyopt.checks import count
from pyopt.lr_scheduler.base import LRScheduler, a_list_of, listed, mapping
from pyopt.lr_scheduler.plateau import ReduceLROnPlateau


def parts_of(schedulers: Any) -> list[LRScheduler]:
    """The parts of a composition, at least one."""
    parts = listed("schedulers", schedulers)
    if not parts:
        raise ValueError("schedulers is empty, must hold at least one")
    return parts


class _Composed(LRScheduler):
    """Schedules of one optimizer as functions of the step: only the whole is stepped and has a position."""

    def __init__(self, optimizer: Any, schedulers: list[LRScheduler], last_epoch: int) -> None:
        for i, scheduler in enumerate(schedulers):
            kind = type(scheduler).__name__
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(f"schedulers[{i}] is a {kind}, must be a pyopt.lr_scheduler.LRScheduler")
            if isinstance(scheduler, ReduceLROnPlateau):
                raise ValueError(f"schedulers[{i}] is a ReduceLROnPlateau, whose lr is no function of the step")
            if scheduler.optimizer is not optimizer:
                raise ValueError(f"schedulers[{i}], {kind}, belongs to another optimizer")
        self._schedulers = schedulers
        super().__init__(optimizer, last_epoch)

    @property
    def schedulers(self) -> list[LRScheduler]:
        """The parts; they are functions here, their own `last_epoch` does not move."""
        return list(self._schedulers)

    def check_arguments(self) -> None:
        super().check_arguments()
        self._sets_lr = any(scheduler._sets_lr for scheduler in self._schedulers)
        self._cycles = any(scheduler._cycles for scheduler in self._schedulers)

    def _state(self) -> dict[str, Any]:
        return {**self._arguments(), "schedulers": [scheduler._state() for scheduler in self._schedulers]}

    def _loaded(self, where: str, saved: Mapping[str, Any]) -> Self:
        if "schedulers" not in saved:
            raise KeyError(f"{where} has no 'schedulers', which {type(self).__name__} needs")
        parts = saved["schedulers"]
        if not isinstance(parts, list):
            raise TypeError(f"{where}: schedulers is a {type(parts).__name__}, must be a list")
        if len(parts) != len(self._schedulers):
            raise ValueError(f"{where}: schedulers has {len(parts)} items, must have {len(self._schedulers)}")
        twin = super()._loaded(where, {key: value for key, value in saved.items() if key != "schedulers"})
        twin._schedulers = [
            scheduler._loaded(f"{where}: schedulers[{i}]", mapping(f"{where}: schedulers[{i}]", part))
            for i, (scheduler, part) in enumerate(zip(self._schedulers, parts, strict=True))
        ]
        twin.check_arguments()
        return twin

    def _become(self, twin: Self) -> None:
        parts = self._schedulers
        for scheduler, part in zip(parts, twin._schedulers, strict=True):
            scheduler._become(part)
        super()._become(twin)
        self._schedulers = parts


class SequentialLR(_Composed):
    """One schedule after the other: each begins at its milestone, as at step 0.

    Args:
        optimizer: its groups' lr is set.
        schedulers: at least one, of this optimizer.
        milestones: the steps at which the second, third, ... begin, >= 0, not decreasing.
        last_epoch: see `LRScheduler`.

    Raises:
        TypeError, ValueError: besides what others raise, a `ReduceLROnPlateau` among the schedulers, or one of another
            optimizer.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> warmup = pyopt.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
        >>> decay = pyopt.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> scheduler = SequentialLR(optimizer, [warmup, decay], milestones=[3])
        >>> lrs = []
        >>> for _ in range(6):
        ...     lrs += scheduler.get_last_lr()
        ...     optimizer.step(grads=[np.ones(3)])
        ...     scheduler.step()
        >>> [round(lr, 3) for lr in lrs]
        [0.25, 0.5, 0.75, 1.0, 0.5, 0.25]

    Cycled momentum stays where the last schedule that cycles it has left it; before the first has begun, it is where
    that will begin.

    torch's fails with a `ChainedScheduler` or another SequentialLR behind a milestone, begins anew when built with
    last_epoch >= 0, and takes as base an lr that a OneCycleLR or CyclicLR built before has left in the group. Here all
    have the group's lr from before any was built.
    """

    checks = {"milestones": a_list_of(count)}

    def __init__(
        self, optimizer: Any, schedulers: Sequence[LRScheduler], milestones: Sequence[int], last_epoch: int = -1
    ) -> None:
        self.milestones = listed("milestones", milestones)
        super().__init__(optimizer, parts_of(schedulers), last_epoch)

    def check_arguments(self) -> None:
        super().check_arguments()
        if len(self.milestones) != len(self._schedulers) - 1:
            raise ValueError(
                f"milestones has {len(self.milestones)} items, must have {len(self._schedulers) - 1}: one less than "
                "schedulers"
            )
        if any(later < earlier for earlier, later in pairwise(self.milestones)):
            raise ValueError(f"milestones == {self.milestones}, must not decrease")

    def values_at(self, step: int, base_lrs: Sequence[float]) -> list[float]:
        i = bisect_right(self.milestones, step)
        return self._schedulers[i].values_at(step - self.milestones[i - 1] if i else step, base_lrs)

    def _momenta_at(self, step: int, groups: int) -> list[float]:
        begins = [0, *self.milestones]
        ends = [*self.milestones, step + 1]
        i = bisect_right(self.milestones, step)
        cyclers = [j for j, scheduler in enumerate(self._schedulers) if scheduler._cycles and begins[j] < ends[j]]
        cyclers = cyclers or [j for j, scheduler in enumerate(self._schedulers) if scheduler._cycles]
        j = max((j for j in cyclers if j <= i), default=cyclers[0])
        return self._schedulers[j]._momenta_at(max(min(step, ends[j] - 1) - begins[j], 0), groups)


class ChainedScheduler(_Composed):
    """One schedule on top of the other: each has the lr of those before as its base.

    Schedules that are factors on the base multiply.

    Args:
        schedulers: at least one, all of one optimizer and at the same step. One with an lr of its own (`CyclicLR`,
            `OneCycleLR`) can only be the first.
        optimizer: None is that of the first.

    Raises:
        TypeError, ValueError: besides what others raise, a `ReduceLROnPlateau` among the schedulers, or one of another
            optimizer.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> warmup = pyopt.lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=2)
        >>> decay = pyopt.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> scheduler = ChainedScheduler([warmup, decay])
        >>> lrs = []
        >>> for _ in range(4):
        ...     lrs += scheduler.get_last_lr()
        ...     optimizer.step(grads=[np.ones(3)])
        ...     scheduler.step()
        >>> [round(lr, 3) for lr in lrs]
        [0.1, 0.05, 0.25, 0.125]

    In torch those that are not computed from the previous lr (LambdaLR, CosineAnnealingWarmRestarts, CyclicLR,
    OneCycleLR) overwrite what stands before them.
    """

    def __init__(self, schedulers: Sequence[LRScheduler], optimizer: Any = None) -> None:
        schedulers = parts_of(schedulers)
        first = schedulers[0]
        last_epoch = getattr(first, "last_epoch", 0)
        for i, scheduler in enumerate(schedulers):
            if getattr(scheduler, "last_epoch", last_epoch) != last_epoch:
                raise ValueError(
                    f"schedulers[{i}] is at step {scheduler.last_epoch}, must be at {last_epoch} like the first"
                )
            if i and getattr(scheduler, "_sets_lr", False):
                raise ValueError(
                    f"schedulers[{i}], {type(scheduler).__name__}, has an lr of its own: it must be first in a chain"
                )
        optimizer = getattr(first, "optimizer", None) if optimizer is None else optimizer
        super().__init__(optimizer, schedulers, last_epoch - 1)

    def values_at(self, step: int, base_lrs: Sequence[float]) -> list[float]:
        lrs = list(base_lrs)
        for scheduler in self._schedulers:
            lrs = scheduler.values_at(step, lrs)
        return lrs

    def _momenta_at(self, step: int, groups: int) -> list[float]:
        cyclers = [scheduler for scheduler in self._schedulers if scheduler._cycles]
        return cyclers[-1]._momenta_at(step, groups)
