"""The recommender trains: pyopt's hit rate is torch's, well above chance."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pyopt
from torch_or_skip import torch

SCRIPT = Path(__file__).parent.parent / "examples" / "recommender.py"
SMALL = ["--users", "1500", "--items", "200", "--epochs", "3", "--batch", "128", "--lr", "0.01"]
LINE = re.compile(
    r"(\S+): hit rate (\d\.\d+) before, (\d\.\d+) after; [\d.]+ ms a step, of which the optimizers [\d.]+ ms"
)


@pytest.fixture
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("recommender", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recommender"] = module  # a dataclass looks for its module
    threads = torch.get_num_threads(), pyopt.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    del sys.modules["recommender"]
    torch.set_num_threads(threads[0])
    pyopt.set_num_threads(threads[1])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("optimizer", ["SparseAdam", "Adagrad", "RowwiseAdagrad"])
def test_it_learns(
    example: ModuleType, optimizer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = ["--lr", "0.05"] if optimizer != "SparseAdam" else []
    monkeypatch.setattr(sys, "argv", ["recommender.py", *SMALL, *rate, "--optimizer", optimizer])
    example.main()
    found = LINE.findall(capsys.readouterr().out)
    names = [name for name, *_ in found]
    assert names == (["pyopt.torch"] if optimizer == "RowwiseAdagrad" else ["pyopt.torch", "torch.optim"])
    for _, before, after in found:
        assert float(before) < 0.2 < float(after)
    assert len({before for _, before, _ in found}) == 1
    rates = [float(after) for *_, after in found]
    assert max(rates) - min(rates) < 0.02
