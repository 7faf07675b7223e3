"""Cosine annealing, with and without restarts."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi
from typing import Any

from pyopt.checks import at_least, non_negative
from pyopt.lr_scheduler.base import LRScheduler


class CosineAnnealingLR(LRScheduler):
    """lr = eta_min + (base - eta_min) * (1 + cos(pi * step / T_max)) / 2; behind T_max it rises again.

    Args:
        optimizer: its groups' lr is set.
        T_max: number of steps from base to eta_min, >= 1.
        eta_min: the lowest lr, >= 0.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = CosineAnnealingLR(optimizer, T_max=100)
        >>> scheduler.step(100)
        >>> scheduler.get_last_lr()
        [0.0]

    Source: Loshchilov and Hutter, SGDR, arXiv:1608.03983, formula 5 without restarts.

    In a `ChainedScheduler` torch's recursion has an eta_min > 0 depend on the lr of all steps before, and behind T_max
    forgets the others' factors; here it is the formula, of the others' lr in place of base.
    """

    checks = {"T_max": at_least(1), "eta_min": non_negative}

    def __init__(self, optimizer: Any, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def values_at(self, step: float, base_lrs: Sequence[float]) -> list[float]:
        return between(self.eta_min, base_lrs, 1 + cos(pi * step / self.T_max))


class CosineAnnealingWarmRestarts(LRScheduler):
    """lr = eta_min + (base - eta_min) * (1 + cos(pi * T_cur / T_i)) / 2, with T_cur the steps since the last restart.

    Args:
        optimizer: its groups' lr is set.
        T_0: number of steps until the first restart, >= 1.
        T_mult: T_i, the number of steps between two restarts, grows by it with each, >= 1.
        eta_min: the lowest lr, >= 0.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=2)
        >>> scheduler.step(20)
        >>> scheduler.get_last_lr()
        [0.5]

    `step(epoch)` takes fractions, as torch's: `step(epoch + batch / batches)`. `last_epoch` keeps the fraction.

    Source: Loshchilov and Hutter, SGDR, arXiv:1608.03983, formula 5.

    torch finds the restart before a given epoch with a logarithm, whose rounding may put it off by one; here it is
    counted. In a `ChainedScheduler` torch's overwrites what those before it have set; here it has their lr as base.
    """

    checks = {"T_0": at_least(1), "T_mult": at_least(1), "eta_min": non_negative}

    def __init__(self, optimizer: Any, T_0: int, T_mult: int = 1, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        self.T_0 = T_0
        self.T_mult = T_mult
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def check_arguments(self) -> None:
        super().check_arguments()
        self._begin, self._end = self._period_of(0)  # the restarts around the last step

    def check_position(self, epoch: Any) -> None:
        non_negative("epoch", epoch)

    def values_at(self, step: float, base_lrs: Sequence[float]) -> list[float]:
        if not self._begin <= step < self._end:
            self._begin, self._end = self._period_of(step)
        return between(self.eta_min, base_lrs, 1 + cos(pi * (step - self._begin) / (self._end - self._begin)))

    def _period_of(self, step: float) -> tuple[int, int]:
        """The restarts before and behind a step."""
        begin, period = 0, self.T_0
        if self.T_mult == 1:
            begin = int(step) // period * period
        else:
            while step >= begin + period:
                begin += period
                period *= self.T_mult
        return begin, begin + period


def between(low: float, highs: Sequence[float], height: float) -> list[float]:
    """What is height / 2 of the way from low to each of highs."""
    if len(highs) == 1:
        return [low + (highs[0] - low) * height / 2]
    return [low + (high - low) * height / 2 for high in highs]
