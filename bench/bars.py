"""Measure the bars of the project, and print what was reached: `python bench/bars.py`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

import pyopt
from measure import Timing, side_by_side
from pyopt import Parameter
from rivals import CASES, Contestant, Tensors, available, check, make, pyopt_optimizer, roof_of, set_threads
from rivals import torch_optimizer as make_torch_optimizer

Row = tuple[str, str, str, bool | None]  # case, bar, measured, whether it is reached (None: no bar)

LARGE = 1 << 24
VARIANTS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    **{name: (case.kind, case.states, case.options) for name, case in CASES.items()},
    "SGD nesterov": ("SGD", ("momentum_buffer",), {"momentum": 0.9, "nesterov": True}),
    "RMSprop momentum": ("RMSprop", ("square_avg", "momentum_buffer"), {"momentum": 0.9}),
    "RMSprop centered": ("RMSprop", ("square_avg", "grad_avg"), {"centered": True}),
}
for _name in ("SGD", "SGD momentum", "Adam", "RMSprop", "Adagrad", "Lion"):
    _kind, _states, _options = VARIANTS[_name]
    VARIANTS[f"{_name} weight decay"] = (_kind, _states, {**_options, "weight_decay": 1e-2})
    VARIANTS[f"{_name} maximize"] = (_kind, _states, {**_options, "maximize": True})


def at_most(case: str, value: float, bar: float, unit: str = "") -> Row:
    return case, f"<= {bar:g}{unit}", f"{value:.3g}{unit}", value <= bar


def faster(case: str, timing: Timing, bar: float) -> Row:
    return case, f">= {bar:g}x faster", f"{timing.ratio:.3g}x", timing.ratio >= bar


def against(
    name: str, rivals: list[str], count: int, size: int, budget: float, memory: str = "numpy"
) -> dict[str, Timing]:
    """Rivals that exist here and pyopt, side by side; memory: torch uses pyopt's arrays (numpy) or its own (torch)."""
    case = CASES[name]
    names = available(case, ["pyopt", *rivals])
    check(case, np.float32, names, memory)
    tensors = Tensors(count, size, len(case.states), np.float32)
    return side_by_side({n: make(case, n, tensors, memory) for n in names}, budget)


def roofs(budget: float) -> Iterator[Row]:
    """All optimizers and options on the same arrays, each against the roof of its own streams."""
    tensors = Tensors(1, LARGE, 3, np.float32)
    (p,), (g,), (arrays,) = tensors.params, tensors.grads, tensors.states
    for name, (kind, states, options) in VARIANTS.items():
        for array in arrays:
            array.fill(0)
        opt = getattr(pyopt, kind)([Parameter(p, g)], **options)
        if states:
            step = {"step": 0} if opt.counts_steps else {}
            opt.state[opt.param_groups[0]["params"][0]] = {**step, **dict(zip(states, arrays, strict=False))}
        roof = roof_of(opt, [arrays[: len(states)]])
        contestants = {
            key: Contestant(optimizer.step, tensors.flip, lambda: [p])
            for key, optimizer in (("roof", roof), ("pyopt", opt))
        }
        timing = side_by_side(contestants, budget, "roof")["pyopt"]
        yield at_most(f"{name}, 16M: time over the roof's", timing.ratio, 1.1)


def torch_large(budget: float) -> Iterator[Row]:
    for name, bar in (("Adam", 1.03), ("AdamW", 1.03), ("SGD momentum", 0.85), ("Adagrad", 1.03)):
        timing = against(name, ["torch fused"], 1, LARGE, budget)["torch fused"]
        yield at_most(f"{name}, 16M: time over torch fused", 1 / timing.ratio, bar)
        timing = against(name, ["torch fused"], 1, LARGE, budget, "torch")["torch fused"]
        yield f"{name}, 16M: time over torch fused in torch's own memory", "", f"{1 / timing.ratio:.3g}", None
    timings = against("RMSprop", ["torch", "torch foreach"], 1, LARGE, budget)
    best = min((timings[name] for name in ("torch", "torch foreach")), key=lambda timing: timing.ratio)
    yield faster("RMSprop, 16M: against the best of torch", best, 5)


def many(budget: float) -> Iterator[Row]:
    case = "Adam, 1000 x 64"
    timings = against("Adam", ["torch fused"], 1000, 64, budget)
    yield at_most(f"{case}: per tensor", timings["pyopt"].seconds * 1e3, 0.35, " µs")
    if "torch fused" in timings:
        yield faster(f"{case}: against torch fused", timings["torch fused"], 25)
    fresh = new_gradients(budget)
    yield f"{case}, gradients made anew: per tensor", "", f"{fresh['pyopt'] * 1e3:.3g} µs", None
    if "torch fused" in fresh:
        times = fresh["torch fused"] / fresh["pyopt"]
        yield f"{case}, gradients made anew: against torch fused", "", f"{times:.3g}x", None
    timings = against("Adam", ["torch fused"], 1000, 1000, budget)
    if "torch fused" in timings:
        yield faster("Adam, 1000 x 1000: against torch fused", timings["torch fused"], 8)
    timings = against("Adam", ["torch fused"], 1, 10, budget)
    yield at_most("Adam, 1 x 10: step", timings["pyopt"].seconds * 1e6, 4, " µs")
    if "torch fused" in timings:
        yield faster("Adam, 1 x 10: against torch fused", timings["torch fused"], 30)


