"""What several files of tests build once, and an option that makes a run short."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from door import Door, from_capsule, from_library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, metavar="N", help="of each test at most N of its parameters' cases, spread")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("--cases")
    if most is None:
        return
    cases: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = [
        group[i * len(group) // most] if len(group) > most else group[i]
        for group in cases.values()
        for i in range(min(most, len(group)))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


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
