"""Measure the bars of row-sparse gradients, and print what was reached: `python bench/bars_rows.py`.

4096 indices of a table of 64 columns, of which a quarter are repetitions, new ones in every step, as backward makes
them; the contestants take turns in one process, in random order, and a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

import pyopt
import pyopt.torch as optim

WIDTH = 64
INDICES = 4096
Times = dict[str, list[float]]


def batches(rows: int, count: int, indices: int) -> list[tuple[Any, Any]]:
    """Indices of rows, a quarter of them repetitions, and their values."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        distinct = rng.integers(0, rows, indices * 3 // 4)
        drawn = np.concatenate([distinct, rng.choice(distinct, indices - len(distinct))])
        made.append((rng.permutation(drawn), rng.standard_normal((indices, WIDTH)).astype(np.float32)))
    return made


def table(rows: int) -> Any:
    return np.full((rows, WIDTH), 0.5, np.float32)


def on_arrays(name: str, rows: int) -> Callable[[Any, Any], float]:
    """Seconds of a step with indices and values."""
    optimizer = getattr(pyopt, name)([table(rows)])

    def step(indices: Any, values: Any) -> float:
        gradient = pyopt.RowSparse(indices, values, (rows, WIDTH))
        begin = perf_counter()
        optimizer.step(grads=[gradient])
        return perf_counter() - begin

    return step


def on_tensors(module: Any, name: str, rows: int) -> Callable[[Any, Any], float]:
    """Seconds of a step with a sparse tensor that is not coalesced."""
    p = torch.nn.Parameter(torch.from_numpy(table(rows)))
    optimizer = getattr(module, name)([p])

    def step(indices: Any, values: Any) -> float:
        pair = torch.from_numpy(indices)[None], torch.from_numpy(values)
        p.grad = torch.sparse_coo_tensor(*pair, p.shape, check_invariants=False)
        begin = perf_counter()
        optimizer.step()
        return perf_counter() - begin

    return step


def measure(contestants: dict[str, tuple[Callable[[Any, Any], float], int]], rounds: int, indices: int) -> Times:
    """Seconds of single steps, round by round; a contestant comes with the rows of its table."""
    times: Times = {name: [] for name in contestants}
    given = {rows: batches(rows, rounds + 3, indices) for rows in {rows for _, rows in contestants.values()}}
    order = Random(0)
    for turn in range(rounds + 3):
        for name in order.sample(list(contestants), len(contestants)):
            step, rows = contestants[name]
            seconds = step(*given[rows][turn])
            if turn >= 3:
                times[name].append(seconds)
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    return median(a / b for a, b in zip(slow, fast, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the table, and 8 times as many")
    parser.add_argument("--indices", type=int, default=INDICES)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    torch.set_num_threads(args.threads)
    pyopt.set_num_threads(args.threads)
    few, many = args.rows, 8 * args.rows
    contestants = {
        "torch": (on_tensors(torch.optim, "SparseAdam", few), few),
        "tensors": (on_tensors(optim, "SparseAdam", few), few),
        "arrays": (on_arrays("SparseAdam", few), few),
        "row-wise": (on_arrays("RowwiseAdagrad", few), few),
        "8 times the rows": (on_arrays("SparseAdam", many), many),
    }
    times = measure(contestants, args.rounds, args.indices)
    print("| case | bar | reached | pyopt, ms | the other, ms | ok |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    rows: list[tuple[str, str, float, str, str, bool]] = []
    for case, bar, slow, fast in (
        ("SparseAdam on tensors, times faster than torch's", 10, "torch", "tensors"),
        ("RowwiseAdagrad, times faster than SparseAdam, both on arrays", 1.3, "arrays", "row-wise"),
        ("SparseAdam on arrays, times faster than torch's", 25, "torch", "arrays"),
        ("RowwiseAdagrad on arrays, times faster than torch's SparseAdam", 25, "torch", "row-wise"),
    ):
        found = ratio(times[slow], times[fast])
        rows.append((case, f">= {bar}", found, fast, slow, found >= bar))
    found = ratio(times["8 times the rows"], times["arrays"])
    rows.append(("SparseAdam, time at 8 times the rows", "<= 1.2", found, "8 times the rows", "arrays", found <= 1.2))
    for case, bar_text, found, own, other, ok in rows:
        own_ms, other_ms = median(times[own]) * 1e3, median(times[other]) * 1e3
        print(f"| {case} | {bar_text} | {found:.3g} | {own_ms:.3g} | {other_ms:.3g} | {'yes' if ok else 'NO'} |")


if __name__ == "__main__":
    main()
