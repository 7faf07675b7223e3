"""The packages that pyopt goes into, or skip. PYOPT_REQUIRE_STACKS=1 makes a missing one an error."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def need(*packages: str, level: bool = True) -> None:
    """Skip the tests of a module, or only this one, or fail, where a package is not installed."""
    for package in packages:
        if find_spec(package) is None:
            if os.environ.get("PYOPT_REQUIRE_STACKS") == "1":
                raise ModuleNotFoundError(f"{package} is not installed; pip install -e '.[stacks-test]'", name=package)
            pytest.skip(
                f"{package} is not installed; PYOPT_REQUIRE_STACKS=1 makes this an error", allow_module_level=level
            )
