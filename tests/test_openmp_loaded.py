"""An engine that brings no OpenMP runtime, as on macOS: it takes the one that somebody else loads, and says so.

A copy of the package gets an engine that is built so here, on Linux; each test is a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

import pyopt

ROOT = Path(__file__).parent.parent

BUILD = """
import sys
from Cython.Build import cythonize
from setuptools import setup as build
import setup
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
build(ext_modules=cythonize([setup.extension("_engine")], compiler_directives=setup.DIRECTIVES))
"""

STEP = """
import os, sys, threading, warnings
import numpy as np
import pyopt
from pyopt import _engine

def step():
    p = pyopt.Parameter(np.linspace(-1, 1, 200_001, dtype=np.float32))
    optimizer = pyopt.Adam([p], lr=0.5)
    for i in range(3):
        optimizer.step(grads=[np.cos(p.data * (i + 3))])
    used.append(_engine.threads_used())
    return p.data.tobytes()

def shown():
    sections = pyopt.show_config(mode="dicts")
    return os.path.basename(sections["openmp"]["in use"]), sections["threads"]["why"]

used = []
"""

NOTHING = """
assert pyopt.get_num_threads() == 1 and not _engine.is_limited()
assert shown()[0] == "none" and shown()[1].startswith("the process has no OpenMP runtime"), shown()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pyopt.set_num_threads(1)
    assert not caught
    pyopt.set_num_threads(2)
    with pyopt.num_threads(3):
        assert pyopt.get_num_threads() == 1
assert [str(w.message).partition(",")[0] for w in caught] == ["num_threads == 2", "num_threads == 3"]
assert {w.filename for w in caught} == {"<string>"}
assert pyopt.get_num_threads() == 1
alone = step()
assert used == [1]
"""

FOUND = """
assert pyopt.get_num_threads() == 2
assert step() == alone
assert used == [1, 2], used
assert shown()[0].startswith(name), shown()
print(shown()[0])
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("Cython")
    if sys.platform != "linux" or not shutil.which("cc") or not (ROOT / "setup.py").exists():
        pytest.skip("the engine is built from the sources, on Linux")
    tree = tmp_path_factory.mktemp("loaded")
    shutil.copytree(Path(pyopt.__file__).parent, tree / "pyopt", ignore=shutil.ignore_patterns("_engine*.so", "_*.c"))
    shutil.copy(ROOT / "setup.py", tree)
    environment = {**os.environ, "PYOPT_OPENMP": "loaded"}
    subprocess.run([sys.executable, "-c", BUILD], cwd=tree, env=environment, check=True)
    return tree


def run(tree: Path, *code: str, **environment: str) -> str:
    """What a process prints that must succeed."""
    # Without the finder of an editable install.
    path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "\n".join([f"import sys; sys.path.insert(0, {str(tree)!r})", *code])]
    result = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def bring(module: str) -> list[str]:
    """The code that loads a runtime, and what its file is called."""
    if module == "libomp":
        if (found := find_library("omp")) is None:
            pytest.skip("no libomp here")
        return ["name = 'libomp'", f"import ctypes; ctypes.CDLL({found!r})"]
    pytest.importorskip(module.partition(".")[0])
    return ["name = 'libgomp'", f"import {module}"]


OTHERS = ["sklearn.utils._openmp_helpers", "libomp"]
bringers = pytest.mark.parametrize("module", ["torch", *OTHERS])


def test_the_engine_links_none(tree: Path) -> None:
    (engine,) = tree.glob("pyopt/_engine*.so")
    assert b"libgomp.so" not in engine.read_bytes()
    assert (
        run(tree, STEP, "assert pyopt.__file__.startswith(sys.path[0])", "print(_engine.openmp_runtimes())") == "[]\n"
    )


def test_one_thread_without(tree: Path) -> None:
    run(tree, STEP, NOTHING)


@bringers
def test_brought_later(tree: Path, module: str) -> None:
    """The number that was asked for before holds then, and the bits are the same."""
    run(tree, STEP, NOTHING, *bring(module), FOUND)


@bringers
def test_brought_before(tree: Path, module: str) -> None:
    code = """
warnings.simplefilter("error")
pyopt.set_num_threads(2)
step()
assert used == [2] and shown()[0].startswith(name)
"""
    run(tree, *bring(module), STEP, code)


def test_a_limit_of_torch_holds(tree: Path) -> None:
    pytest.importorskip("torch")
    run(tree, STEP, "import torch; torch.set_num_threads(1); step()", "assert pyopt.get_num_threads() == used[0] == 1",
        "assert _engine.is_limited()", "torch.set_num_threads(2); step(); assert used == [1, 2]")  # fmt: skip


@pytest.mark.parametrize("module", OTHERS)
def test_the_first_one_stays(tree: Path, module: str) -> None:
    """One runtime for the life of the process; a second, of another name, changes nothing."""
    pytest.importorskip("torch")
    code = [STEP, *bring(module), "step(); first = shown()[0]", "import torch; step()", "assert shown()[0] == first"]
    run(tree, *code, "assert used == [2, 2] and len(_engine.openmp_runtimes()) == 2, _engine.openmp_runtimes()")


def test_found_by_threads_at_once(tree: Path) -> None:
    code = """
pyopt.set_num_threads(1)
_engine.set_team(2)
done = []
def work():
    while len(done) < 200:
        done.append(step())
team = [threading.Thread(target=work) for _ in range(4)]
for t in team: t.start()
exec(bring)
for t in team: t.join()
assert len(set(done)) == 1
step()
assert used[0] == 1 and used[-1] == 2, used
"""
    lines = bring("torch")
    run(tree, STEP, f"bring = {lines[1]!r}", code)


def test_forked_child(tree: Path) -> None:
    code = """
pid = os.fork()
if pid == 0:
    assert pyopt.get_num_threads() == 1
    step()
    os._exit(0 if used[-1] == 1 else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    run(tree, STEP, *bring("torch"), "step()", code)
