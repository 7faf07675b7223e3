"""The schedules that most people write by hand: a linear warm-up, then a decay."""

from __future__ import annotations

from math import cos, pi
from typing import Any

from pyopt.checks import at_least, count, fraction
from pyopt.lr_scheduler.base import LRScheduler


class _WarmupLR(LRScheduler):
    """A line up to base, then `decay`, then min_factor."""

    checks = {"warmup_steps": count, "total_steps": at_least(1), "min_factor": fraction}

    def __init__(
        self, optimizer: Any, warmup_steps: int, total_steps: int, min_factor: float = 0.0, last_epoch: int = -1
    ) -> None:
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_factor = min_factor
        super().__init__(optimizer, last_epoch)

    def check_arguments(self) -> None:
        super().check_arguments()
        if self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps == {self.warmup_steps}, must be <= total_steps == {self.total_steps}")

    def factor_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if step >= self.total_steps:
            return self.min_factor
        rest = self.decay((step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_factor + (1 - self.min_factor) * rest

    def decay(self, progress: float) -> float:
        """What is left of 1, as progress goes from 0 to 1."""
        raise NotImplementedError


class WarmupCosineLR(_WarmupLR):
    """A linear warm-up to base, then a half cosine down to base * min_factor.

    lr = base * (step + 1) / (warmup_steps + 1) for step < warmup_steps, then with t from 0 at warmup_steps to 1 at
    total_steps: lr = base * (min_factor + (1 - min_factor) * (1 + cos(pi * t)) / 2); behind that base * min_factor.

    Args:
        optimizer: its groups' lr is set.
        warmup_steps: number of steps below base, >= 0.
        total_steps: number of steps of the training, >= warmup_steps.
        min_factor: what is left at the end, from 0 to 1: large language models often keep 0.1.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.AdamW([np.zeros(3)], lr=1.0)
        >>> scheduler = WarmupCosineLR(optimizer, warmup_steps=3, total_steps=7, min_factor=0.1)
        >>> lrs = []
        >>> for _ in range(7):
        ...     lrs += scheduler.get_last_lr()
        ...     optimizer.step(grads=[np.ones(3)])
        ...     scheduler.step()
        >>> [round(lr, 2) for lr in lrs]
        [0.25, 0.5, 0.75, 1.0, 0.87, 0.55, 0.23]

    The first step has an lr above 0, as in nanoGPT; in transformers' get_cosine_schedule_with_warmup, of the same
    order of arguments, it has 0 and learns nothing.
    """

    def decay(self, progress: float) -> float:
        return (1 + cos(pi * progress)) / 2


class WarmupLinearLR(_WarmupLR):
    """A linear warm-up to base, then a line down to base * min_factor.

    lr = base * (step + 1) / (warmup_steps + 1) for step < warmup_steps, then with t from 0 at warmup_steps to 1 at
    total_steps: lr = base * (min_factor + (1 - min_factor) * (1 - t)); behind that base * min_factor.

    Args:
        optimizer: its groups' lr is set.
        warmup_steps: number of steps below base, >= 0.
        total_steps: number of steps of the training, >= warmup_steps.
        min_factor: what is left at the end, from 0 to 1.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.AdamW([np.zeros(3)], lr=1.0)
        >>> scheduler = WarmupLinearLR(optimizer, warmup_steps=3, total_steps=7)
        >>> lrs = []
        >>> for _ in range(7):
        ...     lrs += scheduler.get_last_lr()
        ...     optimizer.step(grads=[np.ones(3)])
        ...     scheduler.step()
        >>> [round(lr, 2) for lr in lrs]
        [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    """

    def decay(self, progress: float) -> float:
        return 1 - progress
