"""Measure the bars of short types and print what was reached: `python bench/bars_short.py`.

The contestants take turns in one process. Against bitsandbytes where it is installed.
"""

from __future__ import annotations

import argparse
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

import pyopt
import pyopt.torch as optim
from bars_torch import Shapes, times
from pyopt import _isa

FLOAT, SHORT = torch.float32, torch.bfloat16
LARGE: Shapes = [(1 << 24,)]


def llama(layers: int = 19, width: int = 512, hidden: int = 1376, words: int = 32000) -> Shapes:
    """A decoder of Llama's shape, its embedding tied: 173 parameters, 76M (Touvron et al., arXiv 2302.13971)."""
    block: Shapes = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden), (width,), (width,)]
    return [(words, width), *block * layers, (width,)]


def ours(**options: Any) -> Any:
    return partial(optim.AdamW, **options)


CONTESTANTS: dict[str, tuple[Any, torch.dtype]] = {
    "pyopt, float32": (ours(), FLOAT),
    "pyopt, bfloat16": (ours(), SHORT),
    "pyopt, bfloat16, float32 state": (ours(state_dtype="float32"), SHORT),
    "pyopt, bfloat16 state": (ours(state_dtype="bfloat16"), FLOAT),
    "pyopt, split": (ours(state_dtype="float32", master="split"), SHORT),
    "pyopt, 8 bits": (ours(state_dtype="8bit"), FLOAT),
    "torch fused, bfloat16": (partial(torch.optim.AdamW, fused=True), SHORT),
    "torch, bfloat16": (torch.optim.AdamW, SHORT),
}
if find_spec("bitsandbytes"):
    import bitsandbytes

    CONTESTANTS["bitsandbytes, 8 bits"] = bitsandbytes.optim.AdamW8bit, FLOAT

CASES = [
    # shapes, contestant, rival, rounds, bars: at most so much of the rival's time, with AVX-512 and without
    (LARGE, "pyopt, bfloat16", "torch fused, bfloat16", 15, (0.85, 1.0)),
    (LARGE, "pyopt, bfloat16, float32 state", "pyopt, float32", 15, (0.95, 1.2)),
    (LARGE, "pyopt, bfloat16 state", "pyopt, float32", 15, (0.88, 1.2)),
    (LARGE, "pyopt, split", "pyopt, float32", 15, (1.05, 1.05)),
    (LARGE, "pyopt, 8 bits", "pyopt, float32", 15, (2, 2)),
    (LARGE, "pyopt, 8 bits", "bitsandbytes, 8 bits", 5, (1 / 12, 1 / 12)),
    (llama(), "pyopt, bfloat16", "torch fused, bfloat16", 8, (1, 1)),
    (llama(), "pyopt, bfloat16", "torch, bfloat16", 5, (1 / 3, 1 / 3)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pyopt.set_num_threads(args.threads)
    print(f"level {_isa.level}, {args.threads} threads\n")
    print("| AdamW | of the time of | tensors | bar | share | ms | rival, ms | ok |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for shapes, name, rival, rounds, bars in CASES:
        if rival not in CONTESTANTS:
            continue
        seconds = times(shapes, {key: CONTESTANTS[key] for key in (name, rival)}, rounds)
        share = median(own / other for own, other in zip(seconds[name], seconds[rival], strict=True))
        bar = bars[0 if _isa.level == "v4" else 1]
        own, other = (median(seconds[key]) * 1e3 for key in (name, rival))
        ok = "yes" if share <= bar else "NO"
        print(
            f"| {name} | {rival} | {len(shapes)} | {bar:.3g} | {share:.3g} | {own:.3g} | {other:.3g} | {ok} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
