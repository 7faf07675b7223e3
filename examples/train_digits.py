"""Train a small network to read handwritten digits: plain NumPy, and pyopt where one would use torch.optim.

python examples/train_digits.py --optimizer Lion --plot curve.png
python examples/train_digits.py --epochs 10 --save half.safetensors
python examples/train_digits.py --resume half.safetensors  # the same, bit for bit, as 20 epochs in one go
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import pyopt

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
HIDDEN, BATCH = 256, 32
WARMUP, HORIZON = 1, 20  # epochs in which the learning rate rises, and at whose end it is down to 0
OPTIMIZERS: dict[str, partial[Any]] = {
    "SGD": partial(pyopt.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(pyopt.Adam, lr=2e-3),
    "AdamW": partial(pyopt.AdamW, lr=2e-3),
    "RMSprop": partial(pyopt.RMSprop, lr=1e-3),
    "Adagrad": partial(pyopt.Adagrad, lr=2e-2),
    "Lion": partial(pyopt.Lion, lr=5e-4),
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


def plot(path: str, name: str, run: dict[str, Any]) -> None:
    """Draw loss, accuracy and learning rate over the epochs."""
    from matplotlib.figure import Figure  # without pyplot it draws with Agg, which needs no display

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    figure.suptitle(f"{name} on handwritten digits")
    epochs = range(1, len(run["loss"]) + 1)
    curves = {
        "training loss (cross-entropy)": run["loss"],
        "test accuracy of the averaged weights (%)": [100 * accuracy for accuracy in run["accuracy"]],
        "learning rate at the end of the epoch": run["lr"],
    }
    for axes, (label, values) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        axes.plot(epochs, values, ".-")
        axes.set(xlabel="epoch", ylabel=label, yscale="log" if "loss" in label else "linear")
        axes.locator_params(axis="x", integer=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, report and keep what the options ask for."""
    defaults = ", ".join(f"{make.keywords['lr']} for {name}" for name, make in OPTIMIZERS.items())
    parser = argparse.ArgumentParser(description="Train a small network to read handwritten digits.")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="Adam", help="default: Adam")
    parser.add_argument("--lr", type=float, help=f"peak learning rate; default: the checkpoint's, or {defaults}")
    parser.add_argument("--epochs", type=int, default=20, help="in total, with those resumed from; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches; default: 0")
    parser.add_argument("--plot", metavar="PNG", help="draw the learning curve")
    parser.add_argument("--save", metavar="FILE", help="write a checkpoint at the end")
    parser.add_argument("--resume", metavar="FILE", help="continue from a checkpoint")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"seed == {args.seed}, must be >= 0")

    x_train, x_test, y_train, y_test = load_data()
    network = Network(np.random.default_rng([args.seed, 0]))
    steps = len(x_train) // BATCH  # the incomplete last batch is dropped
    run: dict[str, Any] = {"seed": args.seed, "loss": [], "accuracy": [], "lr": []}
    try:
        optimizer = OPTIMIZERS[args.optimizer](network.parameters, **({} if args.lr is None else {"lr": args.lr}))
        schedule = pyopt.lr_scheduler.WarmupCosineLR(
            optimizer, warmup_steps=WARMUP * steps, total_steps=HORIZON * steps
        )
        average = pyopt.averaging.EMA(optimizer, decay=0.99, warmup=10)
        if args.resume:
            run = pyopt.load(args.resume, optimizer, schedulers=[schedule], averages=[average])
            if args.lr is not None:
                schedule.base_lrs = [args.lr]
                schedule.step(schedule.last_epoch)
    except (OSError, KeyError, TypeError, ValueError) as error:
        parser.error(f"cannot resume from {args.resume}: {error}" if args.resume else str(error))
    if run["seed"] != args.seed:
        parser.error(f"cannot resume from {args.resume}: its seed is {run['seed']}, not {args.seed}")
    done = len(run["loss"])
    if args.epochs < max(done, 1):
        parser.error(f"epochs == {args.epochs}, must be >= {max(done, 1)}")

    bar = tqdm(range(done + 1, args.epochs + 1), desc=args.optimizer, initial=done, total=args.epochs, unit="epoch")
    for epoch in bar:
        # Seeded by the epoch, so that a checkpoint need not hold a generator.
        order = np.random.default_rng([args.seed, epoch]).permutation(len(x_train))
        losses = []
        for batch in order[: steps * BATCH].reshape(steps, BATCH):
            logits = network.forward(x_train[batch])
            loss, dlogits = cross_entropy(logits, y_train[batch])
            network.backward(dlogits)
            optimizer.step(max_norm=1.0)
            schedule.step()
            losses.append(loss)
        with average.swapped():
            accuracy = float((network.forward(x_test).argmax(axis=1) == y_test).mean())
        run["loss"].append(float(np.mean(losses)))
        run["accuracy"].append(accuracy)
        run["lr"].append(schedule.get_last_lr()[0])
        bar.set_postfix(loss=f"{run['loss'][-1]:.4f}", accuracy=f"{accuracy:.1%}")

    print(f"test accuracy: {100 * run['accuracy'][-1]:.1f} % ({args.optimizer})")
    if args.save:
        pyopt.save(args.save, optimizer, schedulers=[schedule], averages=[average], extra=run)
    if args.plot:
        plot(args.plot, args.optimizer, run)


if __name__ == "__main__":
    main()
