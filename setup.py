"""How the compiled core is built: compiler flags, OpenMP and Cython directives stand here and nowhere else."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

COMPILER = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def supported(*flags: str) -> list[str]:
    """The flags, which belong together, if the compiler knows them: the only place that asks it."""
    command = [*COMPILER, "-Werror", *flags, "-x", "c", "-c", os.devnull, "-o", os.devnull]
    known = shutil.which(COMPILER[0]) and not subprocess.run(command, capture_output=True).returncode
    return list(flags) if known else []


# Results depend on the numbers alone: no FMA contraction, IEEE square root and division, whatever CFLAGS says before.
EXACT = ["-fno-fast-math", "-ffp-contract=off"]
# None of these changes a result. Without the last two GCC keeps loops with sqrt or a condition scalar (they stand
# behind -fno-fast-math, which resets them).
VECTOR = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
# By GCC's name or clang's: the options of the longest rules are moved out of the loop, which then has no condition.
VECTOR += supported("--param=max-unswitch-insns=500") or supported("-mllvm", "-unswitch-threshold=500")
# Builds to look for faults with, asked for by environment variables. PYOPT_SANITIZE=address,undefined names GCC's
# sanitizers (tools/sanitize runs the tests under them); PYOPT_DEBUG=1 checks indices of lists and memoryviews and None;
# PYOPT_COVERAGE=1 counts how often lines run (tools/coverage): by GCC, for Cython's own tracing takes the GIL at each.
# The build tool does not see that a variable has changed: `build_ext --inplace --force`, to and fro.
COVERAGE = ["-O0", "--coverage", "-fprofile-update=atomic"] if os.environ.get("PYOPT_COVERAGE") == "1" else []
SANITIZE = [f"-fsanitize={names}"] if (names := os.environ.get("PYOPT_SANITIZE")) else []
DEBUG = os.environ.get("PYOPT_DEBUG", "0") not in ("", "0")
FOR_DEBUGGER = ["-O1", "-g", "-fno-omit-frame-pointer"] if DEBUG or SANITIZE else []
COMPILE_ARGS = EXACT + VECTOR + SANITIZE + (FOR_DEBUGGER or ["-g0"]) + COVERAGE
LINK_ARGS = SANITIZE + COVERAGE[1:2] if FOR_DEBUGGER or COVERAGE else ["-s"]
# Levels of instructions: the kernels are compiled once for each. The rest of the package gets the baseline, whatever
# CFLAGS says, since it runs before the CPU has been asked.
MACHINE = os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).lower().replace("-", "_")
X86_64 = MACHINE.endswith(("x86_64", "amd64"))
BASELINE = ["-march=x86-64", "-mtune=generic"] if X86_64 else []
LEVELS = {"_kernels_v3": ["-march=x86-64-v3"], "_kernels_v4": ["-march=x86-64-v4"]} if X86_64 else {}
MODULES = [
    *["_xxh64", "_rows", "_engine", "_kernels", *LEVELS, "_matrix", "_norms", "_lazy"],
    *["_lock", "_plans", "_asked", "_step", "_arrays", "_thinc", "_door", "_xla"],
    *["torch._tensor_views", "torch._flat", "torch._tensors"],
]
# The engine alone calls OpenMP, by its functions: libgomp, the one beside it in a wheel, else that of the system.
OPENMP = {"libraries": ["gomp", "pthread"], "runtime_library_dirs": ["$ORIGIN"]}
# The limited API of Python 3.11, which a Python without the GIL does not have; of NumPy the inline accessors of its
# arrays (_numpy_arrays.pxd), as of 2.0.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
MACROS = [
    *([("Py_LIMITED_API", "0x030b0000")] if LIMITED else []),
    ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
    ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
]

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    # IEEE's x / 0; also for the inline functions of .pxd files, which a header in the .pyx does not reach
    "cdivision": True,
    "initializedcheck": DEBUG,
    "nonecheck": DEBUG,
    # What another thread may replace is held by references of our own, and dicts of others are walked in critical
    # sections, which are nothing with the GIL.
    "freethreading_compatible": True,
}


def extension(name: str) -> Extension:
    """The extension pyopt.<name>, against the limited API (abi3) of Python 3.11 where there is one."""
    return Extension(
        f"pyopt.{name}",
        [f"pyopt/{name.replace('.', '/')}.pyx"],
        include_dirs=[numpy.get_include(), "pyopt", "pyopt/include"],
        define_macros=MACROS,
        py_limited_api=LIMITED,
        extra_compile_args=[*LEVELS.get(name, BASELINE), *COMPILE_ARGS],
        extra_link_args=LINK_ARGS,
        **(OPENMP if name == "_engine" else {}),
    )


def require_compiler() -> None:
    """Say plainly what to install where there is no C compiler, instead of the build tool's own trace."""
    if shutil.which(COMPILER[0]) is None:
        sys.exit(
            f"pyopt compiles a small C core and found no C compiler ({COMPILER[0]!r}).\n"
            "Install one and try again, for example: apt-get install gcc python3-dev, or dnf install gcc python3-devel."
        )


if __name__ == "__main__":
    if any(command in sys.argv for command in ("build_ext", "bdist_wheel", "editable_wheel", "build", "install")):
        require_compiler()
    anew = bool(FOR_DEBUGGER or COVERAGE or {"-f", "--force"} & set(sys.argv))
    setup(
        ext_modules=cythonize([extension(name) for name in MODULES], compiler_directives=DIRECTIVES, force=anew),
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
    )
