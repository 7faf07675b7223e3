"""Measure pyopt against the roof and everybody else, and write what was found: `python bench/report.py`.

report.md with its plots has six optimizers, by size and number of tensors and against all rivals; the table of
docs/benchmarks.md has every optimizer, against its roof and torch (`--catalogue`: that table alone; names behind it:
those rows anew).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

import optimizers
import pyopt
from measure import Timing, bandwidth, side_by_side
from pyopt import _isa as isa
from rivals import CASES, MAKERS, Tensors, available, check, cores, make, set_threads

OWN = ("pyopt", "roof")
RIVALS = [name for name in MAKERS if name not in OWN]
LARGE = 1 << 24
MANY = (1000, 64)


@dataclass(frozen=True)
class Point:
    """What is measured: one optimizer on `count` tensors of `size` elements."""

    case: str
    count: int
    size: int
    dtype: str
    threads: int


Results = dict[Point, dict[str, Timing]]


# --- measuring --------------------------------------------------------------------------------------------------------


def free_memory() -> float:
    """Bytes that may be used, or infinity where the system does not tell."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 * 0.8 if found else float("inf")


def needed_memory(point: Point, names: Iterable[str]) -> float:
    """Bytes of the shared arrays, and of those that contestants have of their own."""
    one = point.count * point.size * np.dtype(point.dtype).itemsize
    arrays = 2 + len(CASES[point.case].states)
    own = {"NumPy": arrays + 3, "torch": 2, "torch foreach": 4, "optax": 2 * arrays + 2}
    return one * (arrays + sum(own.get(name, 0) for name in names))


def fitting(point: Point, names: Iterable[str], args: argparse.Namespace) -> list[str]:
    """The contestants that can take part."""
    names = available(CASES[point.case], names)
    if point.count > args.optax_tensors:  # tens of seconds to compile
        names = [name for name in names if name != "optax"]
    if point.threads < cores():  # it takes all
        names = [name for name in names if name != "optax"]
    for some in (names, [name for name in names if name in OWN]):
        if needed_memory(point, some) * (2 if args.torch_memory == "torch" else 1) < free_memory():
            return some
    return []


def measure(point: Point, names: Sequence[str], args: argparse.Namespace) -> dict[str, Timing]:
    case = CASES[point.case]
    tensors = Tensors(point.count, point.size, len(case.states), point.dtype)
    set_threads(point.threads)
    contestants = {name: make(case, name, tensors, args.torch_memory) for name in names}
    set_threads(point.threads)  # of those that were imported just now
    return side_by_side(contestants, args.budget if len(names) > len(OWN) else args.budget / 2)


def plan(args: argparse.Namespace) -> dict[Point, set[str]]:
    """All points with their contestants: the roof everywhere, all rivals of one optimizer, and of all at two points."""
    points: dict[Point, set[str]] = {}

    def add(case: str, count: int, size: int, dtype: str, rivals: bool, threads: int = args.threads) -> None:
        points.setdefault(Point(case, count, size, dtype, threads), set(OWN)).update(RIVALS if rivals else ())

    for dtype in args.dtype:
        for case in args.optimizers:
            for size in args.sizes:
                add(case, 1, size, dtype, case == args.focus)
            for size in (64, 1000):
                for count in args.counts:
                    add(case, count, size, dtype, case == args.focus)
            add(case, 1, args.large, dtype, True)
            add(case, *MANY, dtype, True)
        for n in args.team:
            add(args.focus, 1, args.large, dtype, True, n)
            add(args.focus, 1000, 1000, dtype, True, n)
    return points


def measure_all(args: argparse.Namespace) -> Results:
    for dtype in tqdm(args.dtype, "check", leave=False):
        for case in tqdm(args.optimizers, dtype, leave=False):
            check(CASES[case], dtype, torch_memory=args.torch_memory)
    results: Results = {}
    bar = tqdm(plan(args).items(), "measure")
    for point, wanted in bar:
        names = fitting(point, [name for name in MAKERS if name in wanted], args)
        bar.set_postfix_str(
            f"{point.case} {point.dtype}, {point.count} x {amount(point.size)}, {point.threads} threads"
        )
        if names:
            results[point] = measure(point, names, args)
    return results


# --- writing ----------------------------------------------------------------------------------------------------------


def amount(n: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)


