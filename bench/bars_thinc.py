"""pyopt.thinc against thinc's own Adam: per call, and in spaCy's text classifiers: `python bench/bars_thinc.py`.

The contestants take turns in one process. Per call the medians, and the median of the ratios; of a training the share
of the optimizer, its time over thinc's, the whole time over thinc's, and both accuracies over three seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import thinc.optimizers

import pyopt.thinc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from spacy_classifier import trained

SHAPES = {"50 of 64": [(64,)] * 50, "50 of 64 x 64": [(64, 64)] * 50, "10 of 256 x 256": [(256, 256)] * 10}
SEEDS = 3


def calls(shapes: list[tuple[int, ...]], turns: int, **options: Any) -> tuple[float, float, float]:
    """Microseconds per call, ours and theirs, and the ratio."""
    optimizers = [module.Adam(0.001, L2=0.01, **options) for module in (pyopt.thinc, thinc.optimizers)]
    rng = np.random.default_rng(0)
    arrays = [[[rng.standard_normal(s).astype("f") for _ in "wg"] for s in shapes] for _ in optimizers]
    times = []
    for _ in range(turns):
        times.append([])
        for optimizer, rows in zip(optimizers, arrays, strict=True):
            for _, g in rows:
                g += 0.01
            start = perf_counter()
            for i, (w, g) in enumerate(rows):
                optimizer((i, "W"), w, g)
            times[-1].append((perf_counter() - start) / len(rows) * 1e6)
    ours, theirs = (median(column) for column in zip(*times, strict=True))
    return ours, theirs, median(a / b for a, b in times)


class Timed:
    """An optimizer of thinc's kind, with the time of its calls."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.seconds = optimizer, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        result = self.optimizer(*args, **kwargs)
        self.seconds += perf_counter() - start
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def training(name: str, seed: int, steps: int, architecture: str, averages: bool) -> tuple[float, float, float]:
    """Accuracy, seconds of the optimizer, seconds of the loop less the evaluations."""
    found: list[Timed] = []
    start = perf_counter()
    _, scores = trained(name, seed, steps, architecture, averages, around=lambda o: found.append(Timed(o)) or found[0])
    return scores[-1], found[0].seconds, perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    turns = 30 if parser.parse_args().quick else 300
    for name, shapes in SHAPES.items():
        for averages in (False, True):
            ours, theirs, ratio = calls(shapes, turns, use_averages=averages)
            print(f"{name}, averages {averages}: {ours:.1f} us a call, thinc {theirs:.1f}, ratio {ratio:.2f}")
    for architecture, averages in (("bow", True), ("bow", False), ("cnn", False)):
        runs = [
            [training(name, seed, 3 * turns // 5, architecture, averages) for name in ("pyopt.Adam.v1", "Adam.v1")]
            for seed in range(SEEDS)
        ]
        accuracies = [[round(run[side][0], 3) for run in runs] for side in (0, 1)]
        ratio = median(ours[1] / theirs[1] for ours, theirs in runs)
        whole = median(ours[2] / theirs[2] for ours, theirs in runs)
        print(
            f"spaCy {architecture}, averages {averages}: optimizer {ratio:.2f} of thinc's time, whole {whole:.2f}; "
            f"accuracy {mean(accuracies[0]):.3f} {accuracies[0]}, thinc's {mean(accuracies[1]):.3f} {accuracies[1]}"
        )


if __name__ == "__main__":
    main()
