"""A copy of the sources without the compiled core says what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyopt


@pytest.mark.parametrize("module", ["pyopt", "pyopt.optimizers.adam", "pyopt.__main__"])
def test_import_without_a_build(module: str, tmp_path: Path) -> None:
    shutil.copytree(Path(pyopt.__file__).parent, tmp_path / "pyopt", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import runpy; runpy.run_module({module!r})"
    # -S: without the finder of an editable install, which would help out with the core of another copy
    result = subprocess.run([sys.executable, "-I", "-S", "-c", start], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: No module named 'pyopt._engine'")
    assert "pip install -e ." in last
