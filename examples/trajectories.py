"""Draw the path of every optimizer on two functions, for docs/optimizers.md: `python examples/trajectories.py`.

python examples/trajectories.py --optimizers Adam Lion --output /tmp  # some of them, elsewhere
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

import pyopt

Floats = NDArray[np.float64]
INK, PAPER, STAR = "#22223b", "#ffffff", "#e63946"
GROUND = matplotlib.colors.LinearSegmentedColormap.from_list("ground", ["#f7fbff", "#d6e4f0", "#9db8d2"])
PATH = matplotlib.colors.LinearSegmentedColormap.from_list("path", ["#3d1a78", "#c2185b", "#ff9f1c"])
STEPS = 200
RATES = [m * 10.0**k for k in range(-4, 3) for m in (1, 2, 5)]


@dataclass(frozen=True)
class Function:
    """A function of two variables: its value and gradient, where a path starts, where it should end."""

    name: str
    value: Callable[[Any, Any], Any]
    gradient: Callable[[Any, Any], tuple[Any, Any]]
    start: tuple[float, float]
    minimum: tuple[float, float]
    window: tuple[float, float, float, float]


C, S = math.cos(math.pi / 6), math.sin(math.pi / 6)


def along(x: Any, y: Any) -> tuple[Any, Any]:
    """Coordinates along and across the straight valley, from its minimum at (1, 0.5)."""
    return C * (x - 1) + S * (y - 0.5), C * (y - 0.5) - S * (x - 1)


def straight(x: Any, y: Any) -> tuple[Any, Any]:
    a, b = along(x, y)
    return C * a - S * 50 * b, S * a + C * 50 * b


FUNCTIONS = [
    Function(
        "Rosenbrock",
        lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        lambda x, y: (-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)),
        start=(-1.2, 1.0),
        minimum=(1.0, 1.0),
        window=(-1.9, 1.9, -0.7, 2.1),
    ),
    Function(
        "a valley of condition 50",
        lambda x, y: 0.5 * (along(x, y)[0] ** 2 + 50 * along(x, y)[1] ** 2),
        straight,
        start=(-1.2, 1.0),
        minimum=(1.0, 0.5),
        window=(-1.9, 1.9, -0.9, 1.9),
    ),
]
# What is not by default, and said below the picture.
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Prodigy": {"lr": 1.0},
    "LBFGS": {"lr": 1.0, "max_iter": 1, "max_eval": 25, "line_search_fn": "strong_wolfe"},
}
NOTES = {
    "AdamWScheduleFree": "the average, which is the result",
    "SGDScheduleFree": "the average, which is the result",
    "MuonAdamW": "x by Muon, y by AdamW",
    "FTRL": "it starts at 0, as it should",
    "RAdam": "its first steps are as large as the gradient: only small rates stay in the picture",
}


def walk(name: str, function: Function, options: dict[str, Any]) -> Floats:
    """The places of an optimizer after 0, 1, ... steps; it ends early where it leaves the numbers."""
    start = (0.0, 0.0) if name == "FTRL" else function.start  # as it should: see there
    shapes = {"Muon": [(1, 2)], "MuonAdamW": [(1, 1), (1,)]}.get(name, [(2,)])  # Muon steps matrices
    values = iter(start)
    params = [pyopt.Parameter(np.array([next(values) for _ in range(math.prod(s))]).reshape(s)) for s in shapes]
    kind = getattr(pyopt, name)
    optimizer = kind(params, **options)
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0

    def place() -> Floats:
        return np.concatenate([p.data.ravel() for p in params])

    def closure() -> float:
        gradient = iter(function.gradient(*place()))
        for p in params:
            p.grad = np.array([next(gradient) for _ in range(p.data.size)]).reshape(p.data.shape)
            if kind.needs_rows:
                p.grad = pyopt.RowSparse(np.arange(len(p)), p.grad, p.shape)
        return float(function.value(*place()))

    path = [place()]
    with np.errstate(all="ignore"):
        for _ in range(STEPS):
            optimizer.step(closure)
            if hasattr(optimizer, "eval"):  # the average is the result
                optimizer.eval()
                path.append(place())
                optimizer.train()
            else:
                path.append(place())
            if not np.abs(path[-1]).max() < 1e3:
                break
    return np.array(path)


def best(name: str, function: Function) -> tuple[float, Floats]:
    """The rate that comes lowest without leaving the picture, and its path."""
    options = SETTINGS.get(name, {})
    left, right, bottom, top = function.window

    def order(item: tuple[float, Floats]) -> tuple[bool, float]:
        x, y = item[1].T
        leaves = not (left < x.min() and x.max() < right and bottom < y.min() and y.max() < top)
        return leaves, float(np.mean(function.value(x[-STEPS // 4 :], y[-STEPS // 4 :])))

    rates = [options["lr"]] if "lr" in options else RATES
    return min(((lr, walk(name, function, {**options, "lr": lr})) for lr in rates), key=order)


def number(x: float) -> str:
    return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e") if x and not 1e-3 <= x < 1e3 else f"{x:.2g}"


def draw(name: str, file: Path) -> None:
    figure, grid = plt.subplots(1, 2, figsize=(8, 3.5), facecolor=PAPER)
    for axis, function in zip(grid, FUNCTIONS, strict=True):
        lr, path = best(name, function)
        left, right, bottom, top = function.window
        x, y = np.meshgrid(np.linspace(left, right, 300), np.linspace(bottom, top, 300))
        height = np.log10(function.value(x, y) + 1e-2)
        axis.contourf(x, y, height, 24, cmap=GROUND)
        axis.contour(x, y, height, 12, colors=PAPER, linewidths=0.5, alpha=0.8)
        pieces = np.stack([path[:-1], path[1:]], axis=1)
        time = np.sqrt(np.linspace(0, 1, len(pieces)))  # most happens early
        lines = LineCollection(pieces, cmap=PATH, linewidths=1.4, capstyle="round", zorder=3)
        lines.set_array(time)
        axis.add_collection(lines)
        axis.scatter(*path[1:].T, c=time, cmap=PATH, s=5, linewidths=0, zorder=4)
        axis.plot(*path[0], "o", ms=7, mfc=PAPER, mec=INK, mew=1.5, zorder=5)
        axis.plot(*function.minimum, "*", ms=13, mfc=STAR, mec=PAPER, mew=0.8, zorder=6)
        axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
        axis.set_title(f"{name} on {function.name}", fontsize=9.5, color=INK, pad=5)
        value = number(float(function.value(*path[-1])))
        axis.set_xlabel(f"lr = {lr:g}; after {len(path) - 1} steps f = {value}", fontsize=8, color=INK)
        for side in axis.spines.values():
            side.set_visible(False)
    said = [f"{key} = {value}" for key, value in SETTINGS.get(name, {}).items() if key != "lr"]
    figure.text(0.5, 0.02, NOTES.get(name, ", ".join(said)), ha="center", fontsize=8, color=INK)
    figure.tight_layout(w_pad=1.5, rect=(0, 0.03, 1, 1))
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
    Image.fromarray(pixels).quantize(method=Image.Quantize.FASTOCTREE).save(file, optimize=True)  # fewer bytes
    plt.close(figure)


def main() -> None:
    names = [
        name for name, kind in vars(pyopt).items()
        if isinstance(kind, type) and issubclass(kind, pyopt.Optimizer) and kind is not pyopt.Optimizer
    ]  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "paths", metavar="DIR")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in tqdm(args.optimizers):
        draw(name, args.output / f"{name.lower()}.png")


if __name__ == "__main__":
    main()
