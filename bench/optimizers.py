"""Every optimizer of the catalogue beside its roof and the best of torch: the table of docs/benchmarks.md.

What was measured is kept in results/optimizers.json, so that some optimizers can be measured again by themselves.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from tqdm import tqdm

import pyopt
from measure import side_by_side
from pyopt import Optimizer, Parameter
from rivals import Contestant, set_threads
from roof import Roof

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
from optimizers_page import catalogue, paper  # noqa: E402

NUMBERS = ROOT / "bench" / "results" / "optimizers.json"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- optimizers: made by bench/report.py --catalogue -->", "<!-- optimizers end -->")
SHAPE = (4096, 4096)
# Products of matrices and searches along lines take too long at the size of the others.
SHAPES: dict[str, tuple[int, ...]] = {"Muon": (1024, 1024), "MuonAdamW": (1024, 1024), "LBFGS": (1 << 18,)}
# What is measured beside the default options.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.9}],
    "AdamW": [{"update_clip": True}, {"cautious": True}],
}
OF_TORCH: dict[str, dict[str, bool]] = {"torch": {}, "torch foreach": {"foreach": True}, "torch fused": {"fused": True}}


def rows() -> list[tuple[str, type[Optimizer], dict[str, Any]]]:
    """Label, optimizer and options of each row."""
    found = [(cls, options) for cls in catalogue() for options in ({}, *VARIANTS.get(cls.__name__, []))]
    return [(", ".join([cls.__name__, *(f"{k}={v}" for k, v in o.items())]), cls, o) for cls, o in found]


# --- measuring --------------------------------------------------------------------------------------------------------


class Problem:
    """An optimizer's parameter and gradient, and the state that its first step makes, for all contestants of a row."""

    def __init__(self, cls: type[Optimizer], options: dict[str, Any]) -> None:
        self.name, self.options = cls.__name__, options
        random = np.random.default_rng(0)
        shape = SHAPES.get(self.name, SHAPE)
        self.data: Any = random.random(shape, np.float32)
        self.grad: Any = np.copysign(self.data * 0.5 + 0.5, random.random(shape, np.float32) - 0.5)
        self.start = self.data.copy()
        self.curvature = np.geomspace(1, 100, self.data.size, dtype=np.float32).reshape(shape)
        self.closure = self._quadratic if cls is pyopt.LBFGS else None  # the others have the gradient as it is
        given = pyopt.RowSparse(np.arange(len(self.grad)), self.grad, shape) if cls.needs_rows else self.grad
        self.optimizer = cls([Parameter(self.data, given)], **options)
        self.optimizer.step(self.closure)
        state: dict[str, Any] = next(iter(self.optimizer.state.values()), {})
        self.state = {k: v for k, v in state.items() if isinstance(v, np.ndarray) and v.shape == shape}
        lists = [value if isinstance(value, list) else [value] for value in state.values()]
        nbytes = sum(array.nbytes for arrays in lists for array in arrays if isinstance(array, np.ndarray))
        self.bytes = nbytes / self.data.size

    def _quadratic(self) -> float:
        np.multiply(self.data, self.curvature, out=self.grad)
        return 0.5 * float(np.vdot(self.data, self.grad))

    def contestant(self, optimizer: Any) -> Contestant:
        """Its steps; between some of them the gradient changes its sign, or all begins anew where there is a loss."""

        def flip() -> None:
            if self.closure is None:
                np.negative(self.grad, out=self.grad)
            else:
                self.data[...] = self.start
                optimizer.state.clear()

        return Contestant(lambda: optimizer.step(self.closure), flip, lambda: [self.data])

    def roof(self) -> Contestant:
        roof = Roof([Parameter(self.data, self.grad)], len(self.state))
        roof.state[roof.param_groups[0]["params"][0]] = dict(zip("stuv", self.state.values(), strict=False))
        return self.contestant(roof)

    def of_torch(self, how: dict[str, bool]) -> Contestant | None:
        """torch's optimizer of this name on the same arrays, where it has one."""
        import torch

        cls = getattr(torch.optim, self.name, None)
        options = {**self.options, **how}
        if cls is None or not options.keys() <= inspect.signature(cls).parameters.keys():
            return None
        p = torch.from_numpy(self.data).requires_grad_()
        p.grad = torch.from_numpy(self.grad)
        if cls is torch.optim.SparseAdam:
            rows = torch.arange(len(p))[None]
            p.grad = torch.sparse_coo_tensor(rows, p.grad, p.shape, is_coalesced=True, check_invariants=False)
        optimizer = cls([p], **options)
        optimizer.step(self.closure)
        for name in self.state.keys() & optimizer.state[p].keys():
            optimizer.state[p][name] = torch.from_numpy(self.state[name])
        return self.contestant(optimizer)


