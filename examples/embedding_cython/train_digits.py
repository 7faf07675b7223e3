"""Train the digits network by the trainer in Cython: `python train_digits.py --epochs 10 --threads 2`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from digits_trainer import Trainer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main(argv: Sequence[str] | None = None) -> float:
    """Train and report; returns the accuracy on the images that were not trained on."""
    parser = argparse.ArgumentParser(description="Train a small network without Python in its loop.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of a step, at most")
    args = parser.parse_args(argv)
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split((x / 16).astype(np.float32), y, random_state=0, stratify=y)
    mean = x_train.mean(axis=0)
    x_train, x_test = (np.ascontiguousarray(images - mean) for images in (x_train, x_test))
    y_train, y_test = y_train.astype(np.int32), y_test.astype(np.int32)
    trainer = Trainer(threads=args.threads)
    for epoch in range(1, args.epochs + 1):
        order = np.random.default_rng(epoch).permutation(len(x_train)).astype(np.int32)
        loss = trainer.epoch(x_train, y_train, order)
        accuracy = trainer.accuracy(x_test, y_test)
        print(f"epoch {epoch:2}: loss {loss:.4f}, test accuracy {accuracy:.1%}")
    return float(accuracy)


if __name__ == "__main__":
    main()
