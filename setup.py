"""How the compiled core is built: compiler flags, OpenMP and Cython directives stand here and nowhere else."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What is built for, as in the names of wheels: linux_x86_64, win_amd64, macosx_11.0_arm64; or what a cross-build says.
TARGET = (os.environ.get("_PYTHON_HOST_PLATFORM") or sysconfig.get_platform()).lower().replace("-", "_")
X86_64 = TARGET.endswith(("x86_64", "amd64"))
WINDOWS, MACOS = TARGET.startswith("win"), TARGET.startswith("macosx")
# On Windows MinGW-w64: the sources are of GCC's C, as clang's.
COMPILER = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or ("gcc" if WINDOWS else "cc"))


def supported(*flags: str) -> list[str]:
    """The flags, which belong together, if the compiler knows them: the only place that asks it."""
    if shutil.which(COMPILER[0]) is None:
        return []
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "empty.c")
        source.touch()
        command = [*COMPILER, "-Werror", *flags, "-c", source, "-o", source.with_suffix(".o")]
        return [] if subprocess.run(command, capture_output=True).returncode else list(flags)


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
LINK_ARGS = SANITIZE + COVERAGE[1:2] if FOR_DEBUGGER or COVERAGE else ["-Wl,-x" if MACOS else "-s"]
# Levels of instructions: the kernels are compiled once for each. The rest of the package gets the baseline, whatever
# CFLAGS says, since it runs before the CPU has been asked.
BASELINE = ["-march=x86-64", "-mtune=generic"] if X86_64 else []
LEVELS = {"_kernels_v3": ["-march=x86-64-v3"], "_kernels_v4": ["-march=x86-64-v4"]} if X86_64 else {}
if WINDOWS:
    # The stack is aligned to 16 bytes there, and GCC takes it for more where it keeps longer vectors (its bug 54412):
    # the assembler makes of its aligned moves others, which cost nothing more. Without that, no such vectors.
    UNALIGNED = supported("-Wa,-muse-unaligned-vector-move")
    LEVELS = {name: [*flags, *UNALIGNED] for name, flags in LEVELS.items() if UNALIGNED}
MODULES = [
    *["_xxh64", "_rows", "_engine", "_kernels", *LEVELS, "_matrix", "_norms", "_lazy"],
    *["_lock", "_plans", "_asked", "_step", "_arrays", "_thinc", "_door", "_xla"],
    *["torch._tensor_views", "torch._flat", "torch._tensors"],
]
# The engine alone calls OpenMP, by its functions (_platform.h). On Linux it links libgomp, that beside it in a wheel,
# else the system's; on Windows libgomp is inside it, with the threads it starts; on macOS it takes what somebody else
# has loaded into the process, and elsewhere if built with PYOPT_OPENMP=loaded.
LOADED = MACOS or os.environ.get("PYOPT_OPENMP") == "loaded"
STATIC = ["-static-libgcc", "-Wl,-Bstatic", "-lgomp", "-lwinpthread", "-Wl,-Bdynamic"]
OPENMP_LIBRARIES = [] if MACOS else STATIC if WINDOWS else [*([] if LOADED else ["-lgomp"]), "-lpthread", "-ldl"]
RUN_PATH = {} if MACOS or WINDOWS or LOADED else {"runtime_library_dirs": ["$ORIGIN"]}
# The limited API of Python 3.11, which a Python without the GIL does not have; of NumPy the inline accessors of its
# arrays (_numpy_arrays.pxd), as of 2.0.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
PYTHON = "python3" if LIMITED else "python{}{}t".format(*sys.version_info)  # its import library on Windows
MACROS = [
    *([("PYOPT_OPENMP_LOADED", "1")] if LOADED else []),
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
        extra_link_args=LINK_ARGS + (OPENMP_LIBRARIES if name == "_engine" or WINDOWS else []),
        **(RUN_PATH if name == "_engine" else {}),
    )


class BuildExtensions(build_ext):
    def get_libraries(self, ext: Extension) -> list[str]:
        """On Windows the stable ABI's library, for which setuptools takes that of the one version."""
        return [*ext.libraries, PYTHON] if WINDOWS else super().get_libraries(ext)


def require_compiler() -> None:
    """Say plainly what to install where there is no C compiler, instead of the build tool's own trace."""
    if shutil.which(COMPILER[0]) is None:
        how = (
            "install MinGW-w64 (x86_64, posix threads) and put its bin on the PATH"
            if WINDOWS
            else "xcode-select --install"
            if MACOS
            else "apt-get install gcc python3-dev, or dnf install gcc python3-devel"
        )
        sys.exit(
            f"pyopt compiles a small C core and found no C compiler ({COMPILER[0]!r}).\n"
            f"Install one and try again, for example: {how}."
        )


if __name__ == "__main__":
    if any(command in sys.argv for command in ("build_ext", "bdist_wheel", "editable_wheel", "build", "install")):
        require_compiler()
    anew = bool(FOR_DEBUGGER or COVERAGE or {"-f", "--force"} & set(sys.argv))
    setup(
        ext_modules=cythonize([extension(name) for name in MODULES], compiler_directives=DIRECTIVES, force=anew),
        cmdclass={"build_ext": BuildExtensions},
        options={
            **({"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {}),
            **({"build_ext": {"compiler": "mingw32"}} if sys.platform == "win32" else {}),
        },
    )
