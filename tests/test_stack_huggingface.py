"""The Trainer of transformers with pyopt.torch: a tiny GPT-2, clipped, in float32 and bfloat16, stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stacks import need

need("transformers", "accelerate", "torch")

import torch
import transformers

import pyopt.torch as optim

STEPS = 8
pytestmark = pytest.mark.filterwarnings("default")  # of transformers' own


def trainer(path: Path, cls: Any, **arguments: Any) -> Any:
    """A new model and Trainer; every rate, clip and decay in play."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    tokens = (torch.arange(64)[:, None] + torch.arange(16)) % 61
    usual = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "warmup_steps": 2,
        "save_steps": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(path), **{**usual, **arguments}),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=(cls, {"lr": 1e-2, "weight_decay": 0.1}),
    )


def weights(trainer: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def of_pyopt(trainer: Any) -> Any:
    optimizer = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)  # within accelerate's


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_the_result_of_torchs_adamw(arguments: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for module in (optim, torch.optim):  # one after the other: both draw from the same generator
        found.append(trainer(tmp_path / module.__name__, module.AdamW, **arguments))
        found[-1].train()
    ours, theirs = found
    assert type(of_pyopt(ours)) is optim.AdamW
    assert {g["weight_decay"] for g in of_pyopt(ours).param_groups} == {0.0, 0.1}  # its groups without decay
    tolerance = 2e-2 if "bf16" in arguments else 1e-5
    assert losses(ours) == pytest.approx(losses(theirs), rel=tolerance)
    assert losses(ours)[-1] < losses(ours)[0]
    if "bf16" not in arguments:
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}], ids=str)
def test_resumes_bit_for_bit(arguments: dict[str, Any], tmp_path: Path) -> None:
    """From its own checkpoint in the middle, and from one of torch's AdamW up to rounding."""
    straight = trainer(tmp_path / "one", optim.AdamW, **arguments)
    straight.train()
    again = trainer(tmp_path / "two", optim.AdamW, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))
    assert all((a == b).all() for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))
    stock = trainer(tmp_path / "stock", torch.optim.AdamW, **arguments)
    stock.train()
    moved = trainer(tmp_path / "moved", optim.AdamW, **arguments)
    moved.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-4"))
    if not arguments:
        torch.testing.assert_close(weights(moved), weights(stock), rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_torch_has_not(tmp_path: Path) -> None:
    each = trainer(tmp_path, optim.Lion, max_steps=30)
    each.optimizer_cls_and_kwargs = (optim.Lion, {"lr": 2e-3, "weight_decay": 0.1})
    each.train()
    assert losses(each)[-1] < losses(each)[0]