def new_gradients(budget: float) -> dict[str, float]:
    """Median seconds of an Adam step on 1000 x 64 whose gradients are new objects each time; without making them."""
    case = CASES["Adam"]
    tensors = Tensors(1000, 64, len(case.states), np.float32)
    optimizers = {"pyopt": pyopt_optimizer(case, tensors)}
    if "torch fused" in available(case):
        optimizers["torch fused"] = make_torch_optimizer(case, tensors, fused=True)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    end = perf_counter() + budget
    while perf_counter() < end:
        for name, opt in optimizers.items():
            for p in opt.param_groups[0]["params"]:
                p.grad = -p.grad
            begin = perf_counter()
            opt.step()
            times[name].append(perf_counter() - begin)
    return {name: median(values) for name, values in times.items()}


def levels(budget: float) -> Iterator[Row]:
    """The rules of the levels of instructions that this machine has, against the baseline's."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    modules = {"v3": ("pyopt._kernels_v3", "avx2", 1.6), "v4": ("pyopt._kernels_v4", "avx512f", None)}
    case = CASES["Adam"]
    tensors = Tensors(1, 1 << 14, len(case.states), np.float32)
    for level, (module, flag, bar) in modules.items():
        if flag not in flags or find_spec(module) is None:
            continue
        contestants = {}
        for key, source in (("baseline", "pyopt._kernels"), (level, module)):
            opt = pyopt_optimizer(case, tensors)
            opt.rule = import_module(source).adam  # type: ignore[misc]
            contestants[key] = Contestant(opt.step, tensors.flip, lambda: tensors.params)
        set_threads(1)
        timing = side_by_side(contestants, budget, level)["baseline"]
        label = f"Adam, 16k in cache, 1 thread: {level} against baseline"
        yield faster(label, timing, bar) if bar else (label, "", f"{timing.ratio:.3g}x", None)


def in_place(budget: float) -> Iterator[Row]:
    timing = against("Adam", ["NumPy in place"], 1, LARGE, budget)["NumPy in place"]
    yield faster("Adam, 16M: against the best in-place NumPy", timing, 5)


def denormals(budget: float) -> Iterator[Row]:
    """Moments that have decayed into denormals, flushed or not, against ordinary ones, in cache."""
    size = 1 << 18
    rng = np.random.default_rng(0)
    contestants = {}
    for key, scale in (("ordinary", 1.0), ("denormal", 1e-41), ("flushed", 1e-41)):
        p = Parameter(rng.standard_normal(size).astype(np.float32))
        g = (rng.standard_normal(size) * scale).astype(np.float32)
        opt = pyopt.Adam([p])
        opt.state[p] = {"step": 1000, "exp_avg": g.copy(), "exp_avg_sq": np.abs(g)}

        def step(opt: pyopt.Optimizer = opt, g: np.ndarray = g, flush: bool = key == "flushed") -> None:
            pyopt.set_flush_denormal(flush)
            opt.step(grads=[g])
            pyopt.set_flush_denormal(False)

        contestants[key] = Contestant(step, partial(np.negative, g, g), lambda p=p: [p])
    seconds = side_by_side(contestants, budget, "ordinary")
    yield at_most("Adam, moments in denormals, flushed: time over ordinary ones'", seconds["flushed"].ratio, 1.3)
    yield "Adam, moments in denormals, not flushed", "", f"{seconds['denormal'].ratio:.3g}", None


IMPORT = """
from time import perf_counter
import numpy
begin = perf_counter()
import pyopt
print(perf_counter() - begin)
"""

# Two threads are woken by a small optimizer first: their stacks are not the steps' memory.
MEMORY = """
import resource, sys
import numpy as np
import pyopt
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
make = lambda count, size: [pyopt.Parameter(np.full(size, 1.0), np.full(size, 0.5)) for _ in range(count)]
pyopt.set_num_threads(2)
pyopt.Adam(make(2, 1 << 16)).step()
opt = pyopt.Adam(make(16, 1 << 20))
before = peak()
for _ in range(51):
    opt.step()
state = sum(array.nbytes for s in opt.state.values() for array in s.values() if isinstance(array, np.ndarray))
print(peak() - before - state)
"""


def run(code: str) -> float:
    """The number that a fresh Python prints."""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def processes(_: float) -> Iterator[Row]:
    yield at_most("import pyopt beyond numpy", median(run(IMPORT) for _ in range(15)) * 1e3, 15, " ms")
    if sys.platform != "win32":
        extra = max(run(MEMORY), 0) / 1e6
        yield at_most("51 steps: peak beyond parameters, gradients and state", extra, 1, " MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=3.0, metavar="SECONDS", help="per measurement, about")
    args = parser.parse_args()
    parts = [processes, roofs, torch_large, many, levels, in_place, denormals]
    if find_spec("torch") is None:
        parts.remove(torch_large)
    rows: list[Row] = []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    with tqdm(leave=False) as bar:
        for part in parts:
            if find_spec("torch") is not None:
                import_module("torch")  # before its number of threads is set
            set_threads(args.threads)
            for row in part(args.budget):
                rows.append(row)
                bar.update()
                bar.set_postfix_str(row[0])
    print("| case | bar | measured | ok |\n| --- | ---: | ---: | --- |")
    for case, bar_text, measured, ok in rows:
        print(f"| {case} | {bar_text} | {measured} | {'' if ok is None else 'yes' if ok else 'NO'} |")
    print(f"\nLoad average when it began: {load:.1f}")


if __name__ == "__main__":
    main()
