"""The docstrings' examples run as they stand; those of the pages: test_pages.py."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import numpy as np
import pytest

import pyopt
import pyopt.files
import pyopt.lr_scheduler
import pyopt.optimizers

if find_spec("torch"):
    import pyopt.torch

PACKAGES = [pyopt, pyopt.files, pyopt.lr_scheduler, pyopt.optimizers] + ([pyopt.torch] if find_spec("torch") else [])
MODULES = [package.__name__ for package in PACKAGES] + [
    module.name
    for package in PACKAGES
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not module.ispkg and not module.name.rpartition(".")[2].startswith("_")  # compiled, or private
    if module.name not in ("pyopt.mpi", "pyopt.thinc")  # not always there: tests/test_stack_*.py
    if module.name != "pyopt.jax" or find_spec("jax")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), extraglobs={"np": np})
    assert not result.failed
