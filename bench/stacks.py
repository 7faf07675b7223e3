"""The optimizer's share of whole training steps, before and after: `python bench/stacks.py [--out FILE]`.

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
Run = Callable[["Clock", bool], None]
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


def digits(clock: Clock, ours: bool) -> None:
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


def perceptron(clock: Clock, ours: bool) -> None:
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


def spacy(clock: Clock, ours: bool) -> None:
    """spaCy's text classifier on a convolutional network, width 96, depth 4."""
    from bars_thinc import Timed
    from spacy_classifier import trained

    class Counted(Timed):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return call(self.optimizer, *args, **kwargs)

    call = clock.around(lambda optimizer, *args, **kwargs: optimizer(*args, **kwargs))
    trained("pyopt.Adam.v1" if ours else "Adam.v1", 0, 15, "cnn", averages=False, evaluations=1, around=Counted)


def gpt(clock: Clock, ours: bool) -> None:
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


WORKLOADS: dict[str, Run] = {"digits": digits, "MLPClassifier": perceptron, "spaCy": spacy, "GPT-2": gpt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--out", metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    lines = ["| workload | the optimizer's share, before | after | a step before over after |", "|---|---:|---:|---:|"]
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
                        run(clock, ours)
                    finally:
                        sys.stdout = stdout
                calls = len(clock.inside) // 15 if run is spacy else 1
                inside, whole = clock.medians(calls)
                shares[ours].append(inside / whole)
                wholes.append(whole)
            ratios.append(wholes[0] / wholes[1])
        before, after = (100 * median(each) for each in shares)
        about = (run.__doc__ or "").strip().rstrip(".")
        lines.append(f"| {name}: {about} | {before:.0f} % | {after:.0f} % | {median(ratios):.2f} |")
        print(lines[-1], flush=True)
    if arguments.out:
        Path(arguments.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
