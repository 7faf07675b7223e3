"""The pages that are generated are up to date: optimizers, with pictures, messages, and the table of measurements."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import docstrings
import pytest

import bad_input_page
import optimizers
import optimizers_page
from pyopt import Adam, Optimizer

ROOT = Path(__file__).parent.parent
each = pytest.mark.parametrize("cls", optimizers_page.catalogue(), ids=lambda cls: cls.__name__)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_page_is_up_to_date() -> None:
    assert optimizers_page.PAGE.read_text() == optimizers_page.page(), "run tools/optimizers_page.py"


def test_messages_are_up_to_date() -> None:
    assert bad_input_page.PAGE.read_text() == bad_input_page.page(), "run tools/bad_input_page.py"


@each
def test_picture(cls: type[Optimizer]) -> None:
    assert is_picture(ROOT / "docs" / "paths" / f"{cls.__name__.lower()}.png"), "run examples/trajectories.py"


@each
def test_docstring_has_a_source(cls: type[Optimizer]) -> None:
    form = r"\[[^]]+, 20\d\d\]\(https://arxiv.org/abs/\d{4}\.\d+\)|[^][()]+, (19|20)\d\d|as for \w+ and \w+"
    assert re.fullmatch(form, optimizers_page.paper(cls))


def test_option_that_the_docstring_lacks() -> None:
    class Short(Adam):
        __doc__ = (Adam.__doc__ or "").replace("eps: added", "epsilon: added")

    with pytest.raises(KeyError, match="epsilon"):
        optimizers_page.options(Short)
    Short.__doc__ = (Adam.__doc__ or "").replace("eps: added to the root, >= 0.\n        ", "")
    with pytest.raises(ValueError, match="Short: Args of its docstring lacks eps"):
        optimizers_page.options(Short)


def test_table_of_measurements() -> None:
    """Every optimizer is in it; what does not depend on the machine is as the declarations have it."""
    assert optimizers.PAGE.read_text() == optimizers.page(), "run bench/report.py --catalogue"
    numbers = json.loads(optimizers.NUMBERS.read_text())
    assert {label for label, _, _ in optimizers.rows()} == numbers["rows"].keys(), "run bench/report.py --catalogue"
    assert "| 8 | 28 |" in next(line for line in optimizers.page().splitlines() if line.startswith("| [Adam]"))


def test_trajectories(tmp_path: Path) -> None:
    """The command draws what it is asked for."""
    command = [sys.executable, ROOT / "examples" / "trajectories.py", "--optimizers", "Lion", "--output", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["lion.png"] and is_picture(tmp_path / "lion.png")


def test_docstring_as_restructured_text() -> None:
    """Signs mean themselves, formulas and examples stay as they are, names and entries are marked."""
    text = """|x|**2, clip_grad_norm_, see `step(n=1)`, `.optim` or `load`.

    p = p - lr * g**2

Args:
    lr, eps: >= 0;
        see `load`.
    params: all.

    Behind the entries.

Returns:
    The norm: a float.

Example:
    >>> 1 * 1
    1

Source: A and B (arXiv 1412.6980).
"""
    expected = r"""\|x\|\*\*2, clip_grad_norm\_, see \ ``step(n=1)``\ , \ ``.optim``\  or \ :py:obj:`load`\ .

.. code-block:: none

    p = p - lr * g**2

:Arguments:
    - **lr, eps**: >= 0; see \ :py:obj:`load`\ .
    - **params**: all.

Behind the entries.

:Returns:
    The norm: a float.

.. rubric:: Example

.. code-block:: pycon

    >>> 1 * 1
    1

Source: A and B (`arXiv 1412.6980 <https://arxiv.org/abs/1412.6980>`__).
"""
    assert docstrings.as_rest(text) == expected
