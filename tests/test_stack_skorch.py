"""skorch with pyopt.torch: optimizers with options and groups, pickles, saved parameters, a search."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stacks import need

need("skorch", "torch")

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping, LRScheduler

import pyopt.torch as optim

pytestmark = pytest.mark.filterwarnings("default")  # of skorch's own
X, Y = load_digits(return_X_y=True)
X, Y = (X[:600] / 16).astype(np.float32), Y[:600].astype(np.int64)


def network(cls: Any, epochs: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    callbacks = [
        ("clip", GradientNormClipping(1.0)),
        ("schedule", LRScheduler(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)),
    ]
    return NeuralNetClassifier(
        layers, criterion=torch.nn.CrossEntropyLoss, optimizer=cls, max_epochs=epochs, lr=0.01, batch_size=32,
        iterator_train__shuffle=False, train_split=None, verbose=0, callbacks=callbacks, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["Adam", "SGD", "AdamW"])
def test_the_result_of_torchs(name: str) -> None:
    options = {"optimizer__momentum": 0.9} if name == "SGD" else {"optimizer__weight_decay": 0.01}
    groups = [("0.bias", {"lr": 0.02}), ("2.*", {"lr": 0.005})]
    nets = [
        network(getattr(m, name), optimizer__param_groups=groups, **options).fit(X, Y) for m in (optim, torch.optim)
    ]
    np.testing.assert_allclose(nets[0].predict_proba(X), nets[1].predict_proba(X), atol=1e-5)
    assert nets[0].history[-1, "train_loss"] < nets[0].history[0, "train_loss"]


def test_saved_and_pickled(tmp_path: Path) -> None:
    """Training goes on from both with the bits of one that never stopped; schedules are begun anew by skorch."""
    options = {"callbacks__schedule": None}
    straight = network(optim.AdamW, **options).fit(X, Y)
    straight.partial_fit(X, Y)
    half = network(optim.AdamW, **options).fit(X, Y)
    copies = [pickle.loads(pickle.dumps(half))]
    half.save_params(tmp_path / "p", tmp_path / "o", tmp_path / "h")
    loaded = network(optim.AdamW, **options).initialize()
    loaded.load_params(tmp_path / "p", tmp_path / "o", tmp_path / "h")
    copies.append(loaded)
    for each in copies:
        each.partial_fit(X, Y)
        for a, b in zip(straight.module_.parameters(), each.module_.parameters(), strict=True):
            assert (a == b).all()


def test_search() -> None:
    search = GridSearchCV(network(optim.Adam, 2), {"optimizer": [optim.Adam, optim.Lion], "lr": [1e-2, 1e-3]}, cv=2)
    search.fit(X, Y)
    assert search.best_score_ > 0.5