def measure(cls: type[Optimizer], options: dict[str, Any], threads: int, budget: float) -> dict[str, Any]:
    """What the table says of a row: seconds, time over the roof's, the best of torch's over pyopt's, and its name."""
    problem = Problem(cls, options)
    contestants = {"pyopt": problem.contestant(problem.optimizer)}
    if cls.rule is not None:
        contestants["roof"] = problem.roof()
    if find_spec("torch"):
        contestants |= {name: found for name, how in OF_TORCH.items() if (found := problem.of_torch(how))}
    set_threads(threads)
    timings = side_by_side(contestants, budget)
    if not np.isfinite(problem.data).all():
        raise AssertionError(f"{problem.name}: parameters are no longer finite")
    best = min((name for name in timings if name in OF_TORCH), key=lambda name: timings[name].ratio, default=None)
    return {
        "state": problem.bytes,
        "seconds": timings["pyopt"].seconds,
        "over roof": 1 / timings["roof"].ratio if "roof" in timings else None,
        "torch": timings[best].ratio if best else None,
        "best of torch": best,
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def traffic(cls: type[Optimizer], options: dict[str, Any]) -> int:
    """Bytes that a step must move per element: parameter and states both ways, the gradient once."""
    one = cls([np.empty(1, np.float32)], **options)
    streams = sum(name is not None for name in one.state_streams(one.param_groups[0]))
    return 4 * (3 + 2 * (0 if cls.rule is not None and cls.rule.by_row else streams))


def cells(label: str, cls: type[Optimizer], options: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    state = found["state"]
    torch = f"{found['torch']:.3g} ({found['best of torch'].partition(' ')[2] or 'default'})" if found["torch"] else ""
    return [
        f"[{label}](optimizers.md#{cls.__name__.lower()})",
        paper(cls),
        f"{state:.0f}" if state == round(state) else f"{state:.2g}",
        f"{traffic(cls, options)}" if cls.rule is not None else "",
        f"{found['seconds'] * 1e3:.0f}",
        f"{found['over roof']:.2f}" if found["over roof"] else "",
        torch,
    ]


HEAD = [
    *("optimizer", "paper", "state, bytes per element", "to move, bytes per element", "step, ms"),
    *("time over the roof's", "best of torch over pyopt"),
]
NOTE = (
    "Of one float32 tensor of 4096 x 4096 (Muon and MuonAdamW: 1024 x 1024; LBFGS: 262144 elements, a step of 20 "
    "iterations and the state behind it; SparseAdam: all rows are touched). A step must read and write parameter and "
    "state and read the gradient: the roof does that, in one pass, and next to nothing else. Best of torch: the "
    "fastest of its implementations, on the same arrays, in turns with pyopt; empty where torch has no such optimizer. "
    "On: "
)


def page() -> str:
    """The text of the page with the table between its marks."""
    numbers = json.loads(NUMBERS.read_text())
    measured = [(label, cls, options) for label, cls, options in rows() if label in numbers["rows"]]
    lines = [HEAD, ["---", "---", *["---:"] * 5], *[cells(*row, numbers["rows"][row[0]]) for row in measured]]
    made = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    note = fill(f"{NOTE}{numbers['where']}.", 120)
    return f"{before}{MARKS[0]}\n{made}\n\n{note}\n{MARKS[1]}{after}"


def report(names: Iterable[str], threads: int, budget: float, where: str) -> None:
    """Measure the optimizers of these names, keep the numbers and write the table of the page."""
    numbers = {"where": where, "rows": {}}
    if NUMBERS.exists():
        numbers["rows"] = json.loads(NUMBERS.read_text())["rows"]
    for label, cls, options in (bar := tqdm([row for row in rows() if row[1].__name__ in names])):
        bar.set_postfix_str(label)
        numbers["rows"][label] = measure(cls, options, threads, budget)
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")  # each as it comes, for a run that is interrupted
    PAGE.write_text(page())
