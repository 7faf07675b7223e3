"""What all schedules share: the groups they own, the step, the state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from numbers import Integral, Real
from typing import Any, ClassVar, Self

from pyopt.checks import Check, at_least, count, non_negative

Groups = list[dict[str, Any]]
Function = Callable[[int], float]
INFINITY = math.inf


class LRScheduler:
    """Base of all schedules: sets the learning rate of every group to a function of the step.

    `step()` after each `optimizer.step()` moves on by one; `step(n)` goes to step n, forth or back. A schedule owns the
    lr of its optimizer's groups:

    - The base lr of a group is its "initial_lr", which the first schedule sets to the group's lr; `base_lrs` has them,
      and is the place to change them.
    - A group that is added later has its own lr as base, and joins at the step at which the schedule is.
    - lr set by hand, or by a second schedule, would be overwritten: `step` raises, and names the group. Schedules are
      combined by `ChainedScheduler` and `SequentialLR`.
    - An lr that is a tensor is filled in place.

    The arguments are attributes; `check_arguments()` puts into effect what was changed in them.

    A schedule of your own is a function, given to `LambdaLR`; or a subclass that overrides `factor_at`, or `values_at`
    where lr is no multiple of the base. Its public attributes are saved; `checks` may name a check for each.

    Args:
        optimizer: with `param_groups`, a list of dicts with "lr".
        last_epoch: -1 starts at step 0; n continues at step n + 1, in groups that have "initial_lr".

    Raises:
        TypeError, ValueError, KeyError: an argument of a wrong type or out of its bounds; no "initial_lr" to continue
            from. Nothing has changed then.

    Example:
        >>> class InverseRoot(LRScheduler):
        ...     def __init__(self, optimizer, period, last_epoch=-1):
        ...         self.period = period
        ...         super().__init__(optimizer, last_epoch)
        ...     def factor_at(self, step):
        ...         return (1 + step / self.period) ** -0.5
        >>> import pyopt
        >>> optimizer = pyopt.SGD([np.zeros(3)], lr=0.5)
        >>> scheduler = InverseRoot(optimizer, period=1)
        >>> for _ in range(3):
        ...     optimizer.step(grads=[np.ones(3)])
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["lr"], scheduler.state_dict()
        (0.25, {'period': 1, 'base_lrs': [0.5], 'last_epoch': 3})

    Against torch: schedules that torch computes from the previous lr are functions of the step here, so that rounding
    does not add up, nothing is divided by an lr or a factor of 0, and any step can be gone to. lr, `base_lrs` and
    `get_last_lr()` are plain floats. Groups get no key but "initial_lr". There is no warning that `optimizer.step` was
    not called before: that would take a patch of the optimizer.
    """

    # What each argument, an attribute of the same name, may be.
    checks: ClassVar[Mapping[str, Check]] = {}
    # Whether lr does not depend on the base: such a schedule can only stand first in a chain.
    _sets_lr: bool = False
    # Whether momentum is cycled too: see `_momenta_at`.
    _cycles: bool = False

    optimizer: Any
    base_lrs: list[float]
    last_epoch: int

    def __init__(self, optimizer: Any, last_epoch: int = -1) -> None:
        groups = groups_of(optimizer)
        at_least(-1)("last_epoch", last_epoch)
        if last_epoch >= 0:
            for i, group in enumerate(groups):
                if "initial_lr" not in group:
                    raise KeyError(
                        f"last_epoch == {last_epoch}, but param group {i} has no 'initial_lr' to continue from: load "
                        "the optimizer's state first, or start with last_epoch == -1"
                    )
        self.optimizer = optimizer
        self._last_lr: list[float] = []
        self.base_lrs = [base_lr(i, group) for i, group in enumerate(groups)]
        self.last_epoch = int(last_epoch)
        self.check_arguments()
        self._go(self.last_epoch + 1, groups)
        for group, base in zip(groups, self.base_lrs, strict=True):
            group.setdefault("initial_lr", base)

    def check_arguments(self) -> None:
        """Raise unless the arguments are valid, and make them plain numbers; overriders call this first."""
        for name, check in self.checks.items():
            value = getattr(self, name)
            check(name, value)
            setattr(self, name, plain(name, value))

    def factor_at(self, step: int) -> float:
        """What the base lr of every group is multiplied with at a step, from 0."""
        raise TypeError(f"{type(self).__name__} must override factor_at(step), or values_at(step, base_lrs)")

    def values_at(self, step: int, base_lrs: Sequence[float]) -> list[float]:
        """The lr of every group at a step, from 0. Called for any step in any order; changes nothing."""
        return multiplied(base_lrs, self.factor_at(step))

    def _momenta_at(self, step: int, groups: int) -> list[float]:
        """The momentum of every group at a step."""
        raise NotImplementedError

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, epoch: int | None = None) -> None:
        """Set the lr of the next step, or of step `epoch`.

        Raises:
            RuntimeError: lr of a group was changed by something else, or groups were taken away.
            ValueError: the lr would be negative or not finite. Nothing has changed then, either way.
        """
        groups: Groups = self.optimizer.param_groups
        if len(groups) != len(self._last_lr):
            self._take_new(groups)
        if epoch is None:
            epoch = self.last_epoch + 1
        else:
            self.check_position(epoch)
            epoch = plain("epoch", epoch)
        self._go(epoch, groups, self._last_lr)

    def check_position(self, epoch: Any) -> None:
        """Raise unless this is a step to go to."""
        count("epoch", epoch)

    def get_last_lr(self) -> list[float]:
        """The lr of every group, as last set."""
        return list(self._last_lr)

    def get_lr(self) -> list[float]:
        """The lr of every group at the present step, computed anew."""
        return self.values_at(self.last_epoch, self.base_lrs)

    def _go(self, step: int, groups: Groups, found: list[float] | None = None) -> None:
        """Set what belongs to a step, in groups that must have the lr `found`; all checks come first."""
        try:
            lrs = self.values_at(step, self.base_lrs)
        except OverflowError:
            raise ValueError(f"{type(self).__name__}: lr at step {step} is too large, must be finite") from None
        momenta = self._momenta_at(step, len(groups)) if self._cycles else None
        if found is not None and untouched(groups, found, lrs):
            i = 0
            for group in groups:
                group["lr"] = lrs[i]
                i += 1  # noqa: SIM113
        else:
            lrs = list(map(float, lrs))
            self._check(step, groups, found, lrs)
            lrs = [set_lr(group, lr) for group, lr in zip(groups, lrs, strict=True)]
        self.last_epoch = step
        self._last_lr = lrs
        if momenta is not None:
            set_momenta(groups, momenta)

    def _check(self, step: int, groups: Groups, found: list[float] | None, lrs: list[float]) -> None:
        name = type(self).__name__
        if len(lrs) != len(groups):
            raise ValueError(f"{name}: {len(lrs)} values of lr at step {step}, must be {len(groups)}")
        for lr in lrs:
            if not 0 <= lr < INFINITY:
                raise ValueError(f"{name}: lr == {lr!r} at step {step}, must be finite and >= 0")
        for i, (group, lr) in enumerate(zip(groups, found or (), strict=False)):
            if group["lr"] != lr:
                raise RuntimeError(
                    f"lr of param group {i} is {float(group['lr'])!r}, but {name} has set {lr!r}: it was changed by "
                    "hand (change scheduler.base_lrs instead), by another scheduler (combine them in a "
                    "ChainedScheduler or SequentialLR), or by a checkpoint (load the scheduler's too)"
                )

    def _take_new(self, groups: Groups) -> None:
        """Take in the groups that were added to the optimizer."""
        known = len(self.base_lrs)
        if len(groups) < known:
            raise RuntimeError(f"the optimizer has {len(groups)} param groups, had {known} when the schedule began")
        added = groups[known:]
        self.base_lrs += [base_lr(i, group) for i, group in enumerate(added, known)]
        self._last_lr = [*self._last_lr, *(float(group["lr"]) for group in added)]
        for group, base in zip(added, self.base_lrs[known:], strict=True):
            group.setdefault("initial_lr", base)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The arguments, `base_lrs` and `last_epoch` as plain data: numbers, strings, lists, dicts, None.

        Functions are not saved: give the same when resuming.
        """
        self._take_new(self.optimizer.param_groups)
        return {**self._state(), "base_lrs": plain("base_lrs", self.base_lrs), "last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; also sets the lr of that step, which torch leaves alone.

        So the order in which optimizer and scheduler are loaded does not matter. The arguments are those saved, as in
        torch. Keys that begin with "_" are passed over: that is what torch's own states have besides.

        Raises:
            TypeError, KeyError, ValueError: the state of another scheduler, for other groups, or damaged; nothing has
                changed then.
        """
        groups = groups_of(self.optimizer)
        saved = dict(mapping("state_dict", state_dict))
        for key in ("base_lrs", "last_epoch"):
            if key not in saved:
                raise KeyError(f"state_dict has no {key!r}, only {sorted(map(str, saved))}")
        bases, last_epoch = saved.pop("base_lrs"), saved.pop("last_epoch")
        twin = self._loaded("state_dict", saved)
        a_list_of(non_negative)("state_dict: base_lrs", bases)
        twin.base_lrs = [float(base) for base in each("state_dict: base_lrs", bases, len(groups))]
        self.check_position(last_epoch)
        twin._go(plain("last_epoch", last_epoch), groups)
        self._become(twin)

    def _state(self) -> dict[str, Any]:
        """What is saved but for where the schedule is."""
        return self._arguments()

    def _arguments(self) -> dict[str, Any]:
        """All public attributes that are data."""
        apart = ("optimizer", "base_lrs", "last_epoch")
        names = [name for name in vars(self) if not name.startswith("_") and name not in apart]
        return {name: plain(name, getattr(self, name)) for name in names if not is_function(getattr(self, name))}

    def _loaded(self, where: str, saved: Mapping[str, Any]) -> Self:
        """A copy of this schedule with the saved arguments, checked."""
        expected = self._arguments()
        given = {key: value for key, value in saved.items() if not str(key).startswith("_")}
        if unknown := sorted(map(str, given.keys() - expected.keys())):
            raise ValueError(f"{where} of another scheduler: it has {unknown[0]!r}, {type(self).__name__} has not")
        if missing := [key for key in expected if key not in given]:
            raise KeyError(f"{where} has no {missing[0]!r}, which {type(self).__name__} needs")
        twin = copy(self)
        vars(twin).update({key: deepcopy(given[key]) for key in expected})
        try:
            twin.check_arguments()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where} of {type(self).__name__}: {error}") from None
        return twin

    def _become(self, twin: Self) -> None:
        vars(self).update(vars(twin))


def multiplied(base_lrs: Sequence[float], factor: float) -> list[float]:
    """Every base lr times a factor."""
    if len(base_lrs) == 1:  # the usual case, which a list comprehension makes 0.1 us slower
        return [base_lrs[0] * factor]
    return [base * factor for base in base_lrs]


def returned(name: str, f: Function, argument: int) -> float:
    """What a function of the user's own returns, which must be a number."""
    value = f(argument)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}({argument}) returned {value!r}, must be a number") from None


