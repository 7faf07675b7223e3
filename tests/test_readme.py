"""The README's Python blocks and the docstrings' examples run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import pyopt

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.S)


def test_loop(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0], {})
    assert np.allclose(eval(re.sub(r"(\.)?\s+", r"\1,", capsys.readouterr().out.strip())), [1, 2, 3], atol=0.1)


def test_own_optimizer() -> None:
    names: dict = {}
    exec(BLOCKS[1], names)
    p = pyopt.Parameter(np.ones(2), grad=np.array([3.0, -4.0]))
    optimizer = names["SignSGD"]([p], lr=0.25)
    optimizer.step()
    assert p.data.tolist() == [0.75, 1.25]
    assert np.allclose(optimizer.state_dict()["state"][0]["momentum_buffer"], [0.3, -0.4])


MODULES = [m.name for m in pkgutil.walk_packages(pyopt.__path__, "pyopt.") if "__" not in m.name]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name.startswith("pyopt._kernels_v"):
        return
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"np": np})
    assert not result.failed
