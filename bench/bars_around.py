"""Measure the bars of what stands around the step, and print what was reached: `python bench/bars_around.py`.

Clipping, the average of the weights and the clearing of gradients in the step, against torch's functions one after the
other; norms; schedules. Gradients are filled anew before every step; the contestants take turns in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyopt
import pyopt.torch as optim
from bars_torch import Shapes, transformer

Contestants = dict[str, tuple[Callable[[], None], Callable[[], Any]]]  # what comes before, and what is timed
DECAY = 0.999


def side_by_side(contestants: Contestants, rounds: int) -> dict[str, list[float]]:
    """Seconds, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, (prepare, run) in contestants.items():
            prepare()
            begin = perf_counter()
            run()
            if turn >= 2:
                seconds[name].append(perf_counter() - begin)
    return seconds


class Weights(torch.nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.grads = [torch.randn(shape) for shape in shapes]
        for p, g in zip(self.weights, self.grads, strict=True):
            p.grad = g.clone()

    def fill(self) -> None:
        """As a backward pass does after zero_grad(set_to_none=False)."""
        torch._foreach_add_([p.grad for p in self.weights], self.grads)


def around(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """clip + Adam + EMA + zero_grad."""
    ours, theirs = Weights(shapes), Weights(shapes)
    optimizer = optim.Adam(ours.parameters())
    pyopt.averaging.EMA(optimizer, decay=DECAY)
    rival = torch.optim.Adam(theirs.parameters(), fused=True)
    averaged = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def one_by_one() -> None:
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0, foreach=True)
        rival.step()
        averaged.update_parameters(theirs)
        rival.zero_grad(set_to_none=False)

    return side_by_side(
        {
            "pyopt": (ours.fill, lambda: optimizer.step(max_norm=1.0, zero_grad=True)),
            "torch": (theirs.fill, one_by_one),
        },
        rounds,
    )


def step_alone(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """The step with all of it, the step alone, and the traffic of all of it at the roof."""
    from roof import Roof

    ours, plain = Weights(shapes), Weights(shapes)
    optimizer = optim.Adam(ours.parameters())
    pyopt.averaging.EMA(optimizer, decay=DECAY)
    alone = optim.Adam(plain.parameters())
    arrays = [[p.detach().numpy() for p in plain.weights]]
    arrays += [[np.zeros_like(p) for p in arrays[0]] for _ in range(4)]
    params = [pyopt.Parameter(p, p_grad) for p, p_grad in zip(arrays[0], arrays[1], strict=True)]
    roof = Roof(params, 3)  # reads p, g and three states, writes p and the states: 36 of the 44 bytes
    for p, *states in zip(params, *arrays[2:], strict=True):
        roof.state[p] = dict(zip(roof.state_names, states, strict=True))
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    return side_by_side(
        {
            "pyopt": (ours.fill, lambda: optimizer.step(max_norm=1.0, zero_grad=True)),
            "step": (plain.fill, alone.step),
            "roof": (nothing, roof.step),
        },
        rounds,
    )


def clipping(count: int, size: int, rounds: int) -> dict[str, list[float]]:
    """clip_grad_norm_ of arrays and tensors, which always clips."""
    ours, theirs = Weights([(size,)] * count), Weights([(size,)] * count)
    arrays = [pyopt.Parameter(np.zeros(size, np.float32), np.ones(size, np.float32)) for _ in range(count)]

    def fill() -> None:
        for p in arrays:
            p.grad.fill(1)

    return side_by_side(
        {
            "torch": (theirs.fill, lambda: torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)),
            "pyopt": (fill, lambda: pyopt.clip_grad_norm_(arrays, 1.0)),
            "pyopt.torch": (ours.fill, lambda: optim.clip_grad_norm_(ours.parameters(), 1.0)),
        },
        rounds,
    )


def row(case: str, seconds: dict[str, list[float]], fast: str, slow: str, bar: str, inverse: bool = False) -> None:
    """Print one ratio."""
    pairs = zip(seconds[slow], seconds[fast], strict=True)
    ratio = median(s / f for s, f in pairs)
    bound = float(bar.split()[-1]) if bar else 0.0
    ok = "" if not bar else "yes" if (ratio <= bound if inverse else ratio >= bound) else "NO"
    own, other = median(seconds[fast]) * 1e3, median(seconds[slow]) * 1e3
    print(f"| {case} | {bar} | {ratio:.3g} | {own:.3g} | {other:.3g} | {ok} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pyopt.set_num_threads(args.threads)
    print("| case | bar | ratio | ms | other, ms | ok |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for case, shapes, rounds, bar in (
        ("85M in 148 tensors", transformer(), args.rounds, ">= 1.5"),
        ("1000 x 64", [(64,)] * 1000, 10 * args.rounds, ">= 8"),
    ):
        seconds = around(shapes, rounds)
        row(f"clip + Adam + EMA + zero_grad, {case}: torch / pyopt", seconds, "pyopt", "torch", bar)
    seconds = step_alone(transformer(), args.rounds)
    row("the same / the step alone", seconds, "step", "pyopt", "")
    row("the same / the roof of 36 bytes (44 / 36 = 1.22; bar 1.1 * 1.22)", seconds, "roof", "pyopt", "<= 1.344", True)
    seconds = clipping(2000, 1000, 10 * args.rounds)
    row("clip_grad_norm_, 2000 x 1000: torch / NumPy", seconds, "pyopt", "torch", ">= 20")
    row("clip_grad_norm_, 2000 x 1000: torch / pyopt.torch", seconds, "pyopt.torch", "torch", ">= 6")


if __name__ == "__main__":
    main()
