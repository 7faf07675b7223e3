"""Train a small network to read handwritten digits: plain NumPy, and pyopt where one would use torch.optim.

python examples/train_digits.py --optimizer Lion --plot curve.png
python examples/train_digits.py --epochs 10 --save half.npz
python examples/train_digits.py --epochs 20 --resume half.npz  # the same, bit for bit, as 20 epochs in one go
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import pyopt

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
HIDDEN, BATCH = 256, 32
OPTIMIZERS: dict[str, partial[Any]] = {
    "SGD": partial(pyopt.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(pyopt.Adam, lr=2e-3),
    "AdamW": partial(pyopt.AdamW, lr=2e-3),
    "RMSprop": partial(pyopt.RMSprop, lr=1e-3),
    "Adagrad": partial(pyopt.Adagrad, lr=2e-2),
    "Lion": partial(pyopt.Lion, lr=2.5e-4),
}


class Network:
    """64 pixels, a hidden layer with ReLU, 10 logits."""

    def __init__(self, rng: np.random.Generator) -> None:
        def he(*shape: int) -> Floats:
            return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / shape[0]))

        self.w1 = pyopt.Parameter(he(64, HIDDEN), name="w1")
        self.b1 = pyopt.Parameter(np.zeros(HIDDEN, np.float32), name="b1")
        self.w2 = pyopt.Parameter(he(HIDDEN, 10), name="w2")
        self.b2 = pyopt.Parameter(np.zeros(10, np.float32), name="b2")
        self.parameters = [self.w1, self.b1, self.w2, self.b2]

    def forward(self, x: Floats) -> Floats:
        """The logits; keeps what `backward` needs."""
        self.x = x
        self.h = np.maximum(x @ self.w1.data + self.b1.data, 0)
        logits: Floats = self.h @ self.w2.data + self.b2.data
        return logits

    def backward(self, dlogits: Floats) -> None:
        """The chain rule, from the gradient of the logits to those of the parameters."""
        self.w2.grad = self.h.T @ dlogits
        self.b2.grad = dlogits.sum(axis=0)
        dh = dlogits @ self.w2.data.T * (self.h > 0)
        self.w1.grad = self.x.T @ dh
        self.b1.grad = dh.sum(axis=0)


def cross_entropy(logits: Floats, labels: Labels) -> tuple[float, Floats]:
    """The mean loss of a batch, and its gradient with respect to the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)  # or exp may overflow
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    true = np.arange(len(labels)), labels
    dlogits = np.exp(log_p)
    dlogits[true] -= 1
    return -float(log_p[true].mean()), dlogits / len(labels)


def load_data() -> tuple[Floats, Floats, Labels, Labels]:
    """Images and labels to train on and to test with: x_train, x_test, y_train, y_test."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split((x / 16).astype(np.float32), y, random_state=0, stratify=y)
    mean = x_train.mean(axis=0)
    return x_train - mean, x_test - mean, y_train, y_test


def save_checkpoint(path: str, network: Network, optimizer: pyopt.Optimizer, run: dict[str, Any]) -> None:
    """Write an .npz file without pickle: one JSON string, and the arrays that it refers to."""
    arrays: dict[str, Any] = {}

    def refer(array: NDArray[Any]) -> dict[str, str]:
        arrays[name := f"array{len(arrays)}"] = array
        return {"array": name}

    parameters = {p.name: p.data for p in network.parameters}
    text = json.dumps({"run": run, "parameters": parameters, "optimizer": optimizer.state_dict()}, default=refer)
    with open(path, "wb") as file:  # savez would append .npz to a mere path
        np.savez(file, json=text, **arrays)


def load_checkpoint(path: str, network: Network, optimizer: pyopt.Optimizer, run: dict[str, Any]) -> None:
    """Continue from a checkpoint; ValueError, with nothing changed, if it does not fit."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            saved = json.loads(str(file["json"]), object_hook=lambda d: file[d["array"]] if "array" in d else d)
        for key in ("optimizer", "seed", "hidden"):
            if saved["run"][key] != run[key]:
                raise ValueError(f"its {key} is {saved['run'][key]}, not {run[key]}")
        state = {int(index): entry for index, entry in saved["optimizer"]["state"].items()}  # JSON made them str
        optimizer.load_state_dict({**saved["optimizer"], "state": state})
    except (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile) as error:
        raise ValueError(f"cannot resume from {path}: {error}") from None
    for p in network.parameters:
        p.data[...] = saved["parameters"][p.name]
    run.update(saved["run"])


