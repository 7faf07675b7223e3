"""pyopt.mpi on 1, 2 and 3 ranks: the cases are in tests/mpi_program.py."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stacks import need

need("mpi4py")

import pyopt
from mpi_program import digest, gradients, groups, in_order, model

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "mpi_program.py"
MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
SECONDS = 300  # a rank that waits for ever ends with an error


def launch(ranks: int, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program on so many ranks, as its users do."""
    open_mpi = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    slots = {"OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **open_mpi, **slots, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [str(MPIEXEC), "-n", str(ranks), sys.executable, "-m", "mpi4py", str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=ROOT)


def ran(ranks: int, *arguments: str) -> str:
    result = launch(ranks, PROGRAM, *arguments)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip()


def test_the_same_bits_for_any_number_of_ranks() -> None:
    """Every case on 1, 2 and 3 ranks; given the same gradients, each optimizer ends with the same bits."""
    results = [ran(ranks, "all") for ranks in (1, 2, 3)]
    assert len(results[0].split()) == 6
    assert results[0] == results[1] == results[2]


def test_checkpoints_change_the_number_of_ranks(tmp_path: Path) -> None:
    """2 ranks, then 3, then 1, then a process without MPI, through a file: the bits of a run that never stopped."""
    path = str(tmp_path / "run.safetensors")
    found = [ran(ranks, "trained", path, *map(str, steps)) for ranks, *steps in ((2, 0, 3), (3, 3, 6), (1, 6, 8))]
    params = model()
    optimizer = pyopt.AdamW(groups(params), lr=0.02)
    schedule = pyopt.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(9):
        optimizer.step(grads=in_order(gradients(params, step), params))
        schedule.step()
        if step in (3, 6, 8):  # what the runs go on to after they have saved
            assert digest(params) == found.pop(0)
    loaded = model(5)
    twin = pyopt.AdamW(groups(loaded))
    schedule = pyopt.lr_scheduler.CosineAnnealingLR(twin, T_max=20)
    assert pyopt.load(path, twin, schedulers=[schedule]) == {"step": 8, "list": [1, 2]}
    twin.step(grads=in_order(gradients(loaded, 8), loaded))
    assert digest(loaded) == digest(params)


def test_an_error_outside_ends_all_ranks() -> None:
    """`python -m mpi4py` ends the ranks that wait for one that has ended with an error."""
    result = launch(2, PROGRAM, "alone")
    assert result.returncode != 0
    assert "on one rank alone" in result.stderr


def test_example(tmp_path: Path) -> None:
    """It trains, on 2 ranks and then on 3 from the checkpoint."""
    example, path = ROOT / "examples" / "train_digits_mpi.py", str(tmp_path / "run.safetensors")
    first = launch(2, example, "--epochs", "2", "--save", path)
    assert first.returncode == 0, first.stderr[-4000:]
    second = launch(3, example, "--epochs", "4", "--resume", path)
    assert second.returncode == 0, second.stderr[-4000:]
    accuracy = float(second.stdout.split("test accuracy: ")[1].split()[0])
    assert accuracy > 90


def test_docstrings() -> None:
    import pyopt.mpi

    result = doctest.testmod(pyopt.mpi, extraglobs={"np": np})
    assert result.attempted and not result.failed


@pytest.mark.parametrize("reduce", ["max", None])
def test_average_gradients_of_a_wrong_kind(reduce: str | None) -> None:
    from mpi4py import MPI

    from pyopt.mpi import average_gradients

    with pytest.raises(ValueError, match=f"reduce == {reduce!r}, must be 'mean' or 'sum'"):
        average_gradients(MPI.COMM_SELF, [np.ones(2)], reduce=reduce)  # type: ignore[arg-type]
