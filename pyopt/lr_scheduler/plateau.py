"""A schedule that looks at the progress, not at the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyopt.checks import count, non_negative, number
from pyopt.lr_scheduler.base import LRScheduler, a_list_of, each, groups_of, mapping, one_of, per_group, set_lr


def _shrinking(name: str, value: Any) -> None:
    """A factor >= 0 and < 1."""
    number(name, value, 0, below=1)


class ReduceLROnPlateau(LRScheduler):
    """lr is multiplied by factor when a metric has not improved for more than patience calls.

    Args:
        optimizer: its groups' lr is set; it may be changed by hand in between.
        mode: "min" if the metric should go down, "max" if up.
        factor: >= 0 and < 1.
        patience: number of calls without improvement that are put up with, >= 0.
        threshold: by how much the metric must improve, >= 0.
        threshold_mode: "rel": by threshold times the best; "abs": by threshold.
        cooldown: number of calls after a reduction in which none is counted, >= 0.
        min_lr: lr is not reduced below, >= 0; a list has one per param group.
        eps: a reduction by no more than this is left out, >= 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of its bounds.

    Example:
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=1.0)
        >>> scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        >>> for loss in [3.0, 2.0, 2.0, 2.0]:
        ...     scheduler.step(loss)
        >>> scheduler.get_last_lr()
        [0.5]

    A metric of NaN is no improvement. The state holds the lr of the groups, and `load_state_dict` sets it.
    """

    checks = {
        "mode": one_of("min", "max"),
        "factor": _shrinking,
        "patience": count,
        "threshold": non_negative,
        "threshold_mode": one_of("rel", "abs"),
        "cooldown": count,
        "min_lr": per_group(non_negative),
        "eps": non_negative,
        "cooldown_counter": count,
        "num_bad_epochs": count,
    }

    def __init__(
        self,
        optimizer: Any,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0,
        eps: float = 1e-8,
    ) -> None:
        groups = groups_of(optimizer)
        self.optimizer = optimizer
        self.mode = mode
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.min_lr = min_lr
        self.eps = eps
        self.best: float | None = None
        self.cooldown_counter = 0
        self.num_bad_epochs = 0
        self.last_epoch = 0
        self._groups = len(groups)
        self.check_arguments()

    def check_arguments(self) -> None:
        super().check_arguments()
        each("min_lr", self.min_lr, len(self.optimizer.param_groups))
        if self.best is not None and (not isinstance(self.best, (int, float)) or math.isnan(self.best)):
            raise ValueError(f"best == {self.best!r}, must be a number or None")

    @property
    def in_cooldown(self) -> bool:
        """Whether calls without improvement are not counted now."""
        return self.cooldown_counter > 0

    def is_better(self, metric: float) -> bool:
        """Whether a metric is an improvement on the best so far."""
        sign = 1.0 if self.mode == "min" else -1.0
        if self.best is None:
            return sign * metric < math.inf
        if self.threshold_mode == "rel":
            return sign * metric < sign * (self.best * (1.0 - sign * self.threshold))
        return sign * metric < sign * (self.best - sign * self.threshold)

    def step(self, metrics: Any) -> None:  # type: ignore[override]
        """Look at the metric after an epoch, and reduce lr if it is time.

        Args:
            metrics: what is watched: a number, or an array or tensor of one element.
        """
        try:
            metric = float(metrics)
        except (TypeError, ValueError):
            raise TypeError(f"metrics == {metrics!r}, must be a number, not {type(metrics).__name__}") from None
        groups = self.optimizer.param_groups
        if len(groups) != self._groups:  # a list of min_lr is for those that were there
            each("min_lr", self.min_lr, len(groups))
            self._groups = len(groups)
        self.last_epoch += 1
        if self.is_better(metric):
            self.best = metric
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
            for group, floor in zip(groups, each("min_lr", self.min_lr, len(groups)), strict=True):
                lr = float(group["lr"])
                reduced = max(lr * self.factor, floor)
                if lr - reduced > self.eps:
                    set_lr(group, reduced)

    def get_lr(self) -> list[float]:
        """The lr of every group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        """The lr of every group."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """The arguments, what has been seen, and the lr of the groups, as plain data."""
        return {**self._state(), "lrs": self.get_lr(), "last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; also sets the lr of the groups.

        Raises:
            TypeError, KeyError, ValueError: the state of another scheduler, for other groups, or damaged; nothing has
                changed then.
        """
        saved = dict(mapping("state_dict", state_dict))
        for key in ("lrs", "last_epoch"):
            if key not in saved:
                raise KeyError(f"state_dict has no {key!r}, only {sorted(map(str, saved))}")
        lrs, last_epoch = saved.pop("lrs"), saved.pop("last_epoch")
        groups = groups_of(self.optimizer)
        a_list_of(non_negative)("state_dict: lrs", lrs)
        lrs = each("state_dict: lrs", lrs, len(groups))
        count("state_dict: last_epoch", last_epoch)
        twin = self._loaded("state_dict", saved)
        twin.last_epoch = last_epoch
        self._become(twin)
        for group, lr in zip(groups, lrs, strict=True):
            set_lr(group, float(lr))
