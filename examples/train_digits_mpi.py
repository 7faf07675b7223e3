"""The network of train_digits.py on several processes: each takes a part of every batch, and keeps a part of the state.

pip install '.[mpi,examples]'
mpiexec -n 3 python -m mpi4py examples/train_digits_mpi.py
mpiexec -n 2 python -m mpi4py examples/train_digits_mpi.py --epochs 5 --save half.safetensors
python examples/train_digits_mpi.py --resume half.safetensors  # on one process, or on any other number of them

`-m mpi4py` ends all processes when one of them ends with an error. The result does not depend on how many there are, up
to the rounding of sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from tqdm import tqdm

import pyopt
from pyopt.mpi import Sharded
from train_digits import BATCH, Network, cross_entropy, load_data


def main(argv: Sequence[str] | None = None) -> None:
    """Train on all ranks, and let rank 0 report."""
    parser = argparse.ArgumentParser(description="Train a small network on several processes.")
    parser.add_argument("--epochs", type=int, default=10, help="in total, with those resumed from; default: 10")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate; default: 0.002")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches; default: 0")
    parser.add_argument("--save", metavar="FILE", help="write a checkpoint at the end")
    parser.add_argument("--resume", metavar="FILE", help="continue from a checkpoint, of any number of processes")
    args = parser.parse_args(argv)

    comm = MPI.COMM_WORLD
    if comm.size > BATCH:
        parser.error(f"there are {comm.size} ranks, must be at most {BATCH}: one per element of a batch")
    x_train, x_test, y_train, y_test = load_data()
    steps = len(x_train) // BATCH
    network = Network(np.random.default_rng([args.seed, 0]))
    optimizer = Sharded(pyopt.AdamW, network.parameters, comm, lr=args.lr)
    schedule = pyopt.lr_scheduler.WarmupCosineLR(optimizer.optimizer, warmup_steps=steps, total_steps=20 * steps)
    run: dict[str, Any] = {"epochs": 0}
    if args.resume:
        run = optimizer.load(args.resume, schedulers=[schedule])

    epochs = range(run["epochs"] + 1, args.epochs + 1)
    bar = tqdm(epochs, desc=f"{comm.size} ranks", unit="epoch", disable=comm.rank > 0)
    for epoch in bar:
        order = np.random.default_rng([args.seed, epoch]).permutation(len(x_train))
        losses = np.zeros(2)  # the sum over this rank's part of all batches, and their number
        for batch in order[: steps * BATCH].reshape(steps, BATCH):
            mine = batch[comm.rank :: comm.size]
            loss, dlogits = cross_entropy(network.forward(x_train[mine]), y_train[mine])
            network.backward(dlogits * np.float32(len(mine) / BATCH))  # of the mean over the whole batch
            optimizer.step(reduce="sum", max_norm=1.0)
            schedule.step()
            losses += loss * len(mine), len(mine)
        comm.Allreduce(MPI.IN_PLACE, losses)
        accuracy = float((network.forward(x_test).argmax(axis=1) == y_test).mean())
        bar.set_postfix(loss=f"{losses[0] / losses[1]:.4f}", accuracy=f"{accuracy:.1%}")
        run = {"epochs": epoch, "accuracy": accuracy}

    if comm.rank == 0:
        print(f"test accuracy: {100 * run['accuracy']:.1f} % ({comm.size} ranks)")
    if args.save:
        optimizer.save(args.save, schedulers=[schedule], extra=run)


if __name__ == "__main__":
    main()
