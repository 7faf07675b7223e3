"""accelerate with pyopt.torch: prepare, clip, accumulate, bfloat16, a schedule, save_state and load_state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stacks import need

need("accelerate", "torch")

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import pyopt.torch as optim

pytestmark = pytest.mark.filterwarnings("default")  # of accelerate's own
DATA = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


class Run:
    """A training of 16 batches, that can be stopped anywhere."""

    def __init__(self, cls: Any, precision: str = "no", accumulate: int = 1) -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        torch.manual_seed(0)
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision=precision,
            gradient_accumulation_steps=accumulate,
            step_scheduler_with_optimizer=True,
        )
        network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        optimizer = cls(network.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        self.network, self.optimizer, self.schedule = self.accelerator.prepare(network, optimizer, schedule)
        self.losses: list[float] = []

    def train(self, first: int, last: int) -> Run:
        for batch in DATA.split(4)[first:last]:
            with self.accelerator.accumulate(self.network):
                loss = (self.network(batch)[:, 0] - batch.sum(1)).square().mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.network.parameters(), 0.5)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.losses.append(float(loss))
        return self

    def weights(self) -> list[Any]:
        return [p.detach().clone() for p in self.network.parameters()]


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_the_result_of_torchs_adamw(options: dict[str, Any]) -> None:
    ours, theirs = (Run(module.AdamW, **options).train(0, 16) for module in (optim, torch.optim))
    assert ours.losses == pytest.approx(theirs.losses, rel=0.05 if "precision" in options else 1e-5)
    if "precision" not in options:
        torch.testing.assert_close(ours.weights(), theirs.weights(), rtol=1e-4, atol=1e-5)
    assert isinstance(ours.optimizer.optimizer, optim.AdamW)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resumes_bit_for_bit(precision: str, tmp_path: Path) -> None:
    straight = Run(optim.AdamW, precision).train(0, 16)
    Run(optim.AdamW, precision).train(0, 7).accelerator.save_state(str(tmp_path))
    again = Run(optim.AdamW, precision)
    again.accelerator.load_state(str(tmp_path))
    again.train(7, 16)
    assert again.losses == straight.losses[7:]
    assert all((a == b).all() for a, b in zip(straight.weights(), again.weights(), strict=True))


def test_explain_looks_through_the_wrapper(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(optim.AdamW).train(0, 1)
    optim.explain(run.optimizer)
    assert capsys.readouterr().out.count("  pyopt  (once it has a gradient)\n") == 4
