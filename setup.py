"""How the compiled core is built: compiler flags, OpenMP and Cython directives stand here and nowhere else."""

import os
import shutil
import sys
import sysconfig

from Cython.Build import cythonize
from setuptools import Extension, setup

# Results depend on the numbers alone: no FMA contraction, IEEE square root and division, whatever CFLAGS says before.
EXACT = ["-fno-fast-math", "-ffp-contract=off"]
# None of these changes a result. Without the first two GCC keeps loops with sqrt or a condition scalar (they stand after
# -fno-fast-math, which resets them); the third lets it move the options of the longest rules out of the loop.
VECTOR = ["-O3", "-fno-math-errno", "-fno-trapping-math", "--param=max-unswitch-insns=500"]
OPENMP = ["-fopenmp"]

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,  # also for the inline functions of .pxd files, which a header in the .pyx does not reach
    "initializedcheck": False,
    "freethreading_compatible": False,
}


def extension(name: str) -> Extension:
    """The extension pyopt.<name>, against the limited API (abi3) of Python 3.11."""
    return Extension(
        f"pyopt.{name}",
        [f"pyopt/{name}.pyx"],
        define_macros=[("Py_LIMITED_API", "0x030b0000")],
        py_limited_api=True,
        extra_compile_args=EXACT + VECTOR + OPENMP,
        extra_link_args=OPENMP,
    )


def require_compiler() -> None:
    """Say plainly what to install where there is no C compiler, instead of the build tool's own trace."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"pyopt compiles a small C core and found no C compiler ({compiler!r}).\n"
            "Install one and try again, for example: apt-get install gcc python3-dev, or dnf install gcc python3-devel."
        )


if any(command in sys.argv for command in ("build_ext", "bdist_wheel", "editable_wheel", "build", "install")):
    require_compiler()

setup(
    ext_modules=cythonize(
        [extension(name) for name in ("_engine", "_kernels")], compiler_directives=DIRECTIVES
    ),
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
