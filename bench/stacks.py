"""The optimizer's share of whole training steps, before and after: `python bench/stacks.py [--write]`.

Each workload is trained with its own stack's optimizer and with pyopt's, in turns in one process. The columns: the
share of the optimizer (the medians over all steps of its time and of the whole step), and the whole step's time with
the stack's own over that with pyopt's. One thread, for shares that another load of the machine does not move much.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402

import pyopt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
RESULTS = ROOT / "bench/results"
Run = Callable[["Clock", bool], int]  # it returns how many calls of optimizers a step has
TURNS = 3


class Clock:
    """When steps of the optimizer begin and end."""

    def __init__(self) -> None:
        self.inside: list[float] = []
        self.ends: list[float] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            result = function(*args, **kwargs)
            self.ends.append(perf_counter())
            self.inside.append(self.ends[-1] - start)
            return result

        return timed

    def medians(self, calls: int = 1) -> tuple[float, float]:
        """Of the optimizer and of a whole step, which has so many calls; the first steps are left out."""
        inside = [sum(self.inside[i : i + calls]) for i in range(0, len(self.inside), calls)]
        ends = self.ends[calls - 1 :: calls]
        steps = [b - a for a, b in pairwise(ends)]
        return median(inside[3:]), median(steps[3:])


class InPlace:
    """Adam in NumPy, as it is written by hand where there is no library."""

    def __init__(self, parameters: list[pyopt.Parameter]) -> None:
        self.parameters, self.t = parameters, 0
        self.moments = [(np.zeros_like(p.data), np.zeros_like(p.data)) for p in parameters]

    def step(self) -> None:
        self.t += 1
        for p, (m, v) in zip(self.parameters, self.moments, strict=True):
            m *= 0.9
            m += 0.1 * p.grad
            v *= 0.999
            v += 0.001 * p.grad**2
            p.data -= 2e-3 / (1 - 0.9**self.t) * m / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)


def digits(clock: Clock, ours: bool) -> int:
    """examples/train_digits.py, a network of 64-256-10 in NumPy."""
    from train_digits import BATCH, Network, cross_entropy, load_data

    x, _, y, _ = load_data()
    network = Network(np.random.default_rng(0))
    optimizer: Any = pyopt.Adam(network.parameters, lr=2e-3) if ours else InPlace(network.parameters)
    step = clock.around(optimizer.step)
    for batch in np.random.default_rng(1).permutation(len(x))[: 40 * BATCH].reshape(40, BATCH):
        _, gradient = cross_entropy(network.forward(x[batch]), y[batch])
        network.backward(gradient)
        step()
    return 1


def perceptron(clock: Clock, ours: bool) -> int:
    """scikit-learn's MLPClassifier, 784-512-512-10."""
    import sklearn.neural_network as stock

    import pyopt.sklearn as own

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4000, 784)).astype("f"), rng.integers(10, size=4000)
    network = (own if ours else stock).MLPClassifier((512, 512), max_iter=2, random_state=0)
    cls = own._Solver if ours else stock._stochastic_optimizers.AdamOptimizer
    kept, cls.update_params = cls.update_params, clock.around(cls.update_params)
    try:
        network.fit(x, y)
    finally:
        cls.update_params = kept
    return 1


def spacy(clock: Clock, ours: bool) -> int:
    """spaCy's text classifier on a convolutional network, width 96, depth 4."""
    from bars_thinc import Timed
    from spacy_classifier import trained

    class Counted(Timed):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return call(self.optimizer, *args, **kwargs)

    call = clock.around(lambda optimizer, *args, **kwargs: optimizer(*args, **kwargs))
    trained("pyopt.Adam.v1" if ours else "Adam.v1", 0, 15, "cnn", averages=False, evaluations=1, around=Counted)
    return len(clock.inside) // 15


