"""The example: it learns with every optimizer, resumes bit for bit, and reports wrong arguments."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors")  # it has no wheel for a Python without the GIL
pytest.importorskip("safetensors.numpy")

SCRIPT = Path(__file__).parent.parent / "examples" / "train_digits.py"
RESULT = re.compile(r"test accuracy: (\d+\.\d) % \((\w+)\)\n")
OPTIMIZERS = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Lion"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays(path: Path) -> dict[str, np.ndarray]:
    """What a checkpoint holds."""
    return safetensors.numpy.load_file(path)


def document(path: Path) -> str:
    """What it says besides."""
    with safetensors.safe_open(path, framework="np") as file:
        return file.metadata()["document"]


def error(example: ModuleType, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What is printed when the arguments are refused."""
    with pytest.raises(SystemExit) as exit:
        example.main([str(arg) for arg in argv])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_all_optimizers(example):
    assert list(example.OPTIMIZERS) == OPTIMIZERS


def test_backward_against_finite_differences(example):
    rng = np.random.default_rng(0)
    network = example.Network(rng)
    for p in network.parameters:
        p.data = p.data.astype(np.float64)
    x, labels = rng.standard_normal((8, 64)), rng.integers(0, 10, 8)

    def loss() -> float:
        return example.cross_entropy(network.forward(x), labels)[0]

    network.backward(example.cross_entropy(network.forward(x), labels)[1])
    for p in network.parameters:
        start, direction = p.data.copy(), rng.standard_normal(p.data.shape)
        p.data[...] = start + 1e-6 * direction
        above = loss()
        p.data[...] = start - 1e-6 * direction
        slope = (above - loss()) / 2e-6
        p.data[...] = start
        assert slope == pytest.approx((p.grad * direction).sum(), rel=1e-5), p.name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accuracy(name, example, capsys):
    example.main(["--optimizer", name])
    out, err = capsys.readouterr()
    accuracy, optimizer = RESULT.fullmatch(out).groups()
    assert optimizer == name
    assert float(accuracy) >= 97
    assert "20/20" in err and "loss=" in err and "accuracy=" in err


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_bit_for_bit(name, example, tmp_path, capsys):
    straight, half, resumed = (tmp_path / stem for stem in ("straight", "half", "resumed"))
    common = ["--optimizer", name, "--seed", "7"]
    example.main([*common, "--epochs", "6", "--save", str(straight)])
    first = capsys.readouterr().out
    example.main([*common, "--epochs", "3", "--save", str(half)])
    capsys.readouterr()
    example.main([*common, "--epochs", "6", "--resume", str(half), "--save", str(resumed)])
    assert capsys.readouterr().out == first
    a, b = arrays(straight), arrays(resumed)
    assert list(a) == list(b) and len(a) > 5 and document(straight) == document(resumed)
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
        assert a[key].tobytes() == b[key].tobytes(), key
    assert any(a[key].tobytes() != array.tobytes() for key, array in arrays(half).items())


def test_seeds_differ(example, tmp_path):
    for seed in ("0", "1"):
        example.main(["--epochs", "1", "--seed", seed, "--save", str(tmp_path / seed)])
    a, b = arrays(tmp_path / "0"), arrays(tmp_path / "1")
    assert all((a[key] != b[key]).any() for key in a if key.startswith("parameters"))


def test_resume_takes_the_lr_of_the_checkpoint_unless_told(example, tmp_path):
    saved, kept, changed = (str(tmp_path / stem) for stem in ("saved", "kept", "changed"))
    example.main(["--lr", "0.125", "--epochs", "1", "--save", saved])
    example.main(["--epochs", "2", "--resume", saved, "--save", kept])
    example.main(["--lr", "0.25", "--epochs", "2", "--resume", saved, "--save", changed])
    assert re.search(r'"base_lrs": *\[[^]]*0\.125', document(Path(kept)))
    assert re.search(r'"base_lrs": *\[[^]]*0\.25', document(Path(changed)))


def test_plot(example, tmp_path):
    path = tmp_path / "curve.png"
    example.main(["--epochs", "2", "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_command_line(tmp_path):
    script = [sys.executable, str(SCRIPT), "--epochs", "1"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert RESULT.fullmatch(done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lr", ["-0.5", "nan", "inf", "much"])
def test_bad_lr(lr, example, capsys):
    assert re.search(rf"error: .*\blr\b.*{lr}", error(example, capsys, "--lr", lr))


@pytest.mark.parametrize(("option", "value"), [("seed", -1), ("epochs", 0), ("epochs", -3)])
def test_bad_numbers(option, value, example, capsys):
    assert f"{option} == {value}, must be >= " in error(example, capsys, f"--{option}", value)


def test_unknown_optimizer(example, capsys):
    assert "invalid choice: 'Adamant'" in error(example, capsys, "--optimizer", "Adamant")


@pytest.fixture(scope="module")
def checkpoint(example, tmp_path_factory) -> Path:
    """Two epochs of AdamW, whose state Adam itself would accept."""
    path = tmp_path_factory.mktemp("checkpoint") / "adamw.safetensors"
    example.main(["--optimizer", "AdamW", "--epochs", "2", "--save", str(path)])
    return path


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_checkpoint_of_another_optimizer(name, example, checkpoint, capsys):
    message = error(example, capsys, "--optimizer", name, "--resume", checkpoint)
    assert f"cannot resume from {checkpoint}: " in message and "AdamW" in message and name in message


def test_checkpoint_of_another_run(example, checkpoint, capsys, monkeypatch):
    common = ["--optimizer", "AdamW", "--resume", checkpoint]
    assert "its seed is 0, not 1" in error(example, capsys, *common, "--seed", 1)
    assert "epochs == 1, must be >= 2" in error(example, capsys, *common, "--epochs", 1)
    monkeypatch.setattr(example, "HIDDEN", 128)
    assert "shape (64, 256)" in error(example, capsys, *common)


def test_no_checkpoint(example, checkpoint, tmp_path, capsys):
    truncated, text, other, single, objects = (tmp_path / name for name in ("truncated", "text", "other", "a.npy", "o"))
    truncated.write_bytes(checkpoint.read_bytes()[:-1000])
    text.write_text("no such file")
    safetensors.numpy.save_file({"weights": np.zeros(3)}, other)
    np.save(single, np.zeros(3))
    with open(objects, "wb") as file:
        np.savez(file, json=np.array({"run": None}, dtype=object))
    for path in (truncated, text, other, single, objects, tmp_path / "missing", tmp_path):
        assert f"error: cannot resume from {path}: " in error(example, capsys, "--resume", path)
