"""Schedules that have an lr of their own, and cycle momentum against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import cos, floor, pi
from typing import Any

from pyopt.checks import at_least, flag, fraction, non_negative, positive
from pyopt.lr_scheduler.base import Function, LRScheduler, each, function, one_of, or_none, per_group, returned

Values = tuple[list[float], list[float]]  # of lr and of momentum, per group


class _Cycle(LRScheduler):
    """A schedule between levels of its own, of lr and of momentum, per group."""

    _sets_lr = True
    cycle_momentum: bool

    def check_arguments(self) -> None:
        super().check_arguments()
        self._cycles = self.cycle_momentum
        self._rows: list[Any] = []
        self._step = -1
        self._now: Values = ([], [])
        for i, group in enumerate(self.optimizer.param_groups if self.cycle_momentum else ()):
            if "momentum" not in group and "betas" not in group:
                raise ValueError(f"cycle_momentum == True, but param group {i} has neither 'momentum' nor 'betas'")

    def _per_group(self, groups: int, *names: str) -> Iterator[tuple[float, ...]]:
        """Per group the values of some arguments."""
        return zip(*(each(name, getattr(self, name), groups) for name in names), strict=True)

    def _rows_of(self, groups: int) -> list[Any]:
        """Per group the levels: what does not change from step to step."""
        raise NotImplementedError

    def _values(self, step: int) -> Values:
        """What lr and momentum are at a step, of the rows."""
        raise NotImplementedError

    def _at(self, step: int, groups: int) -> Values:
        if step != self._step or groups != len(self._rows):
            if groups != len(self._rows):
                self._rows = self._rows_of(groups)
            self._now = self._values(step)
            self._step = step
        return self._now

    def values_at(self, step: int, base_lrs: Sequence[float]) -> list[float]:
        return self._at(step, len(base_lrs))[0]

    def _momenta_at(self, step: int, groups: int) -> list[float]:
        return self._at(step, groups)[1]


class CyclicLR(_Cycle):
    """lr goes up and down between base_lr and max_lr, and momentum the other way.

    lr = base_lr + (max_lr - base_lr) * x * scale, with x going in a line from 0 to 1 in step_size_up steps and back in
    step_size_down; momentum = max_momentum - (max_momentum - base_momentum) * x * scale.

    Args:
        optimizer: its groups' lr is set, and with cycle_momentum their momentum, or betas[0].
        base_lr: the lower bound, >= 0; a list has one per param group. It takes the place of the optimizer's lr.
        max_lr: the upper bound, >= 0, or a list.
        step_size_up: steps from base_lr to max_lr, > 0.
        step_size_down: steps back; None: step_size_up.
        mode: scale is 1 in "triangular", 1/2^(cycle - 1) in "triangular2", gamma^step in "exp_range".
        gamma: > 0, for "exp_range".
        scale_fn: a scale of your own in place of mode; it is not saved.
        scale_mode: whether scale_fn is of the "cycle" (1, 2, ...) or of the "iterations" (the step).
        cycle_momentum: whether momentum is cycled.
        base_momentum, max_momentum: its bounds, from 0 to 1, or lists.
        last_epoch: see `LRScheduler`.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0, momentum=0.9)
        >>> scheduler = CyclicLR(optimizer, base_lr=0.0, max_lr=1.0, step_size_up=4)
        >>> scheduler.step(6)
        >>> scheduler.get_last_lr()
        [0.5]

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186.

    Where it stands first in a `ChainedScheduler`, the others change its lr; torch's overwrites them.
    """

    checks = {
        "base_lr": per_group(non_negative),
        "max_lr": per_group(non_negative),
        "step_size_up": positive,
        "step_size_down": or_none(positive),
        "mode": one_of("triangular", "triangular2", "exp_range"),
        "gamma": positive,
        "scale_fn": or_none(function),
        "scale_mode": one_of("cycle", "iterations"),
        "cycle_momentum": flag,
        "base_momentum": per_group(fraction),
        "max_momentum": per_group(fraction),
    }

    def __init__(
        self,
        optimizer: Any,
        base_lr: float | Sequence[float],
        max_lr: float | Sequence[float],
        step_size_up: float = 2000,
        step_size_down: float | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
        scale_fn: Function | None = None,
        scale_mode: str = "cycle",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.8,
        max_momentum: float | Sequence[float] = 0.9,
        last_epoch: int = -1,
    ) -> None:
        self.base_lr = base_lr
        self.max_lr = max_lr
        self.step_size_up = step_size_up
        self.step_size_down = step_size_down
        self.mode = mode
        self.gamma = gamma
        self.scale_fn = scale_fn
        self.scale_mode = scale_mode
        self.cycle_momentum = cycle_momentum
        self.base_momentum = base_momentum
        self.max_momentum = max_momentum
        super().__init__(optimizer, last_epoch)

    def check_arguments(self) -> None:
        super().check_arguments()
        up = float(self.step_size_up)
        self._total = up + float(up if self.step_size_down is None else self.step_size_down)
        self._ratio = up / self._total

    def _scale(self, cycle: int, step: int) -> float:
        if self.scale_fn is not None:
            return returned("scale_fn", self.scale_fn, cycle if self.scale_mode == "cycle" else step)
        if self.mode == "triangular":
            return 1.0
        return 0.5 ** (cycle - 1) if self.mode == "triangular2" else float(self.gamma) ** step

    def _rows_of(self, groups: int) -> list[Any]:
        """Where lr and momentum start from, and how far they go."""
        levels = self._per_group(groups, "base_lr", "max_lr", "max_momentum", "base_momentum")
        return [(lr, max_lr - lr, momentum, momentum - least) for lr, max_lr, momentum, least in levels]

    def _values(self, step: int) -> Values:
        cycle = floor(1 + step / self._total)
        x = 1.0 + step / self._total - cycle
        height = x / self._ratio if x <= self._ratio else (x - 1) / (self._ratio - 1)
        scale = self._scale(cycle, step)
        lrs, momenta = [], []
        for lr, lr_span, momentum, momentum_span in self._rows:
            lrs.append(lr + lr_span * height * scale)
            momenta.append(momentum - momentum_span * height * scale)
        return lrs, momenta


class OneCycleLR(_Cycle):
    """lr goes up to max_lr once, then down to next to nothing, and momentum the other way.

    lr goes from max_lr / div_factor to max_lr in the first pct_start of the steps, then to
    max_lr / div_factor / final_div_factor; with three_phase back to max_lr / div_factor in between, in as many steps.

    Args:
        optimizer: its groups' lr is set, and with cycle_momentum their momentum, or betas[0].
        max_lr: the peak, >= 0; a list has one per param group. It takes the place of the optimizer's lr.
        total_steps: number of steps of the training, >= 1; None: epochs * steps_per_epoch.
        epochs, steps_per_epoch: >= 1.
        pct_start: the part of the steps before the peak, from 0 to 1.
        anneal_strategy: "cos" or "linear".
        cycle_momentum: whether momentum is cycled.
        base_momentum: at the peak, from 0 to 1, or a list.
        max_momentum: at both ends, from 0 to 1, or a list.
        div_factor, final_div_factor: > 0.
        three_phase: whether lr comes back to where it began before it goes to the end.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: besides what others raise, a step behind total_steps.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0, momentum=0.9)
        >>> scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=100)
        >>> scheduler.step(29)
        >>> scheduler.get_last_lr()
        [1.0]
        >>> optimizer.param_groups[0]["momentum"]
        0.85

    Source: Smith and Topin, Super-Convergence, arXiv:1708.07120; two phases as in fastai.

    At step total_steps, behind the last, torch lets lr rise again; here it keeps its last value. A peak at step 0
    (pct_start * total_steps == 1) is no division by zero.
    """

    checks = {
        "max_lr": per_group(non_negative),
        "total_steps": or_none(at_least(1)),
        "epochs": or_none(at_least(1)),
        "steps_per_epoch": or_none(at_least(1)),
        "pct_start": fraction,
        "anneal_strategy": one_of("cos", "linear"),
        "cycle_momentum": flag,
        "base_momentum": per_group(fraction),
        "max_momentum": per_group(fraction),
        "div_factor": positive,
        "final_div_factor": positive,
        "three_phase": flag,
    }

    def __init__(
        self,
        optimizer: Any,
        max_lr: float | Sequence[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.85,
        max_momentum: float | Sequence[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        self.max_lr = max_lr
        self.total_steps = total_steps
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.pct_start = pct_start
        self.anneal_strategy = anneal_strategy
        self.cycle_momentum = cycle_momentum
        self.base_momentum = base_momentum
        self.max_momentum = max_momentum
        self.div_factor = div_factor
        self.final_div_factor = final_div_factor
        self.three_phase = three_phase
        super().__init__(optimizer, last_epoch)

    def check_arguments(self) -> None:
        super().check_arguments()
        if self.total_steps is None:
            if self.epochs is None or self.steps_per_epoch is None:
                raise ValueError("OneCycleLR needs total_steps, or epochs and steps_per_epoch")
            self.total_steps = self.epochs * self.steps_per_epoch

        peak, last = self.pct_start * self.total_steps - 1, self.total_steps - 1
        # Where a phase ends, and from which level to which it goes; levels: the start, the peak, the end.
        self._phases: list[tuple[float, int, int]] = [(peak, 0, 1), (last, 1, 2)]
        if self.three_phase:
            self._phases = [(peak, 0, 1), (2 * self.pct_start * self.total_steps - 2, 1, 0), (last, 0, 2)]

    def _rows_of(self, groups: int) -> list[Any]:
        """The three levels of lr, and of momentum."""
        rows = []
        for peak, high, low in self._per_group(groups, "max_lr", "max_momentum", "base_momentum"):
            first = peak / self.div_factor
            rows.append(((first, peak, first / self.final_div_factor), (high, low, high)))
        return rows

    def _values(self, step: int) -> Values:
        if step > self._phases[-1][0] + 1:
            raise ValueError(f"step {step} of OneCycleLR, must be <= total_steps == {self.total_steps}")
        begin = 0.0
        for end, start, to in self._phases:  # noqa: B007
            if step <= end:
                break
            begin = end  # behind the last step too, whose values then stay
        part = (step - begin) / (end - begin) if end > begin else 1.0
        lrs, momenta = [], []
        if self.anneal_strategy == "cos":
            left = cos(pi * part) + 1
            for lr, momentum in self._rows:
                lrs.append(lr[to] + (lr[start] - lr[to]) / 2.0 * left)
                momenta.append(momentum[to] + (momentum[start] - momentum[to]) / 2.0 * left)
        else:
            for lr, momentum in self._rows:
                lrs.append((lr[to] - lr[start]) * part + lr[start])
                momenta.append((momentum[to] - momentum[start]) * part + momentum[start])
        return lrs, momenta
