"""Measure the bars of pyopt.torch against torch.optim, and print what was reached: `python bench/bars_torch.py`.

Gradients are new tensors in every step, as backward makes them; the contestants take turns in one process.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch

import pyopt
import pyopt.torch as optim

Shapes = list[tuple[int, ...]]


def resnet18() -> Shapes:
    """The 62 parameters of ResNet-18 (He et al., arXiv 1512.03385, table 1): 11.7M."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for stage in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(stage, width, 3, 3), (stage,), (stage,), (stage, stage, 3, 3), (stage,), (stage,)]
            if block == 0 and stage != width:
                shapes += [(stage, width, 1, 1), (stage,), (stage,)]
            width = stage
    return [*shapes, (1000, 512), (1000,)]


def transformer(layers: int = 12, width: int = 768, context: int = 1024) -> Shapes:
    """A decoder of GPT-2's shape without its embedding of words: 148 parameters, 85M (Radford et al., 2019)."""
    block: Shapes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(context, width), *block * layers, (width,), (width,)]


def times(shapes: Shapes, contestants: dict[str, tuple[Any, torch.dtype]], rounds: int) -> dict[str, list[float]]:
    """Seconds of single steps, round by round, of what makes an optimizer for parameters, with their type."""
    torch.manual_seed(0)
    optimizers = {}
    for key, (make, dtype) in contestants.items():
        optimizers[key] = make([torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes])
    grads = [torch.randn(shape) for shape in shapes]
    result: dict[str, list[float]] = {key: [] for key in contestants}
    for turn in range(rounds + 2):
        for key, optimizer in optimizers.items():
            for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                p.grad = (g * (-1) ** turn).to(p.dtype)
            begin = perf_counter()
            optimizer.step()
            if turn >= 2:
                result[key].append(perf_counter() - begin)
            optimizer.zero_grad()
    return result


CASES = [
    # case, optimizer, shapes, rounds, bars: at least so many times faster than the rival
    ("Adam, 1000 x 64", "Adam", [(64,)] * 1000, 60, {"fused": 15, "default": 60}),
    ("Adam, 1000 x 1000", "Adam", [(1000,)] * 1000, 40, {"fused": 6}),
    ("Adam, one of 16M", "Adam", [(1 << 24,)], 15, {"fused": 1 / 1.03}),
    ("RMSprop, one of 16M", "RMSprop", [(1 << 24,)], 10, {"default": 5, "foreach": 5}),
    ("Adam, ResNet-18", "Adam", resnet18(), 20, {"fused": 1, "default": 4}),
    ("Adam, 12-layer transformer", "Adam", transformer(), 8, {"fused": 1, "default": 4}),
]
RIVALS = {"fused": {"fused": True}, "default": {}, "foreach": {"foreach": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pyopt.set_num_threads(args.threads)
    print("| case | rival | bar | times faster | pyopt, ms | rival, ms | ok |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for case, name, shapes, rounds, bars in CASES:
        rivals = {key: (partial(getattr(torch.optim, name), **RIVALS[key]), torch.float32) for key in bars}
        seconds = times(shapes, {"pyopt": (getattr(optim, name), torch.float32), **rivals}, rounds)
        for rival, bar in bars.items():
            ratio = median(t / own for t, own in zip(seconds[rival], seconds["pyopt"], strict=True))
            own, other = median(seconds["pyopt"]) * 1e3, median(seconds[rival]) * 1e3
            ok = "yes" if ratio >= bar else "NO"
            print(f"| {case} | torch {rival} | {bar:.3g} | {ratio:.3g} | {own:.3g} | {other:.3g} | {ok} |", flush=True)


if __name__ == "__main__":
    main()
