"""One libgomp in a process, whoever comes first: two pools of threads would take the cores from each other."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

import torch_or_skip as torch_or_skip
from pyopt.config import openmp_runtimes

if not sys.platform.startswith("linux"):
    pytest.skip("libgomp is Linux's", allow_module_level=True)

SHOW = """
import os
from pyopt.config import openmp_runtimes
for path in openmp_runtimes():
    print(os.path.realpath(path))
"""
LIMIT = """
pyopt.set_num_threads(2)
before = pyopt.get_num_threads()
torch.set_num_threads(1)
print(before, pyopt.get_num_threads())
"""


def lines(*statements: str) -> list[str]:
    """What a new process prints; two threads, so that a limit can be seen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", "\n".join(statements)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()


def shared(paths: list[str]) -> list[str]:
    """Those under libgomp's own name; a renamed copy, such as scikit-learn's, belongs to its package alone."""
    return [path for path in paths if os.path.basename(path).startswith("libgomp.so")]


both_orders = pytest.mark.parametrize(
    "modules", list(itertools.permutations(["pyopt", "torch"])), ids=lambda modules: "-".join(modules)
)


@both_orders
def test_one_libgomp(modules: tuple[str, str]) -> None:
    paths = lines(*(f"import {module}" for module in modules), "import pyopt.torch", SHOW)
    assert len(paths) == 1 and len(shared(paths)) == 1


@both_orders
def test_torch_limits_us(modules: tuple[str, str]) -> None:
    assert lines(*(f"import {module}" for module in modules), LIMIT) == ["2 1"]


@pytest.mark.parametrize("modules", ["pyopt torch sklearn.cluster", "torch sklearn.cluster pyopt",
                                     "sklearn.cluster pyopt torch"])  # fmt: skip
def test_scikit_learn_too(modules: str) -> None:
    """Its wheels bring a copy under another name, which cannot be shared; there is none beside it."""
    pytest.importorskip("sklearn")
    paths = lines(*(f"import {module}" for module in modules.split()), SHOW)
    assert len(shared(paths)) == 1
    others = [os.path.basename(path) for path in paths if path not in shared(paths)]
    assert len(others) <= 1 and all(name.startswith("libgomp-") for name in others), others


def test_here() -> None:
    """In this process, where torch came after NumPy and pytest."""
    assert len(shared([os.path.realpath(path) for path in openmp_runtimes()])) == 1
