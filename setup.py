"""How the compiled core is built: compiler flags, OpenMP and Cython directives stand here and nowhere else."""

import os
import platform
import shutil
import sys
import sysconfig

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

# Results depend on the numbers alone: no FMA contraction, IEEE square root and division, whatever CFLAGS says before.
EXACT = ["-fno-fast-math", "-ffp-contract=off"]
# None of these changes a result. Without the middle two GCC keeps loops with sqrt or a condition scalar (they stand
# behind -fno-fast-math, which resets them); the last lets it move the options of the longest rules out of the loop.
VECTOR = ["-O3", "-fno-math-errno", "-fno-trapping-math", "--param=max-unswitch-insns=500"]
OPENMP = ["-fopenmp"]
# Two builds to look for faults with, each asked for by an environment variable. PYOPT_SANITIZE=address,undefined names
# GCC's sanitizers (tools/sanitize runs the tests under them); PYOPT_DEBUG=1 checks indices of lists and memoryviews and
# None. The build tool does not see that a variable has changed: `build_ext --inplace --force`, to and fro.
SANITIZE = [f"-fsanitize={names}"] if (names := os.environ.get("PYOPT_SANITIZE")) else []
DEBUG = os.environ.get("PYOPT_DEBUG", "0") not in ("", "0")
FOR_DEBUGGER = ["-O1", "-g", "-fno-omit-frame-pointer"] if DEBUG or SANITIZE else []
COMPILE_ARGS = EXACT + VECTOR + OPENMP + SANITIZE + FOR_DEBUGGER
LINK_ARGS = OPENMP + SANITIZE
# Levels of instructions: the kernels are compiled once for each. The rest of the package gets the baseline, whatever
# CFLAGS says, since it runs before the CPU has been asked.
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
BASELINE = ["-march=x86-64", "-mtune=generic"] if X86_64 else []
LEVELS = {"_kernels_v3": ["-march=x86-64-v3"], "_kernels_v4": ["-march=x86-64-v4"]} if X86_64 else {}
MODULES = [
    *["_xxh64", "_rows", "_engine", "_kernels", *LEVELS, "_matrix", "_norms", "_lazy"],
    *["_lock", "_plans", "_asked", "_step", "_arrays", "torch._tensors"],
]
# The limited API of Python 3.11; of NumPy the inline accessors of its arrays (_numpy_arrays.pxd), as of 2.0.
MACROS = [
    ("Py_LIMITED_API", "0x030b0000"),
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
    "freethreading_compatible": False,
}


def extension(name: str) -> Extension:
    """The extension pyopt.<name>, against the limited API (abi3) of Python 3.11."""
    return Extension(
        f"pyopt.{name}",
        [f"pyopt/{name.replace('.', '/')}.pyx"],
        include_dirs=[numpy.get_include()],
        define_macros=MACROS,
        py_limited_api=True,
        extra_compile_args=[*LEVELS.get(name, BASELINE), *COMPILE_ARGS],
        extra_link_args=LINK_ARGS,
    )


def require_compiler() -> None:
    """Say plainly what to install where there is no C compiler, instead of the build tool's own trace."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"pyopt compiles a small C core and found no C compiler ({compiler!r}).\n"
            "Install one and try again, for example: apt-get install gcc python3-dev, or dnf install gcc python3-devel."
        )


if __name__ == "__main__":
    if any(command in sys.argv for command in ("build_ext", "bdist_wheel", "editable_wheel", "build", "install")):
        require_compiler()
    anew = bool(FOR_DEBUGGER or {"-f", "--force"} & set(sys.argv))
    setup(
        ext_modules=cythonize([extension(name) for name in MODULES], compiler_directives=DIRECTIVES, force=anew),
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
