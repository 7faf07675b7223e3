"""The object code: every loop over a span is vectorised for both element types, and the baseline is a baseline."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import pyopt
from pyopt import _kernels
from pyopt._engine import Rule

ROOT = Path(__file__).parent.parent
NO_RULES = ("exchange", "nothing", "norm")  # with loops of their own
RULES = [name for name, value in vars(_kernels).items() if isinstance(value, Rule) and name not in NO_RULES]

if sys.platform != "linux" or "gcc" not in (sysconfig.get_config_var("CC") or "gcc") or not shutil.which("gcc"):
    pytest.skip("the report is GCC's", allow_module_level=True)


@pytest.fixture(scope="module", params=["baseline", "_kernels_v3", "_kernels_v4"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Generated C of the kernels and GCC's report, with the flags of setup.py, for one level of instructions."""
    directory = tmp_path_factory.mktemp("kernels")
    sys.path.insert(0, str(ROOT))
    try:
        from setup import BASELINE, COMPILE_ARGS, DIRECTIVES, LEVELS
    finally:
        sys.path.remove(str(ROOT))
    if request.param != "baseline" and request.param not in LEVELS:
        pytest.skip("the levels are those of x86-64")
    flags = [*LEVELS.get(request.param, BASELINE), *COMPILE_ARGS]
    source = directory / "_kernels.c"
    options = [f"-X{name}={value}" for name, value in DIRECTIVES.items()]
    subprocess.run(
        [sys.executable, "-m", "cython", *options, ROOT / "pyopt/_kernels.pyx", "-o", source], check=True, cwd=ROOT
    )
    result = subprocess.run(
        [
            *("gcc", "-fPIC", *flags, "-DPy_LIMITED_API=0x030b0000", f"-I{sysconfig.get_paths()['include']}"),
            *("-fopt-info-vec-all", "-c", source, "-o", directory / "_kernels.o"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return source.read_text(), result.stderr


@pytest.mark.parametrize(
    "module",
    [
        *["_rows", "_engine", "_matrix", "_norms", "_lock", "_plans", "_asked", "_step", "_arrays", "_kernels"],
        "torch/_tensors",
    ],
)
def test_baseline_has_no_avx(module: str) -> None:
    """What runs before the CPU has been asked must run on every x86-64."""
    code = disassembly(module)
    assert "push" in code
    assert not re.findall(r"[yz]mm\d|\tv[a-z]+(?:ps|pd|ss|sd) ", code)


@pytest.mark.parametrize("module, its_own", [("_kernels_v3", r"%ymm\d"), ("_kernels_v4", r"%k\d|mm(?:1[6-9]|[23]\d)")])
def test_levels_use_their_registers(module: str, its_own: str) -> None:
    code = disassembly(module)
    for instruction in ("vsqrtps", "vsqrtpd", "vdivps", "vdivpd"):
        assert re.search(rf"{instruction} .*[yz]mm", code), instruction
    assert re.search(its_own, code)
    assert "vfm" not in code, "no contraction to FMA"


def disassembly(module: str) -> str:
    if platform.machine() != "x86_64" or not shutil.which("objdump"):
        pytest.skip("the levels are those of x86-64, and objdump shows them")
    (path,) = Path(pyopt.__file__).parent.glob(f"{module}.*so")  # not imported: the machine may not run it
    return subprocess.run(["objdump", "-d", path], check=True, capture_output=True, text=True).stdout


SUMS = [name for name, value in vars(_kernels).items() if isinstance(value, Rule) and value.has_sums]
LOOPS = {
    **{rule: (2, rf"\(__pyx_v_p\[.* = __pyx_fuse_[01]__pyx_f_5pyopt_6_rules_{rule}\(") for rule in RULES},
    **{f"terms of {rule}": (2, rf"__pyx_fuse_[01]__pyx_f_5pyopt_6_rules_{rule}_terms\(\(__pyx_v_p") for rule in SUMS},
    "term of rowwise_adagrad": (2, r"= __pyx_fuse_[01]__pyx_f_5pyopt_6_rules_rowwise_adagrad_term\(\(__pyx_v_p"),
    "exchange": (2, r"\(__pyx_v_q\[__pyx_v_i\]\) = __pyx_v_x;"),
    "add_squares": (2, r"\(__pyx_v_x\[__pyx_v_i\]\) = .* \+ __pyx_fuse_[01]\w*kernels_square\("),
    "magnitudes": (2, r"\(__pyx_v_x\[__pyx_v_i\]\) = __pyx_fuse_[01]__pyx_f_5pyopt_6_rules_magnitude\(\("),
    "fold": (1, r"\(__pyx_v_x\[__pyx_v_i\]\) = \(\(__pyx_v_x\[__pyx_v_i\]\) \+ \(__pyx_v_y\["),
    "fold_thrice": (1, r"\(__pyx_v_x\[__pyx_v_i\]\) = \(\(\(\(__pyx_v_x\[__pyx_v_i\]\) \+ \(__pyx_v_y\["),
}


@pytest.mark.parametrize("rule", LOOPS)
def test_every_loop_is_vectorised(report: tuple[str, str], rule: str) -> None:
    code, messages = report
    count, pattern = LOOPS[rule]
    bodies = [number for number, line in enumerate(code.splitlines(), 1) if re.search(pattern, line)]
    assert len(bodies) == count, "a loop for float and one for double"
    for body in bodies:
        # The loop's own line stands a few lines above its body.
        near = {f"_kernels.c:{line}:" for line in range(body - 40, body + 1)}
        mine = [m for m in messages.splitlines() if any(place in m for place in near)]
        assert any("optimized: loop vectorized" in m for m in mine), f"{rule}: no loop of {body} is vectorised"
        scalar = [m for m in mine if "couldn't vectorize loop" in m]
        assert not scalar, f"{rule}: a loop stays scalar: {scalar}"


# In the loop of each pass over matrices, a line of its own.
PASSES = {
    "squares": r"__pyx_v_own\[.* = .*\(__pyx_v_y \* __pyx_v_y\)",
    "update_squares": r"__pyx_v_own\[.* = .*\(__pyx_v_u \* __pyx_v_u\)",
    "update": r"__pyx_v_p\[.* = .* - \(__pyx_v_step_size \* __pyx_fuse_[01]__pyx_f_5pyopt_6_rules_factored\(",
    "product": r"__pyx_v_own\[.* = .*__pyx_v_x\[.* \* .*__pyx_v_y\[",
}


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_is_vectorised(report: tuple[str, str], name: str) -> None:
    code, messages = report
    bodies = [number for number, line in enumerate(code.splitlines(), 1) if re.search(PASSES[name], line)]
    assert len(bodies) == 2, "a loop for float and one for double"
    for body in bodies:
        near = {f"_kernels.c:{line}:" for line in range(body - 90, body + 1)}
        mine = [m for m in messages.splitlines() if any(place in m for place in near)]
        assert any("optimized: loop vectorized" in m for m in mine), f"{name}: no loop of {body} is vectorised"
