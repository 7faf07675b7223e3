"""Side by side in one process: the contestants take turns, so that what disturbs one disturbs its neighbours too."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from statistics import median
from time import perf_counter

from rivals import Contestant

MAX_STEPS = 100  # between two flips of the gradients: moments stay far from their limits (centered RMSprop: from 0)


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds: seconds per step, and the ratio to the reference's in the same round."""

    seconds: float
    ratio: float


def time_steps(contestant: Contestant, steps: int) -> float:
    """Seconds per step of a few, behind one that is not timed: it finds its threads awake and its arrays in cache."""
    contestant.flip()
    contestant.step()
    begin = perf_counter()
    for _ in range(steps):
        contestant.step()
    return (perf_counter() - begin) / steps


def side_by_side(
    contestants: Mapping[str, Contestant], budget: float = 1.0, reference: str = "pyopt"
) -> dict[str, Timing]:
    """Time all contestants in turn, round by round.

    Args:
        contestants: by name; the reference is among them.
        budget: seconds to spend, about; there are 5 to 100 rounds, or 3 where the machine turns out busy.
        reference: whose time the ratios are to.
    """
    first = {}
    for name, contestant in contestants.items():
        contestant.step()
        first[name] = time_steps(contestant, 1)
    steps = {name: round(min(max(2e-3 / t, 1), MAX_STEPS)) for name, t in first.items()}
    rounds = round(min(max(budget / sum((steps[name] + 1) * t for name, t in first.items()), 5), 100))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = Random(0)  # nobody always runs behind the same neighbour, on what it left in the caches
    end = perf_counter() + 3 * budget
    collects = gc.isenabled()
    gc.disable()
    try:
        for done in range(1, rounds + 1):
            for name in order.sample(list(contestants), len(contestants)):
                times[name].append(time_steps(contestants[name], steps[name]))
            if done >= 3 and perf_counter() > end:
                break
    finally:
        if collects:
            gc.enable()
    return {
        name: Timing(median(own), median(t / r for t, r in zip(own, times[reference], strict=True)))
        for name, own in times.items()
    }


def bandwidth(streams: int, elements: int, itemsize: int, seconds: float) -> float:
    """GB/s of a step that moves this many streams."""
    return streams * elements * itemsize / seconds / 1e9