# --- param groups -----------------------------------------------------------------------------------------------------


def groups_of(optimizer: Any) -> Groups:
    """The param groups of an optimizer."""
    groups: Any = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, must have param_groups, a list of dicts")
    for i, group in enumerate(groups):
        if "lr" not in group:
            raise KeyError(f"param group {i} has no 'lr', only {sorted(map(str, group))}")
    return groups


def untouched(groups: Groups, found: list[float], lrs: list[float]) -> bool:
    """Whether groups have the very numbers found before, and new ones may be put there as they are.

    By identity, and with a plain count (enumerate is slower for one group), which is what makes a step fast; what comes
    out False is looked at in full.
    """
    if len(lrs) != len(groups):
        return False
    i = 0
    for group in groups:
        lr = lrs[i]
        if group["lr"] is not found[i] or type(lr) is not float or not 0.0 <= lr < INFINITY:
            return False
        i += 1  # noqa: SIM113
    return True


def base_lr(index: int, group: dict[str, Any]) -> float:
    """The lr that a schedule of a group starts from; torch's may be a tensor."""
    key = "initial_lr" if "initial_lr" in group else "lr"
    value = group[key]
    value = value.item() if hasattr(value, "item") else value
    non_negative(f"{key!r} of param group {index}", value)
    return float(value)