def seconds(t: float) -> str:
    unit, name = next(((u, n) for u, n in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")) if t >= u), (1e-9, "ns"))
    return f"{t / unit:.3g} {name}"


def ratio(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}" if x >= 10 else f"{x:.2f}"


def speed(point: Point, timing: Timing) -> float:
    itemsize = np.dtype(point.dtype).itemsize
    return bandwidth(CASES[point.case].streams, point.count * point.size, itemsize, timing.seconds)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cpu() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def huge_pages() -> str:
    try:
        found = re.search(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"


def machine(args: argparse.Namespace) -> str:
    versions = [f"Python {platform.python_version()}", f"pyopt {pyopt.__version__}"]
    for package in ("numpy", "torch", "numba", "jax", "optax"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return (
        f"{cpu()}, {cores()} cores; {platform.system()} {platform.machine()}, transparent huge pages: {huge_pages()}. "
        f"{', '.join(versions)}. {args.threads} threads where nothing else is said; NumPy always has one, optax all "
        f"cores. torch's tensors in memory from {args.torch_memory}. Load average when it began: {args.load}."
    )


class Report:
    """The text of report.md, one section per question."""

    def __init__(self, results: Results, args: argparse.Namespace) -> None:
        self.results, self.args = results, args
        self.parts = [
            f"# Measurements\n\n{machine(args)}\n",
            "Times are medians over rounds in which all contestants of a row take turns in one process, on the same "
            "arrays (optax: its own); ratios are medians of the ratios within a round. GB/s count what a rule must "
            "move: p and every state array both ways, g once. All were checked to give the same parameters.\n",
        ]

    def get(self, case: str, count: int, size: int, dtype: str, threads: int = 0) -> tuple[Point, dict[str, Timing]]:
        point = Point(case, count, size, dtype, threads or self.args.threads)
        return point, self.results.get(point, {})

    def section(self, title: str, sentence: str) -> None:
        self.parts.append(f"## {title}\n\n{sentence}\n")

    def add(self, dtype: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self.parts.append(f"{dtype}:\n\n{table(head, rows)}")

    def versus(self, label: str, point: Point, timings: dict[str, Timing], own: str) -> list[str]:
        """A row of the rivals' times in multiples of pyopt's."""
        cells = [ratio(timings[name].ratio) if name in timings else "-" for name in MAKERS if name != "pyopt"]
        return [label, own if timings else "-", *cells]

    def write(self) -> str:
        others = [name for name in MAKERS if name != "pyopt"]
        many = f"{MANY[0]} tensors of {MANY[1]} elements"
        for title, sentence, count, size, own in (
            (
                f"How fast is a large tensor ({amount(self.args.large)} elements)?",
                "Time of each in multiples of pyopt's: above 1 pyopt is faster. The roof moves the same streams with "
                "the same engine and does next to no arithmetic.",
                1, self.args.large, lambda p, t: f"{seconds(t.seconds)}, {speed(p, t):.1f} GB/s",
            ),
            (
                f"How fast are many small tensors ({many})?",
                "Time of each in multiples of pyopt's: here the cost of a tensor counts, not that of an element.",
                *MANY, lambda p, t: f"{seconds(t.seconds / p.count)} per tensor",
            ),
        ):  # fmt: skip
            self.section(title, sentence)
            for dtype in self.args.dtype:
                points = [self.get(case, count, size, dtype) for case in self.args.optimizers]
                rows = [self.versus(p.case, p, t, own(p, t["pyopt"]) if t else "") for p, t in points]
                self.add(dtype, ["optimizer", "pyopt", *others], rows)
        self.parts.append("![ratios](ratios.png)\n")
        self.section(
            "How close to the roof, by size?",
            "GB/s of pyopt on one tensor, in brackets its time over the roof's on the same buffers: beyond the caches "
            "it is memory that takes the time (1.00: nothing but memory), within them arithmetic.",
        )
        self.sweep([(1, size) for size in self.args.sizes], self.roofed, lambda count, size: amount(size))
        self.parts.append("![roofline](roofline.png)\n")
        self.section(
            "What does a tensor cost?",
            "Time of a step of pyopt per tensor, in brackets over the roof's: the more tensors share a step, the less "
            "of its fixed cost falls on each.",
        )
        counts = [(count, size) for size in (64, 1000) for count in self.args.counts]
        self.sweep(counts, self.per_tensor, lambda count, size: f"{count} x {size}")
        for title, rows in (
            ("size of one tensor", [(1, size, amount(size)) for size in self.args.sizes]),
            ("number of tensors", [(count, size, f"{count} x {size}") for count, size in counts]),
        ):
            self.section(
                f"How do the others compare, by {title} ({self.args.focus})?",
                "Time of each in multiples of pyopt's; - where a contestant does not exist or would take too much "
                "memory or, for optax, too long to compile.",
            )
            for dtype in self.args.dtype:
                lines = []
                for count, size, label in rows:
                    p, t = self.get(self.args.focus, count, size, dtype)
                    lines.append(self.versus(label, p, t, seconds(t["pyopt"].seconds) if t else ""))
                self.add(dtype, ["elements", "pyopt", *others], lines)
        self.parts.append("![time per tensor](per_tensor.png)\n")
        self.threads(others)
        return "\n".join(self.parts)

    def roofed(self, point: Point, timings: dict[str, Timing]) -> str:
        return f"{speed(point, timings['pyopt']):.3g} ({1 / timings['roof'].ratio:.2f})"

    def per_tensor(self, point: Point, timings: dict[str, Timing]) -> str:
        return f"{seconds(timings['pyopt'].seconds / point.count)} ({1 / timings['roof'].ratio:.2f})"

    def sweep(
        self,
        shapes: Sequence[tuple[int, int]],
        cell: Callable[[Point, dict[str, Timing]], str],
        label: Callable[[int, int], str],
    ) -> None:
        """A table of all optimizers over numbers and sizes of tensors."""
        for dtype in self.args.dtype:
            rows = []
            for count, size in shapes:
                points = [self.get(case, count, size, dtype) for case in self.args.optimizers]
                rows.append([label(count, size), *[cell(p, t) if t else "-" for p, t in points]])
            self.add(dtype, ["elements", *self.args.optimizers], rows)

    def threads(self, others: list[str]) -> None:
        self.section(
            f"What do threads bring ({self.args.focus})?",
            "Time of pyopt by threads, in brackets the speedup over one, and of the others in multiples of it.",
        )
        for dtype in self.args.dtype:
            rows = []
            for count, size in ((1, self.args.large), (1000, 1000)):
                alone = self.get(self.args.focus, count, size, dtype, 1)[1]
                for n in self.args.team:
                    p, t = self.get(self.args.focus, count, size, dtype, n)
                    own = ""
                    if t and alone:
                        own = f"{seconds(t['pyopt'].seconds)} ({alone['pyopt'].seconds / t['pyopt'].seconds:.2f})"
                    rows.append(self.versus(f"{count} x {amount(size)}, {n} threads", p, t, own))
            self.add(dtype, ["elements", "pyopt", *others], rows)


# --- plots ------------------------------------------------------------------------------------------------------------


def draw(report: Report, args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {name: f"C{i}" for i, name in enumerate(MAKERS)}
    dtypes = args.dtype

    def axes(width: float) -> tuple[object, list[plt.Axes]]:
        figure, grid = plt.subplots(1, len(dtypes), figsize=(width * len(dtypes), 5), squeeze=False, sharey=True)
        for axis, dtype in zip(grid[0], dtypes, strict=True):
            axis.set_title(dtype)
            axis.grid(alpha=0.3)
        return figure, list(grid[0])

    def save(figure: object, name: str, bottom: float = 0) -> None:
        figure.tight_layout(rect=(0, bottom, 1, 1))  # type: ignore[attr-defined]
        figure.savefig(args.output / name, dpi=110)  # type: ignore[attr-defined]
        plt.close(figure)  # type: ignore[arg-type]

    figure, grid = axes(7)
    for axis, dtype in zip(grid, dtypes, strict=True):
        for i, case in enumerate(args.optimizers):
            points = [(p, t) for size in args.sizes for p, t in [report.get(case, 1, size, dtype)] if t]
            x = [p.size for p, _ in points]
            axis.plot(x, [speed(p, t["pyopt"]) for p, t in points], "o-", color=f"C{i}", ms=3, label=case)
            axis.plot(x, [speed(p, t["roof"]) for p, t in points], ":", color=f"C{i}")
        axis.set(xscale="log", xlabel="elements of one tensor")
    grid[0].set_ylabel("GB/s")
    grid[0].legend(title="dotted: the roof", fontsize=8)
    save(figure, "roofline.png")

    figure, grid = axes(7)
    for axis, dtype in zip(grid, dtypes, strict=True):
        for name in MAKERS:
            points = [(p, t) for size in args.sizes for p, t in [report.get(args.focus, 1, size, dtype)] if name in t]
            x, y = [p.size for p, _ in points], [t[name].seconds * 1e6 for _, t in points]
            axis.plot(x, y, "o-" if name == "pyopt" else "-", color=colors[name], ms=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel=f"elements of one tensor ({args.focus})")
    grid[0].set_ylabel("µs per tensor")
    grid[0].legend(fontsize=8)
    save(figure, "per_tensor.png")

    dtype = dtypes[0]
    figure, pair = plt.subplots(1, 2, figsize=(13, 1.5 + 0.75 * len(args.optimizers)), sharey=True)
    for axis, (count, size) in zip(pair, ((1, args.large), MANY), strict=True):
        for j, name in enumerate(RIVALS):
            points = [(i, report.get(case, count, size, dtype)[1]) for i, case in enumerate(args.optimizers)]
            bars = [(i + (j - 3) * 0.115, t[name].ratio) for i, t in points if name in t]
            axis.barh([y for y, _ in bars], [r - 1 for _, r in bars], 0.11, left=1, color=colors[name], label=name)
        axis.axvline(1, color="black", lw=1)
        axis.set(xscale="log", xlabel="time over pyopt's", title=f"{count} x {amount(size)}, {dtype}")
        axis.set_yticks(range(len(args.optimizers)), args.optimizers)
        axis.grid(axis="x", alpha=0.3)
    pair[0].invert_yaxis()
    figure.legend(*pair[0].get_legend_handles_labels(), loc="lower center", ncols=len(RIVALS), fontsize=8)
    save(figure, "ratios.png", bottom=0.05)


# --- the command ------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer points and rounds: under a minute on an idle machine"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--sizes", type=int, nargs="+", help="elements of one tensor")
    parser.add_argument("--optimizers", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--catalogue", nargs="*", metavar="NAME", help="the table of optimizers alone")
    parser.add_argument("--dtype", choices=["float32", "float64", "both"])
    parser.add_argument("--threads", type=int, default=cores(), help="the most threads, default all cores")
    parser.add_argument("--torch-memory", choices=["numpy", "torch"], default="numpy", help="torch's allocator")
    args = parser.parse_args()
    args.dtype = [args.dtype or "float32"] if args.quick else [args.dtype]
    if args.dtype in (["both"], [None]):
        args.dtype = ["float32", "float64"]
    args.sizes = args.sizes or ([1, 1 << 10, 1 << 16, 1 << 22] if args.quick else [4**k for k in range(14)])
    args.counts = [1, 1000] if args.quick else [1, 10, 100, 1000, 10_000]
    args.large = max([size for size in args.sizes if size <= LARGE], default=LARGE)
    args.focus = "Adam" if "Adam" in args.optimizers else args.optimizers[0]
    args.team = [n for n in range(1, args.threads + 1) if n & (n - 1) == 0 or n == args.threads]
    args.optax_tensors = 10 if args.quick else 1000
    args.budget = 0.1 if args.quick else 2.0
    args.load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return args


def write_catalogue(args: argparse.Namespace) -> None:
    names = {cls.__name__ for cls in optimizers.catalogue()}
    if unknown := sorted({*(args.catalogue or ())} - names):
        raise SystemExit(f"--catalogue {unknown[0]}: no optimizer of pyopt, must be of {', '.join(sorted(names))}")
    where = (
        f"{cpu()}, {cores()} cores, instructions {isa.level}, {args.threads} threads, NumPy {version('numpy')}, "
        f"torch {version('torch') if find_spec('torch') else 'none'}, load average {args.load} when it began"
    )
    optimizers.report(args.catalogue or names, args.threads, args.budget, where)


def main() -> None:
    args = arguments()
    write_catalogue(args)
    if args.catalogue is not None:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    report = Report(measure_all(args), args)
    (args.output / "report.md").write_text(report.write())
    draw(report, args)
    ratios = [1 / t["roof"].ratio for p, t in report.results.items() if p.count == 1 and p.size == args.large]
    print(f"report.md and 3 plots written; median time over the roof's at {amount(args.large)}: {median(ratios):.2f}")


if __name__ == "__main__":
    main()
