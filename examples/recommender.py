"""Train a two-tower recommender on tables with sparse gradients, with pyopt's optimizers and with torch's own.

`python examples/recommender.py` needs torch and tqdm (`pip install '.[torch,examples]'`). The ratings are made: users
and items have tastes, a few items are popular, and of each user's items the last is kept for the test. The user's tower
is an embedding of the user and the mean of those of the items seen, the item's tower an embedding; a batch is trained
against itself: each user's next item against those of the others. The tables take SparseAdam, or another optimizer of
tables, the layers AdamW. It prints how often the kept item is among the first ten of a hundred, before and after, and
the time of a step, all of it and the part of the optimizers.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import pyopt
import pyopt.torch as optim

SEEN = 12  # items of a user's history that the model looks at
WIDTH = 64
AMONG, FIRST = 100, 10


@dataclass
class Ratings:
    """Which items each user has liked, oldest first: the last one is for the test."""

    items: int
    liked: torch.Tensor  # (users, SEEN + 2)


def make_ratings(users: int, items: int, seed: int = 0) -> Ratings:
    """Users choose among items by taste and popularity."""
    generator = torch.Generator().manual_seed(seed)
    tastes, kinds = (torch.randn(n, 8, generator=generator) for n in (users, items))
    popularity = -0.5 * torch.log1p(torch.randperm(items, generator=generator).float())
    liked = torch.empty(users, SEEN + 2, dtype=torch.int64)
    for begin in range(0, users, 1024):
        score = 1.5 * tastes[begin : begin + 1024] @ kinds.T + popularity
        noise = -torch.log(-torch.log(torch.rand(score.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
        chosen = (score + noise).topk(SEEN + 2, dim=1).indices  # a draw without replacement
        order = torch.rand(chosen.shape, generator=generator).argsort(1)
        liked[begin : begin + 1024] = chosen.gather(1, order)
    return Ratings(items, liked)


class Recommender(nn.Module):
    """Scores of items for users, by the products of what the two towers make of them."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.users = nn.Embedding(users, WIDTH, sparse=True)
        self.history = nn.EmbeddingBag(items, WIDTH, mode="mean", sparse=True)
        self.items = nn.Embedding(items, WIDTH, sparse=True)
        for table in (self.users, self.history, self.items):
            nn.init.normal_(table.weight, std=0.1)
        self.tower = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def of_users(self, users: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.tower(torch.cat([self.users(users), self.history(seen)], 1))
        return result

    def tables(self) -> list[nn.Parameter]:
        return [table.weight for table in (self.users, self.history, self.items)]


@torch.no_grad()
def hit_rate(model: Recommender, ratings: Ratings) -> float:
    """How often the item that was kept is among the first of so many drawn ones."""
    users = torch.arange(len(ratings.liked))
    generator = torch.Generator().manual_seed(1)
    others = torch.randint(ratings.items, (len(users), AMONG - 1), generator=generator)
    among = torch.cat([ratings.liked[:, -1:], others], 1)
    hits = 0
    for part in users.split(1024):
        own = model.of_users(part, ratings.liked[part, 1 : SEEN + 1])
        scores = (model.items(among[part]) @ own[:, :, None]).squeeze(2)
        hits += int(((scores[:, 1:] >= scores[:, :1]).sum(1) < FIRST).sum())
    return hits / len(users)


def train(module: Any, ratings: Ratings, args: argparse.Namespace) -> None:
    """Train a model with the optimizers of a module, and print what came of it."""
    torch.manual_seed(0)
    model = Recommender(len(ratings.liked), ratings.items)
    optimizers = [
        getattr(module, args.optimizer)(model.tables(), lr=args.lr),
        module.AdamW(model.tower.parameters(), lr=1e-3),
    ]
    before = hit_rate(model, ratings)
    whole, own = [], []
    name = module.__name__
    for epoch in range(args.epochs):
        order = torch.randperm(len(ratings.liked), generator=torch.Generator().manual_seed(epoch))
        for users in (bar := tqdm(order.split(args.batch), desc=f"{name}, epoch {epoch + 1}")):
            begin = perf_counter()
            liked = ratings.liked[users]
            scores = model.of_users(users, liked[:, :SEEN]) @ model.items(liked[:, SEEN]).T
            loss = nn.functional.cross_entropy(scores, torch.arange(len(users)))
            loss.backward()
            middle = perf_counter()
            for optimizer in optimizers:
                optimizer.step()
            own.append(perf_counter() - middle)
            for optimizer in optimizers:
                optimizer.zero_grad()
            whole.append(perf_counter() - begin)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    print(
        f"{name}: hit rate {before:.3f} before, {hit_rate(model, ratings):.3f} after; "
        f"{median(whole) * 1e3:.2f} ms a step, of which the optimizers {median(own) * 1e3:.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--optimizer", choices=["SparseAdam", "Adagrad", "SGD", "RowwiseAdagrad"], default="SparseAdam")
    parser.add_argument("--threads", type=int, default=pyopt.get_num_threads())
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    torch.set_num_threads(args.threads)
    pyopt.set_num_threads(args.threads)
    ratings = make_ratings(args.users, args.items)
    for module in (optim, torch.optim):
        if hasattr(module, args.optimizer):  # torch has no RowwiseAdagrad
            train(module, ratings, args)


if __name__ == "__main__":
    main()
