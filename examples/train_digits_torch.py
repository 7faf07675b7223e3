"""Train a small CNN to read handwritten digits: PyTorch on CPU, with pyopt.torch where one would use torch.optim.

python examples/train_digits_torch.py --optimizer RMSprop --plot curve.png
python examples/train_digits_torch.py --optim torch  # the same with torch.optim, to compare
torchrun --nproc-per-node=2 examples/train_digits_torch.py --epochs 5 --save half.pt  # DDP: half of each batch each
torchrun --nproc-per-node=2 examples/train_digits_torch.py --resume half.pt --zero  # and half of the optimizer's state
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

# Before init_process_group: imported later, defaults of functions in this hold the group, whose threads then outlive
# destroy_process_group and may abort the process at its exit.
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import pyopt.torch

BATCH = 32  # of all processes together
WARMUP, HORIZON = 1, 15  # epochs in which the learning rate rises, and at whose end it is down to 0
LIBRARIES: dict[str, Any] = {"pyopt": pyopt.torch, "torch": torch.optim}  # a program of yours imports one of them
OPTIMIZERS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 2e-3},
    "AdamW": {"lr": 2e-3},
    "RMSprop": {"lr": 1e-3},
    "Adagrad": {"lr": 3e-2},
}


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Images of 1 x 8 x 8 and their labels, to train on and to test with."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0, stratify=y)
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)


def make_network(seed: int) -> nn.Sequential:
    """Two convolutions, 10 logits; smooth, for a ReLU can amplify a rounding error ten-thousandfold in one step."""
    torch.manual_seed(seed)
    first, second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1, stride=2)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def load_checkpoint(path: str, network: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, run: Any) -> None:
    """Continue from a checkpoint, of however many processes, of either library; ValueError if it does not fit."""
    try:
        saved = torch.load(path, weights_only=True)
        for key in ("optimizer", "seed"):
            if saved["run"][key] != run[key]:
                raise ValueError(f"its {key} is {saved['run'][key]}, not {run[key]}")
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["state"])
        schedule.load_state_dict(saved["schedule"])
        run.update(saved["run"])
    except (OSError, EOFError, LookupError, TypeError, ValueError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"cannot resume from {path}: {error}") from None


def plot(path: str, run: dict[str, Any]) -> None:
    """Draw the loss over the steps and the accuracy over the epochs."""
    from matplotlib.figure import Figure  # without pyplot it draws with Agg, which needs no display

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    figure.suptitle(f"{run['optimizer']} on handwritten digits")
    left, right = figure.subplots(1, 2)
    left.semilogy(range(1, len(run["losses"]) + 1), run["losses"], linewidth=0.8)
    left.set(xlabel="step", ylabel="training loss (cross-entropy)")
    epochs = range(1, len(run["accuracy"]) + 1)
    right.plot(epochs, [100 * accuracy for accuracy in run["accuracy"]], ".-")
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    right.locator_params(axis="x", integer=True)
    figure.savefig(path, dpi=150)


def train(parser: argparse.ArgumentParser, args: argparse.Namespace, rank: int, world: int) -> None:
    """What each of the processes does; the first one also reports."""
    train_set, test_set = load_data()
    # The order depends on seed and epoch only, and its images are dealt out in turn: together, however many processes
    # have the same batches.
    sampler: DistributedSampler[Any] = DistributedSampler(train_set, world, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(train_set, BATCH // world, sampler=sampler, drop_last=True)
    x_test, y_test = test_set.tensors
    network = make_network(args.seed)
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    loss_function = nn.CrossEntropyLoss()

    run: dict[str, Any] = {"optimizer": args.optimizer, "seed": args.seed, "losses": [], "accuracy": []}
    make: Any = getattr(LIBRARIES[args.optim], args.optimizer)
    if args.zero:
        make = partial(ZeroRedundancyOptimizer, optimizer_class=make)
    lr = {} if args.lr is None else {"lr": args.lr}
    try:
        optimizer = make(model.parameters(), **OPTIMIZERS[args.optimizer] | lr)
        steps = len(loader)
        schedule = pyopt.lr_scheduler.WarmupCosineLR(optimizer, WARMUP * steps, HORIZON * steps)
        if args.resume:
            load_checkpoint(args.resume, network, optimizer, schedule, run)
            if lr:
                schedule.base_lrs = [args.lr]
                schedule.step(schedule.last_epoch)
    except ValueError as error:
        parser.error(str(error))
    done = len(run["accuracy"])
    if args.epochs < max(done, 1):
        parser.error(f"epochs == {args.epochs}, must be >= {max(done, 1)}")

    epochs = range(done + 1, args.epochs + 1)
    bar = tqdm(epochs, args.optimizer, initial=done, total=args.epochs, unit="epoch", disable=rank > 0)
    for epoch in bar:
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            logits = model(x)
            loss = loss_function(logits, y)
            loss.backward()
            pyopt.torch.clip_grad_norm_(network.parameters(), 1.0)  # not step(max_norm=1): ZeRO steps a part of them
            optimizer.step()
            schedule.step()
            run["losses"].append(loss.item())
        if rank == 0:
            with torch.no_grad():
                accuracy = (network(x_test).argmax(dim=1) == y_test).float().mean().item()
            run["accuracy"].append(accuracy)
            bar.set_postfix(loss=f"{run['losses'][-1]:.4f}", accuracy=f"{accuracy:.1%}")

    if args.save and args.zero:
        optimizer.consolidate_state_dict(to=0)  # every process takes part
    if rank == 0:
        print(f"test accuracy: {100 * run['accuracy'][-1]:.1f} % ({args.optimizer})")
        if args.save:
            states = {"state": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save({"run": run, "network": network.state_dict(), **states}, args.save)
        if args.losses:
            with open(args.losses, "w") as file:
                json.dump(run["losses"], file)
        if args.plot:
            plot(args.plot, run)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, alone or as one of torchrun's processes, and report and keep what the options ask for."""
    defaults = ", ".join(f"{options['lr']} for {name}" for name, options in OPTIMIZERS.items())
    parser = argparse.ArgumentParser(description="Train a small CNN to read handwritten digits.")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW", help="default: AdamW")
    parser.add_argument("--lr", type=float, help=f"peak learning rate; default: the checkpoint's, or {defaults}")
    parser.add_argument("--epochs", type=int, default=15, help="in total, with those resumed from; default: 15")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches; default: 0")
    parser.add_argument("--optim", choices=LIBRARIES, default="pyopt", help="whose optimizer; default: pyopt")
    parser.add_argument("--zero", action="store_true", help="shard the optimizer's state over torchrun's processes")
    parser.add_argument("--plot", metavar="PNG", help="draw the learning curve")
    parser.add_argument("--save", metavar="PT", help="write a checkpoint at the end")
    parser.add_argument("--resume", metavar="PT", help="continue from a checkpoint")
    parser.add_argument("--losses", metavar="JSON", help="write the loss of each step (the first process's)")
    args = parser.parse_args(argv)
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ  # torchrun sets them
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if distributed else (0, 1)
    if args.seed < 0:
        parser.error(f"seed == {args.seed}, must be >= 0")
    if args.zero and not distributed:
        parser.error("zero shards over several processes: start this with torchrun")
    if BATCH % world:
        parser.error(f"{world} processes cannot share batches of {BATCH} equally")

    torch.set_num_threads(1)  # faster for a network as small as this one, and the losses do not depend on the machine
    if distributed:
        dist.init_process_group("gloo")
    try:
        train(parser, args, rank, world)
    finally:
        if distributed:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
