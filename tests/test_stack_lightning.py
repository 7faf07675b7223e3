"""Lightning with pyopt.torch: clipping in every precision, resume, schedules, manual optimization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stacks import need

need("lightning", "torch")

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import pyopt.torch as optim

pytestmark = pytest.mark.filterwarnings("default")  # of Lightning's own
STEPS = 10
DATA = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))


class Network(lightning.LightningModule):
    """8 numbers to their sum."""

    def __init__(self, cls: Any, manual: bool = False) -> None:
        super().__init__()
        self.cls = cls
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.automatic_optimization = not manual
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        loss = (self.layers(batch[0])[:, 0] - batch[0].sum(1)).square().mean()
        self.losses.append(float(loss))
        if not self.automatic_optimization:
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            schedule.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.cls(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA.to(self.dtype)), batch_size=4)


def fit(path: Path, cls: Any, steps: int = STEPS, manual: bool = False, resume: Any = None, **options: Any) -> Any:
    lightning.seed_everything(0, verbose=False)
    network = Network(cls, manual)
    usual: dict[str, Any] = {
        "enable_checkpointing": False,
        "max_epochs": -1,
        **({} if manual else {"gradient_clip_val": 0.5}),
    }
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        **{**usual, **options},
    )
    trainer.fit(network, ckpt_path=resume)
    return network


def weights(network: Any) -> list[Any]:
    return [p.detach().clone() for p in network.parameters()]


PRECISIONS = ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true"]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clips_in_every_precision(precision: str, algorithm: str, tmp_path: Path) -> None:
    """Losses and weights are those with torch's Adam."""
    options = {"precision": precision, "gradient_clip_algorithm": algorithm}
    ours, theirs = (fit(tmp_path, module.Adam, **options) for module in (optim, torch.optim))
    tolerance = 1e-5 if precision in ("32-true", "64-true") else 0.1
    assert ours.losses == pytest.approx(theirs.losses, rel=tolerance)
    assert ours.losses[-1] < ours.losses[0]
    if tolerance < 0.1:
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resumes_bit_for_bit(manual: bool, precision: str, tmp_path: Path) -> None:
    """Resumed from the checkpoint behind the first epoch: the same bits."""
    options = {"precision": precision, "max_epochs": 2, "enable_checkpointing": True}
    save = ModelCheckpoint(tmp_path, "{step}", every_n_epochs=1, save_top_k=-1)
    straight = fit(tmp_path, optim.AdamW, -1, manual, callbacks=[save], **options)
    again = fit(tmp_path, optim.AdamW, -1, manual, resume=str(tmp_path / "step=12.ckpt"), **options)
    assert again.losses == straight.losses[12:]
    assert all((a == b).all() for a, b in zip(weights(straight), weights(again), strict=True))


def test_manual_optimization(tmp_path: Path) -> None:
    ours, theirs = (fit(tmp_path, module.Adam, manual=True) for module in (optim, torch.optim))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fabric(precision: str) -> None:
    """The loop of one's own, with Fabric's precision and clipping."""
    found = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        fabric = lightning.Fabric(accelerator="cpu", precision=precision)
        network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        network, optimizer = fabric.setup(network, module.Adam(network.parameters(), lr=0.02))
        losses = []
        for batch in DATA.split(8):
            optimizer.zero_grad()
            loss = (network(batch)[:, 0] - batch.sum(1)).square().mean()
            fabric.backward(loss)
            fabric.clip_gradients(network, optimizer, max_norm=0.5)
            optimizer.step()
            losses.append(float(loss))
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5 if precision == "32-true" else 0.05)