def set_lr(group: dict[str, Any], lr: float) -> float:
    """Set the lr of a group; what it then is, which in a tensor may be rounded."""
    current = group["lr"]
    if type(current) is not float and hasattr(current, "fill_"):
        current.fill_(lr)
        return float(current)
    group["lr"] = lr
    return lr


def set_momenta(groups: Groups, momenta: Sequence[float]) -> None:
    """Set what plays the part of momentum: the first of "betas", or "momentum"."""
    i = 0
    for group in groups:
        if "betas" in group:
            group["betas"] = (momenta[i], *group["betas"][1:])
        else:
            group["momentum"] = momenta[i]
        i += 1  # noqa: SIM113


# --- checks -----------------------------------------------------------------------------------------------------------


def one_of(*choices: str) -> Check:
    """A check for one of some words."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"{name} == {value!r}, must be one of {', '.join(map(repr, choices))}")

    return check


def per_group(check: Check) -> Check:
    """A check for one value for all groups, or a list of one for each."""

    def check_each(name: str, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                check(f"{name}[{i}]", item)
        else:
            check(name, value)

    return check_each


def a_list_of(check: Check) -> Check:
    """A check for a list."""

    def check_each(name: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} == {value!r}, must be a list")
        per_group(check)(name, value)

    return check_each


def listed(name: str, value: Any) -> list[Any]:
    """What a list, or another iterable that is no string, holds."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is a {type(value).__name__}, must be a list")
    return list(value)


def or_none(check: Check) -> Check:
    """A check for None, or what another check allows."""

    def check_some(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_some


def function(name: str, value: Any) -> None:
    """Something to call."""
    if not callable(value):
        raise TypeError(f"{name} is a {type(value).__name__}, must be callable")


def is_function(value: Any) -> bool:
    """Whether an argument is a function, or a list of them."""
    return callable(value) or (isinstance(value, list) and bool(value) and all(map(callable, value)))


def mapping(what: str, value: Any) -> Mapping[str, Any]:
    """The value, which must be a dict."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is a {type(value).__name__}, must be a dict")
    return value


def each(name: str, value: Any, groups: int) -> Sequence[Any]:
    """A value per group: of a list its items, otherwise the same for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * groups
    if len(value) != groups:
        raise ValueError(f"{name} has {len(value)} values, must have {groups}: one per param group")
    return value


def plain(name: str, value: Any) -> Any:
    """The value in Python's numbers, so that what is computed of it and what is saved is the same; functions stay."""
    if value is None or isinstance(value, (bool, str)) or callable(value):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    raise TypeError(
        f"{name} is a {type(value).__name__}, must be numbers, strings, lists or dicts: the public attributes of a "
        "scheduler are saved; begin the name of one that is not with '_'"
    )
