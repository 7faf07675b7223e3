"""The samples of what users write run, and name all that is public; .ci/run gives them to mypy --strict and pyright."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import pyopt
from optimizers_page import catalogue

SAMPLES = Path(__file__).parent / "typing"


def test_sample(tmp_path: Path) -> None:
    names = runpy.run_path(str(SAMPLES / "user.py"))
    assert names["train"](tmp_path) == 3
    names["other_ways"]()
    assert names["EVERY"] == catalogue()


def test_sample_with_tensors() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    assert runpy.run_path(str(SAMPLES / "user_torch.py"))["train"]() > 0


def test_the_sample_names_all_that_is_public() -> None:
    used = set(re.findall(r"pyopt\.(\w+)", (SAMPLES / "user.py").read_text())) | {"averaging", "lr_scheduler"}
    public = {name for name, value in vars(pyopt).items() if not name.startswith("_") and not is_module(value)}
    assert public <= used


def is_module(value: object) -> bool:
    return hasattr(value, "__path__") or hasattr(value, "__file__")
