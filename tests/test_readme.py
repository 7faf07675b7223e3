"""The README's Python blocks and the docstrings' examples run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import pyopt
import pyopt.files
import pyopt.lr_scheduler
import pyopt.optimizers

if find_spec("torch"):
    import pyopt.torch

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.S)


def test_loop(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0], {})
    assert np.allclose(eval(re.sub(r"(\.)?\s+", r"\1,", capsys.readouterr().out.strip())), [1, 2, 3], atol=0.1)


def test_model_in_a_dict() -> None:
    names: dict = {}
    exec(BLOCKS[1], names)
    assert names["model"]["w"].tolist() == [0, 0, 0]
    assert np.allclose(names["model"]["head"]["b"], -0.1)


def test_gradients_of_several_batches() -> None:
    names: dict = {}
    exec(BLOCKS[2], names)
    w = names["w"]
    first = np.full(2, 0.1) / (np.sqrt(2) + 1e-6)  # the gradient, [-1, -1], clipped to norm 1
    second = (1 - first) * 0.1 / max(1, np.sqrt(2) * (1 - first[0]) + 1e-6)
    assert np.allclose(w.data, first + second, rtol=1e-12) and w.grad.tolist() == [0, 0]


def test_rows_of_a_table() -> None:
    names: dict = {}
    exec(BLOCKS[3], names)
    table = names["table"]
    assert np.flatnonzero(table.any(1)).tolist() == [3, 17] and np.allclose(table[[3, 17]], -1e-3)


def test_torch_loop(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    exec(BLOCKS[5], {})
    assert capsys.readouterr().out.count("  pyopt\n") == 2


def test_own_optimizer() -> None:
    names: dict = {}
    exec(BLOCKS[4], names)
    p = pyopt.Parameter(np.ones(2), grad=np.array([3.0, -4.0]))
    optimizer = names["SignSGD"]([p], lr=0.25)
    optimizer.step()
    assert p.data.tolist() == [0.75, 1.25]
    assert np.allclose(optimizer.state_dict()["state"][0]["momentum_buffer"], [0.3, -0.4])


PACKAGES = [pyopt, pyopt.files, pyopt.lr_scheduler, pyopt.optimizers] + ([pyopt.torch] if find_spec("torch") else [])


MODULES = [
    module.name
    for package in PACKAGES
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not module.ispkg and not module.name.rpartition(".")[2].startswith("_")  # compiled, or private
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), extraglobs={"np": np})
    assert not result.failed
