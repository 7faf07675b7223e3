"""Schedules that are a factor on the base lr, in order of complexity."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from pyopt.checks import at_least, count, fraction, non_negative
from pyopt.lr_scheduler.base import (
    Function,
    LRScheduler,
    a_list_of,
    each,
    function,
    listed,
    multiplied,
    per_group,
    returned,
)


class ExponentialLR(LRScheduler):
    """lr = base * gamma^step.

    Args:
        optimizer: its groups' lr is set.
        gamma: the factor from step to step, >= 0.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = ExponentialLR(optimizer, gamma=0.5)
        >>> scheduler.step()
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.25]
    """

    checks = {"gamma": non_negative}

    def __init__(self, optimizer: Any, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def factor_at(self, step: int) -> float:
        return float(self.gamma) ** step


class StepLR(LRScheduler):
    """lr = base * gamma^(step // step_size).

    Args:
        optimizer: its groups' lr is set.
        step_size: steps between two decays, >= 1.
        gamma: the factor of each decay, >= 0.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = StepLR(optimizer, step_size=30, gamma=0.5)
        >>> scheduler.step(59)
        >>> scheduler.get_last_lr()
        [0.5]
    """

    checks = {"step_size": at_least(1), "gamma": non_negative}

    def __init__(self, optimizer: Any, step_size: int, gamma: float = 0.1, last_epoch: int = -1) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def factor_at(self, step: int) -> float:
        return float(self.gamma) ** (step // self.step_size)


class MultiStepLR(LRScheduler):
    """lr = base * gamma^n, with n the number of milestones that have been reached.

    Args:
        optimizer: its groups' lr is set.
        milestones: steps at which lr decays, >= 0, in any order; one that stands twice counts twice.
        gamma: the factor of each decay, >= 0.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = MultiStepLR(optimizer, milestones=[30, 80], gamma=0.5)
        >>> scheduler.step(80)
        >>> scheduler.get_last_lr()
        [0.25]
    """

    checks = {"milestones": a_list_of(count), "gamma": non_negative}

    def __init__(self, optimizer: Any, milestones: Iterable[int], gamma: float = 0.1, last_epoch: int = -1) -> None:
        self.milestones = listed("milestones", milestones)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def check_arguments(self) -> None:
        super().check_arguments()
        self.milestones.sort()

    def factor_at(self, step: int) -> float:
        return float(self.gamma) ** bisect_right(self.milestones, step)


class ConstantLR(LRScheduler):
    """lr = base * factor for the first total_iters steps, then base.

    Args:
        optimizer: its groups' lr is set.
        factor: from 0 to 1.
        total_iters: number of steps with the factor, >= 0.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = ConstantLR(optimizer, factor=0.5, total_iters=40)
        >>> scheduler.step(39)
        >>> scheduler.get_last_lr()
        [0.5]
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [1.0]
    """

    checks = {"factor": fraction, "total_iters": count}

    def __init__(self, optimizer: Any, factor: float = 1.0 / 3, total_iters: int = 5, last_epoch: int = -1) -> None:
        self.factor = factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def factor_at(self, step: int) -> float:
        return self.factor if step < self.total_iters else 1.0


class LinearLR(LRScheduler):
    """lr = base * f, with f going in a line from start_factor to end_factor in total_iters steps, and staying there.

    Args:
        optimizer: its groups' lr is set.
        start_factor: f at step 0, from 0 (torch: above 0) to 1.
        end_factor: f from step total_iters on, from 0 to 1.
        total_iters: number of steps of the change, >= 0.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = LinearLR(optimizer, start_factor=0.5, total_iters=4)
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.625]
    """

    checks = {"start_factor": fraction, "end_factor": fraction, "total_iters": count}

    def __init__(
        self,
        optimizer: Any,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def factor_at(self, step: int) -> float:
        if step >= self.total_iters:
            return self.end_factor
        return self.start_factor + (self.end_factor - self.start_factor) * step / self.total_iters


class PolynomialLR(LRScheduler):
    """lr = base * (1 - min(step, total_iters) / total_iters)^power.

    Args:
        optimizer: its groups' lr is set.
        total_iters: number of steps to 0, >= 1.
        power: 1 is a line; >= 0.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = PolynomialLR(optimizer, total_iters=4, power=2)
        >>> scheduler.step(2)
        >>> scheduler.get_last_lr()
        [0.25]
    """

    checks = {"total_iters": at_least(1), "power": non_negative}

    def __init__(self, optimizer: Any, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1) -> None:
        self.total_iters = total_iters
        self.power = power
        super().__init__(optimizer, last_epoch)

    def factor_at(self, step: int) -> float:
        left = 1 - step / self.total_iters if step < self.total_iters else 0.0
        return float(left**self.power)


class LambdaLR(LRScheduler):
    """lr = base * f(step): a schedule of your own in a line.

    Args:
        optimizer: its groups' lr is set.
        lr_lambda: f, from the step (0, 1, ...) to a factor >= 0; or a list of such, one per param group.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.5]

    The same f must be given when resuming: no function is saved, nor, unlike in torch, the attributes of a callable
    object.
    """

    checks = {"lr_lambda": per_group(function)}

    def __init__(self, optimizer: Any, lr_lambda: Function | Sequence[Function], last_epoch: int = -1) -> None:
        self.lr_lambda = lr_lambda
        super().__init__(optimizer, last_epoch)

    def values_at(self, step: int, base_lrs: Sequence[float]) -> list[float]:
        f = self.lr_lambda
        if callable(f):
            return multiplied(base_lrs, returned("lr_lambda", f, step))
        functions = each("lr_lambda", f, len(base_lrs))
        return [base * returned("lr_lambda", f, step) for base, f in zip(base_lrs, functions, strict=True)]


class MultiplicativeLR(LRScheduler):
    """lr = base * f(1) * f(2) * ... * f(step).

    Args:
        optimizer: its groups' lr is set.
        lr_lambda: f, from the step (1, 2, ...) to a factor >= 0; or a list of such, one per param group.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = MultiplicativeLR(optimizer, lambda step: 0.5)
        >>> scheduler.step()
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.25]

    The product so far is saved, f is not.
    """

    checks = {"lr_lambda": per_group(function), "products": a_list_of(non_negative), "product_step": count}

    def __init__(self, optimizer: Any, lr_lambda: Function | Sequence[Function], last_epoch: int = -1) -> None:
        self.lr_lambda = lr_lambda
        self.products: list[float] = []
        self.product_step = 0
        super().__init__(optimizer, last_epoch)

    def values_at(self, step: int, base_lrs: Sequence[float]) -> list[float]:
        f = self.lr_lambda
        functions = [f] if callable(f) else each("lr_lambda", f, len(base_lrs))
        products, known = self.products, self.product_step
        if step < known or len(products) != len(functions):
            products, known = [1.0] * len(functions), 0
        while known < step:
            known += 1
            if len(products) == 1:
                products = [products[0] * returned("lr_lambda", functions[0], known)]
            else:
                factors = [returned("lr_lambda", f, known) for f in functions]
                products = [product * factor for product, factor in zip(products, factors, strict=True)]
        if not all(0 <= product < math.inf for product in products):
            raise ValueError(f"MultiplicativeLR: products == {products} at step {step}, must be finite and >= 0")
        self.products, self.product_step = products, known  # so that the next step takes one call
        if len(products) == 1:
            return multiplied(base_lrs, products[0])
        return [base * product for base, product in zip(base_lrs, products, strict=True)]
