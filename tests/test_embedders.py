"""The embedders of examples/: each is built as its users would, and trains the digits network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyopt

pytest.importorskip("sklearn")
ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that must succeed, which finds the pyopt of these tests."""
    path = os.pathsep.join([str(Path(pyopt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def accuracies(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"test accuracy ([\d.]+) ?%", output)]


def test_cython(tmp_path: Path) -> None:
    """A package in Cython: `cimport pyopt.api`, the same result for every number of threads."""
    pytest.importorskip("Cython")
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    package = tmp_path / "package"
    shutil.copytree(EXAMPLES / "embedding_cython", package, ignore=shutil.ignore_patterns("*.c", "*.so", "build"))
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=package)
    outputs = [run(sys.executable, "train_digits.py", "--epochs", "3", "--threads", n, cwd=package) for n in "12"]
    assert outputs[0] == outputs[1]
    assert len(accuracies(outputs[0])) == 3 and accuracies(outputs[0])[-1] > 94


@pytest.mark.parametrize("builder", ["g++", "cmake"])
def test_cpp(builder: str, library: Path, tmp_path: Path) -> None:
    """A C++ program on libpyopt, with threads of its own: the same digest for every number of them."""
    if not all(map(shutil.which, ["g++", builder])):
        pytest.skip(f"no g++ or no {builder}")
    example = EXAMPLES / "embedding_cpp"
    run(sys.executable, example / "export_digits.py", "digits.bin", cwd=tmp_path)
    if builder == "cmake":
        run("cmake", "-S", example, "-B", ".", f"-DPYOPT={library}", cwd=tmp_path)
        run("cmake", "--build", ".", cwd=tmp_path)
    else:
        warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
        source = [example / "train_digits.cpp", f"-I{library}", library / "libpyopt.a", "-fopenmp"]
        run("g++", "-std=c++17", "-O3", *warnings, *source, "-o", "train_digits", cwd=tmp_path)
    outputs = [run("./train_digits", "digits.bin", "--epochs", "3", "--threads", n, cwd=tmp_path) for n in "123"]
    assert outputs[0] == outputs[1] == outputs[2] and "digest" in outputs[0]
    assert len(accuracies(outputs[0])) == 3 and accuracies(outputs[0])[-1] > 94
    bad = subprocess.run(["./train_digits", "missing"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stderr) == (1, "missing is not what export_digits.py writes\n")
