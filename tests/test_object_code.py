"""The object code: every loop over a span is vectorised for both element types, and the baseline is a baseline.

By GCC and clang, where they are there.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest

import pyopt
from pyopt import _kernels
from pyopt._engine import Rule

ROOT = Path(__file__).parent.parent
NO_RULES = ("exchange", "nothing", "norm")  # with loops of their own
RULES = [name for name, value in vars(_kernels).items() if isinstance(value, Rule) and name not in NO_RULES]

CLANGS = ["clang", *(f"clang-{n}" for n in range(30, 13, -1))]  # the first of them that is there
COMPILERS = [*filter(shutil.which, ["gcc"]), *list(filter(shutil.which, CLANGS))[:1]]

if sys.platform != "linux":
    pytest.skip("the reports and objdump are read as they are on Linux", allow_module_level=True)

FLAGS = """
import json, setup
levels = {"baseline": setup.BASELINE, **setup.LEVELS}
print(json.dumps([levels, setup.COMPILE_ARGS, setup.DIRECTIVES]))
"""
# What asks a compiler for its report, the words for a vectorised loop, and those for one that stays scalar.
WORDS = {
    "gcc": ("-fopt-info-vec-all", "optimized: loop vectorized", "couldn't vectorize loop"),
    "clang": ("-Rpass=loop-vectorize", "remark: vectorized loop", "remark: loop not vectorized"),
}


class Report(NamedTuple):
    compiler: str
    level: str
    code: str
    messages: str
    vectorised: str  # the compiler's words
    scalar: str


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated C of the kernels."""
    path = tmp_path_factory.mktemp("kernels") / "_kernels.c"
    directives = settings("gcc")[2]
    options = [f"-X{name}={value}" for name, value in directives.items()]
    subprocess.run(
        [sys.executable, "-m", "cython", *options, ROOT / "pyopt/_kernels.pyx", "-o", path], check=True, cwd=ROOT
    )
    return path


def settings(compiler: str) -> Any:
    """Flags of the levels, those of all modules, and Cython's directives, as setup.py has them for a compiler."""
    result = subprocess.run(
        [sys.executable, "-c", FLAGS], check=True, capture_output=True, cwd=ROOT, env={**os.environ, "CC": compiler}
    )
    return json.loads(result.stdout)


@pytest.fixture(
    scope="module",
    params=[(c, level) for c in COMPILERS for level in ("baseline", "_kernels_v3", "_kernels_v4")],
    ids="-".join,
)
def report(request: pytest.FixtureRequest, source: Path) -> Report:
    """What a compiler says of the kernels, for one level of instructions."""
    compiler, level = request.param
    levels, flags, _ = settings(compiler)
    if level not in levels:
        pytest.skip("the levels are those of x86-64")
    kind = "gcc" if compiler == "gcc" else "clang"
    ask, vectorised, scalar = WORDS[kind]
    remarks = [ask] if compiler == "gcc" else [ask, "-Rpass-missed=loop-vectorize", "-w"]
    limited = [] if sysconfig.get_config_var("Py_GIL_DISABLED") else ["-DPy_LIMITED_API=0x030b0000"]
    result = subprocess.run(
        [
            *(compiler, "-fPIC", *levels[level], *flags, *limited),
            *(f"-I{sysconfig.get_paths()['include']}", f"-I{numpy.get_include()}", f"-I{ROOT / 'pyopt'}"),
            *(*remarks, "-c", source, "-o", source.with_suffix(".o")),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return Report(kind, level, source.read_text(), result.stderr, vectorised, scalar)


@pytest.mark.parametrize(
    "module",
    [
        *["_rows", "_engine", "_matrix", "_norms", "_lock", "_plans", "_asked", "_step", "_arrays", "_kernels"],
        *["torch/_tensor_views", "torch/_flat", "torch/_tensors"],
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
    **{
        f"load_{name}": (1, rf"\(__pyx_v_to\[__pyx_v_i\]\) = __pyx_f_5pyopt_8_storage_from_{name}\(")
        for name in ("bfloat16", "float16", "split")
    },
    **{
        f"store_{name}": (
            1 if name == "split" else 2,
            rf"\(__pyx_v_to\[__pyx_v_i\]\) = __pyx_f_5pyopt_8_storage_to_{name}\(\(__pyx_v_x",
        )
        for name in ("bfloat16", "float16", "split")
    },
    "scale_of_codes": (1, r"\(__pyx_v_to\[__pyx_v_i\]\) = \(float_of\(\(__pyx_v_bits\["),
    "largest_size": (1, r"__pyx_v_size = \(bits_of\(\(__pyx_v_x\[__pyx_v_i\]"),
    "in_cells": (1, r"\(__pyx_v_place\[__pyx_v_i\]\) = __pyx_f_5pyopt_8_storage_cell_of\("),
    "to_code": (1, r"\(__pyx_v_to\[__pyx_v_i\]\) = __pyx_f_5pyopt_8_storage_to_code\("),
    "fold": (1, r"\(__pyx_v_x\[__pyx_v_i\]\) = \(\(__pyx_v_x\[__pyx_v_i\]\) \+ \(__pyx_v_y\["),
    "fold_thrice": (1, r"\(__pyx_v_x\[__pyx_v_i\]\) = \(\(\(\(__pyx_v_x\[__pyx_v_i\]\) \+ \(__pyx_v_y\["),
}


# Of double, two lanes without an instruction that selects: clang finds it not worth the work.
SCALAR = {("clang", "baseline", "ftrl")}


@pytest.mark.parametrize("rule", LOOPS)
def test_every_loop_is_vectorised(report: Report, rule: str) -> None:
    count, pattern = LOOPS[rule]
    bodies = [number for number, line in enumerate(report.code.splitlines(), 1) if re.search(pattern, line)]
    assert len(bodies) == count, "a loop for float and one for double"
    for body in bodies[:1] if (report.compiler, report.level, rule) in SCALAR else bodies:
        # The loop's own line stands a few lines above its body.
        near = {f"_kernels.c:{line}:" for line in range(body - 40, body + 1)}
        mine = [m for m in report.messages.splitlines() if any(place in m for place in near)]
        assert any(report.vectorised in m for m in mine), f"{rule}: no loop of {body} is vectorised"
        scalar = [m for m in mine if report.scalar in m]
        assert not scalar, f"{rule}: a loop stays scalar: {scalar}"


# In the loop of each pass over matrices, a line of its own.
PASSES = {
    "squares": r"__pyx_v_own\[.* = .*\(__pyx_v_y \* __pyx_v_y\)",
    "update_squares": r"__pyx_v_own\[.* = .*\(__pyx_v_u \* __pyx_v_u\)",
    "update": r"__pyx_v_p\[.* = .* - \(__pyx_v_step_size \* __pyx_fuse_[01]__pyx_f_5pyopt_6_rules_factored\(",
    "product": r"__pyx_v_own\[.* = .*__pyx_v_x\[.* \* .*__pyx_v_y\[",
}


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_is_vectorised(report: Report, name: str) -> None:
    bodies = [number for number, line in enumerate(report.code.splitlines(), 1) if re.search(PASSES[name], line)]
    assert len(bodies) == 2, "a loop for float and one for double"
    for body in bodies:
        near = {f"_kernels.c:{line}:" for line in range(body - 90, body + 1)}
        mine = [m for m in report.messages.splitlines() if any(place in m for place in near)]
        assert any(report.vectorised in m for m in mine), f"{name}: no loop of {body} is vectorised"