def gpt(clock: Clock, ours: bool) -> int:
    """The Trainer of transformers, a GPT-2 of 4 layers, width 128; its own optimizer is torch's fused AdamW."""
    import torch
    import transformers

    import pyopt.torch as optim

    config = transformers.GPT2Config(n_layer=4, n_head=4, n_embd=128, vocab_size=2000, n_positions=64)
    tokens = (torch.arange(160)[:, None] * 7 + torch.arange(64)) % 2000
    options = {"lr": 1e-3, **({} if ours else {"fused": True})}
    transformers.set_seed(0)
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), max_steps=20, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1000
    )
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(config),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=(optim.AdamW if ours else torch.optim.AdamW, options),
    )
    optimizer = trainer.create_optimizer()
    optimizer.step = clock.around(optimizer.step)
    trainer.train()
    return 1


def tables(clock: Clock, ours: bool) -> int:
    """examples/recommender.py, three tables of 64 columns with sparse gradients, in PyTorch."""
    import torch

    import pyopt.torch as optim
    from recommender import make_ratings, train

    def timed(cls: Any) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            optimizer = cls(*args, **kwargs)
            optimizer.step = clock.around(optimizer.step)
            return optimizer

        return made

    module = optim if ours else torch.optim
    timers = argparse.Namespace(
        __name__=module.__name__, SparseAdam=timed(module.SparseAdam), AdamW=timed(module.AdamW)
    )
    options = argparse.Namespace(optimizer="SparseAdam", lr=0.003, epochs=1, batch=512)
    train(timers, make_ratings(20_000, 10_000), options)
    return 2


WORKLOADS: dict[str, Run] = {
    "digits": digits,
    "MLPClassifier": perceptron,
    "spaCy": spacy,
    "GPT-2": gpt,
    "recommender": tables,
}


def write(lines: list[str], shares: dict[str, tuple[float, float]]) -> None:
    """Put the table, between its marks, and the plot into bench/results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    page = RESULTS / "stacks.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text("\n".join([before + BEGIN, *lines, ""]) + END + rest.partition(END)[2])
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.6 * len(shares)))
    for i, (label, color) in enumerate((("with its own", "C7"), ("with pyopt's", "C0"))):
        places = [row + 0.2 - 0.4 * i for row in range(len(shares))]
        bars = axis.barh(places, [pair[i] for pair in shares.values()], 0.38, color=color, label=label)
        axis.bar_label(bars, fmt="%.0f %%", padding=2, fontsize=8)
    axis.set_yticks(range(len(shares)), list(shares))
    axis.set(xlabel="the optimizer's share of a training step, %")
    axis.margins(x=0.1)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "stacks.png", dpi=110)


BEGIN, END = "<!-- made by bench/stacks.py -->", "<!-- made so far -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--write", action="store_true", help="put the table and the plot into bench/results")
    arguments = parser.parse_args()
    lines = ["| workload | the optimizer's share, before | after | a step before over after |", "|---|---:|---:|---:|"]
    drawn = {}
    for name in arguments.workloads or WORKLOADS:
        run = WORKLOADS[name]
        shares: tuple[list[float], list[float]] = [], []
        ratios = []
        for _ in range(TURNS):
            wholes = []
            for ours in (False, True):
                clock = Clock()
                with open(os.devnull, "w") as nowhere:
                    stdout, sys.stdout = sys.stdout, nowhere
                    try:
                        calls = run(clock, ours)
                    finally:
                        sys.stdout = stdout
                inside, whole = clock.medians(calls)
                shares[ours].append(inside / whole)
                wholes.append(whole)
            ratios.append(wholes[0] / wholes[1])
        before, after = (100 * median(each) for each in shares)
        about = (run.__doc__ or "").strip().rstrip(".")
        lines.append(f"| {name}: {about} | {before:.0f} % | {after:.0f} % | {median(ratios):.2f} |")
        drawn[name] = before, after
        print(lines[-1], flush=True)
    if arguments.write:
        write(lines, drawn)


if __name__ == "__main__":
    main()