def plot(path: str, run: dict[str, Any]) -> None:
    """Draw loss and accuracy over the epochs."""
    from matplotlib.figure import Figure  # without pyplot it draws with Agg, which needs no display

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    figure.suptitle(f"{run['optimizer']} on handwritten digits")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(run["loss"]) + 1)
    left.semilogy(epochs, run["loss"], ".-")
    left.set_ylabel("training loss (cross-entropy)")
    right.plot(epochs, [100 * accuracy for accuracy in run["accuracy"]], ".-")
    right.set_ylabel("test accuracy (%)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, report and keep what the options ask for."""
    defaults = ", ".join(f"{make.keywords['lr']} for {name}" for name, make in OPTIMIZERS.items())
    parser = argparse.ArgumentParser(description="Train a small network to read handwritten digits.")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="Adam", help="default: Adam")
    parser.add_argument("--lr", type=float, help=f"learning rate; default: the checkpoint's, or {defaults}")
    parser.add_argument("--epochs", type=int, default=20, help="in total, with those resumed from; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches; default: 0")
    parser.add_argument("--plot", metavar="PNG", help="draw the learning curve")
    parser.add_argument("--save", metavar="NPZ", help="write a checkpoint at the end")
    parser.add_argument("--resume", metavar="NPZ", help="continue from a checkpoint")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"seed == {args.seed}, must be >= 0")

    x_train, x_test, y_train, y_test = load_data()
    network = Network(np.random.default_rng([args.seed, 0]))
    run = {"optimizer": args.optimizer, "seed": args.seed, "hidden": HIDDEN, "loss": [], "accuracy": []}
    lr = {} if args.lr is None else {"lr": args.lr}
    try:
        optimizer = OPTIMIZERS[args.optimizer](network.parameters, **lr)
        if args.resume:
            load_checkpoint(args.resume, network, optimizer, run)
            for group in optimizer.param_groups:
                group.update(lr)
    except ValueError as error:
        parser.error(str(error))
    done = len(run["loss"])
    if args.epochs < max(done, 1):
        parser.error(f"epochs == {args.epochs}, must be >= {max(done, 1)}")

    bar = tqdm(range(done + 1, args.epochs + 1), desc=args.optimizer, initial=done, total=args.epochs, unit="epoch")
    for epoch in bar:
        # Seeded by the epoch, so that a checkpoint need not hold a generator; the incomplete last batch is dropped.
        order = np.random.default_rng([args.seed, epoch]).permutation(len(x_train))
        losses = []
        for batch in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            optimizer.zero_grad()
            logits = network.forward(x_train[batch])
            loss, dlogits = cross_entropy(logits, y_train[batch])
            network.backward(dlogits)
            optimizer.step()
            losses.append(loss)
        accuracy = float((network.forward(x_test).argmax(axis=1) == y_test).mean())
        run["loss"].append(float(np.mean(losses)))
        run["accuracy"].append(accuracy)
        bar.set_postfix(loss=f"{run['loss'][-1]:.4f}", accuracy=f"{accuracy:.1%}")

    print(f"test accuracy: {100 * run['accuracy'][-1]:.1f} % ({args.optimizer})")
    if args.save:
        save_checkpoint(args.save, network, optimizer, run)
    if args.plot:
        plot(args.plot, run)


if __name__ == "__main__":
    main()
