"""Measure the bars of the C door: `python bench/bars_door.py`. Needs a C compiler, and jax and optax for the last rows."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import pyopt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from door import Functions, from_capsule  # noqa: E402

CASES = [(1000, 64, 1), (1, 1 << 14, 1), (1, 1 << 24, 1), (1, 1 << 24, 2)]


def main() -> None:
    functions: Functions = from_capsule()
    with tempfile.TemporaryDirectory() as directory:
        for flags in ("-O2", "-O3 -march=native"):
            path = Path(directory) / f"door{len(flags)}.so"
            source = ROOT / "bench/door.c"
            command = ["cc", "-std=gnu11", *flags.split(), "-fPIC", "-shared", f"-I{pyopt.get_include()}", source]
            subprocess.run([*command, "-lm", "-o", path], check=True)
            measure = ctypes.CDLL(path).measure
            measure.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 2, *[ctypes.c_int] * 2, ctypes.c_void_p]
            for count, size, threads in CASES:
                rounds = []
                for _ in range(9):
                    out = (ctypes.c_double * 2)()
                    steps = max(3, int(2e7 / (count * size)))
                    if measure(ctypes.addressof(functions), count, size, threads, steps, out):
                        raise SystemExit("the door refused a plan")
                    rounds.append(tuple(out))
                door = median(r[0] for r in rounds)
                ratio = median(r[1] / r[0] for r in rounds)
                print(
                    f"{count:>5} x {size:<9} {threads} threads: {door * 1e6:10.2f} us a step, "
                    f"{door / count * 1e6:9.4f} us a tensor; the loop of one's own ({flags}) {ratio:.2f}x"
                )


if __name__ == "__main__":
    main()
