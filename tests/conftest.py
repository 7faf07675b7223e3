"""What several files of tests build once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from door import Door, from_capsule, from_library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of libpyopt and its header."""
    if sys.platform != "linux" or not all(map(shutil.which, ["cc", "ar", "nm", "objcopy"])):
        pytest.skip("libpyopt is built by the tools of a C compiler on Linux")
    pytest.importorskip("Cython")
    tool = Path(__file__).parent.parent / "tools/build_c_library"
    if not tool.exists():
        pytest.skip("libpyopt is built from the sources")
    output = tmp_path_factory.mktemp("lib")
    subprocess.run([sys.executable, tool, "--output", output], check=True)
    return output


@pytest.fixture(params=["capsule", "library"])
def door(request: pytest.FixtureRequest) -> Door:
    """The table of functions, of the extension and of libpyopt."""
    if request.param == "capsule":
        return Door(from_capsule())
    return Door(from_library(str(request.getfixturevalue("library") / "libpyopt.so")))
