"""Checks of hyper-parameters, with one form of message: name, value, bound.

A check takes (name, value) and returns nothing or raises: TypeError for the wrong type, ValueError out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

Check = Callable[[str, Any], None]
MOST_STEPS = 2**52  # where a count of steps stays: a double holds it, and no training comes near


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """A finite real number with low <= value <= high and above < value < below."""
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} == {value!r}, must be a number, not {type(value).__name__}")
    try:
        x = float(value)
    except OverflowError:  # an int of hundreds of digits
        x = math.inf
    if not (math.isfinite(x) and low <= x <= high and above < x < below):
        bounds = {">=": low, "<=": high, ">": above, "<": below}
        words = "".join(f" and {sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))
        raise ValueError(f"{name} == {value!r}, must be finite{words}")


def non_negative(name: str, value: Any) -> None:
    """A finite number >= 0."""
    number(name, value, 0)


def positive(name: str, value: Any) -> None:
    """A finite number > 0."""
    number(name, value, above=0)


def positive_or_inf(name: str, value: Any) -> None:
    """A number > 0, or inf."""
    if value != math.inf:
        number(name, value, above=0)


def fraction(name: str, value: Any) -> None:
    """A number from 0 to 1, both allowed."""
    number(name, value, 0, 1)


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Two of something."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} == {value!r}, must be a pair of numbers")
    return value[0], value[1]


def betas(name: str, value: Any) -> None:
    """A pair of numbers >= 0 and < 1."""
    _each_beta(name, pair(name, value))


def triple_of_betas(name: str, value: Any) -> None:
    """Three numbers >= 0 and < 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{name} == {value!r}, must be three numbers")
    _each_beta(name, value)


def _each_beta(name: str, value: Sequence[Any]) -> None:
    for i, beta in enumerate(value):
        number(f"{name}[{i}]", beta, 0, below=1)


def etas(name: str, value: Any) -> None:
    """A factor that shrinks, > 0 and < 1, and one that grows, > 1."""
    shrink, grow = pair(name, value)
    number(f"{name}[0]", shrink, above=0, below=1)
    number(f"{name}[1]", grow, above=1)


def step_sizes(name: str, value: Any) -> None:
    """The smallest step, > 0, and the largest."""
    smallest, largest = pair(name, value)
    number(f"{name}[0]", smallest, above=0)
    number(f"{name}[1]", largest, low=smallest)


def at_least(low: int) -> Check:
    """A check for an integer from low to MOST_STEPS."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, Integral) or isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} == {value!r}, must be an int, not {type(value).__name__}")
        if not low <= int(value) <= MOST_STEPS:
            raise ValueError(f"{name} == {value!r}, must be >= {low} and <= 2**52")

    return check


count = at_least(0)


def warmup(name: str, value: Any) -> None:
    """A number of steps, > 0, or None."""
    if value is not None:
        number(name, value, above=0)


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} == {value!r}, must be a bool, not {type(value).__name__}")


def plain(group: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters as Python numbers, so that what is computed of them is in double; torch's may be tensors."""

    def item(value: Any) -> Any:
        return value.item() if hasattr(value, "item") and math.prod(value.shape) == 1 else value

    values = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    return {k: tuple(map(item, v)) if isinstance(v, (tuple, list)) else item(v) for k, v in values.items()}
