"""Measure the bars of the C door: `python bench/bars_door.py`. Needs a C compiler; jax and optax for the last rows."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pyopt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from door import Functions, from_capsule  # noqa: E402

CASES = [(1000, 64, 1), (1, 1 << 14, 1), (1, 1 << 24, 1), (1, 1 << 24, 2)]


def jax_steps(count: int, size: int) -> dict[str, Any]:
    """One step each by pyopt.jax, also with flat state, and by optax.adam, jitted, parameters and state donated."""
    import jax
    import jax.numpy as jnp
    import optax

    import pyopt.jax

    grads = [jnp.full(size, (i % 17 - 8) / 8, jnp.float32) for i in range(count)]
    ours, theirs = pyopt.jax.Adam(), optax.adam(1e-3)

    def optax_step(params: Any, grads: Any, state: Any) -> Any:
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    contestants = {}
    for name, init, step in (
        ("pyopt", ours.init, ours.step),
        ("flat", partial(ours.init, flat=True), ours.step),
        ("optax", theirs.init, optax_step),
    ):
        params = [jnp.zeros(size, jnp.float32) for _ in range(count)]
        held = [params, init(params)]
        compiled = jax.jit(step, donate_argnums=(0, 2))

        def run(held: Any = held, compiled: Any = compiled) -> None:
            held[:] = compiled(held[0], grads, held[1])
            jax.block_until_ready(held)

        contestants[name] = run
    return contestants


def measure_jax() -> None:
    for count, size in ((1000, 64), (1, 1 << 14), (1, 1 << 24)):
        contestants = jax_steps(count, size)
        rounds = []
        for _ in range(15):
            times = {}
            for name, run in contestants.items():
                run()
                begin = perf_counter()
                for _ in range(3):
                    run()
                times[name] = (perf_counter() - begin) / 3
            rounds.append((times["pyopt"], times["optax"] / times["pyopt"], times["optax"] / times["flat"]))
        ours, ratio, flat = (median(column) for column in zip(*rounds, strict=True))
        print(
            f"JAX {count:>5} x {size:<9} {ours * 1e6:10.1f} us a step; optax.adam {ratio:.2f}x, {flat:.2f}x that with "
            "flat state",
            flush=True,
        )


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
    if find_spec("jax") and find_spec("optax"):
        measure_jax()


if __name__ == "__main__":
    main()
