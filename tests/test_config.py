"""show_config and `python -m pyopt`."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import pyopt
from pyopt import _engine


def test_dicts() -> None:
    config = pyopt.show_config(mode="dicts")
    assert config is not None
    assert config["pyopt"]["version"] == pyopt.__version__
    assert config["instruction sets"]["chosen"] in config["instruction sets"]["built"]
    in_use = config["openmp"]["in use"]
    if sys.platform == "linux":
        assert in_use in config["openmp"]["runtimes"] and "gomp" in in_use
    elif sys.platform == "win32":
        assert in_use == os.path.realpath(_engine.__file__)
    else:
        assert in_use == "none" or in_use in config["openmp"]["runtimes"]
    assert config["threads"]["number"] == pyopt.get_num_threads()
    assert config["numpy"]["version"] == np.__version__


@pytest.mark.skipif(sys.platform != "linux", reason="pyopt brings a library of OpenMP on Linux alone")
def test_one_runtime() -> None:
    """In a process of its own: what other tests import, such as scikit-learn, brings copies under other names."""
    code = "import pyopt; print(*pyopt.show_config(mode='dicts')['openmp']['runtimes'], sep='\\n')"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert len(printed.splitlines()) == 1 and "gomp" in printed


def test_reason_of_the_number_of_threads() -> None:
    with pyopt.num_threads(7):
        config = pyopt.show_config(mode="dicts")
        assert config is not None and config["threads"]["why"].startswith("set by the caller")


def test_command_prints_all_sections() -> None:
    printed = subprocess.run([sys.executable, "-m", "pyopt"], check=True, capture_output=True, text=True).stdout
    config = pyopt.show_config(mode="dicts")
    assert config is not None
    assert [line[:-1] for line in printed.splitlines() if not line.startswith(" ")] == [
        section for section in config if section != "torch" or "torch:" in printed
    ]
    assert f"  chosen: {config['instruction sets']['chosen']}" in printed


def test_bad_mode() -> None:
    with pytest.raises(ValueError, match="mode == 'json'"):
        pyopt.show_config(mode="json")
