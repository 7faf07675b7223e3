"""Code as users write it, for mypy --strict and pyright: every public name, and what it returns.

`assert_type` says what a type checker must see; tests/test_typing.py also runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import pyopt
from pyopt import averaging, lr_scheduler


class SignSGD(pyopt.Optimizer):
    """An optimizer of one's own."""

    def __init__(self, params: list[pyopt.Parameter], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def update(self, p: NDArray[Any], g: NDArray[Any], state: dict[str, Any], group: dict[str, Any]) -> None:
        p -= group["lr"] * np.sign(g)


class InverseRoot(lr_scheduler.LRScheduler):
    """A schedule of one's own."""

    def factor_at(self, step: int) -> float:
        return float((1 + step) ** -0.5)


def train(directory: Path) -> float:
    """A loop with all that goes around it."""
    w = pyopt.Parameter(np.zeros(3, np.float32), name="w")
    b = pyopt.Parameter(np.zeros((), np.float32), grad=None)
    optimizer = pyopt.AdamW([{"params": [w], "lr": 0.1}, {"params": [b]}], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    scheduler = lr_scheduler.WarmupCosineLR(optimizer, warmup_steps=1, total_steps=10)
    ema = averaging.EMA(optimizer, decay=0.9, warmup=10)
    handle = optimizer.register_step_post_hook(lambda opt, args, kwargs: None)
    for _ in range(3):
        optimizer.zero_grad()
        w.grad = w.data - 1
        b.grad = b.data - 1
        optimizer.step(max_norm=1.0, nonfinite="skip", zero_grad=True, gradient_factor=0.5)
        scheduler.step()
    handle.remove()
    assert_type(scheduler.get_last_lr(), list[float])
    assert_type(optimizer.last_grad_norm, float | None)
    assert_type(optimizer.skipped_steps, int)
    assert_type(optimizer.state_dict(), dict[str, Any])
    assert_type(ema.averages, list[Any])
    with ema.swapped():
        assert_type(w.shape, tuple[int, ...])
    path = directory / "run.safetensors"
    pyopt.save(path, optimizer, schedulers=[scheduler], averages=[ema], extra={"epoch": 3})
    extra = pyopt.load(path, optimizer, schedulers=[scheduler], averages=[ema])
    optimizer.load_state_dict(optimizer.state_dict())
    return float(extra["epoch"])


def other_ways() -> None:
    """Mappings, bare arrays, closures, functions."""
    model = {"w": np.zeros(3), "head": {"b": np.zeros(3)}}
    pyopt.Adam(model).step(grads={"w": None, "head": {"b": np.ones(3)}})
    pyopt.AdamW(pyopt.no_decay(model), lr=1e-3)
    pyopt.SGD([np.zeros(3)], lr=0.1, momentum=0.9, nesterov=True).step(grads=[np.ones(3)])
    w = pyopt.Parameter(np.ones(3), grad=np.ones(3))
    loss = pyopt.LBFGS([w], max_iter=2, line_search_fn="strong_wolfe").step(lambda: 0.0)
    assert_type(loss, Any)
    SignSGD([w]).step()
    schedule = lr_scheduler.SequentialLR(
        (optimizer := pyopt.Muon([np.zeros((2, 2))])),
        [InverseRoot(optimizer), lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)],
        milestones=[3],
    )
    schedule.load_state_dict(schedule.state_dict())
    assert_type(pyopt.clip_grad_norm_([w], max_norm=1.0), float)
    assert_type(pyopt.get_total_norm([np.ones(3), None]), float)
    pyopt.clip_grad_value_([w], 0.5)
    pyopt.clip_grads_with_norm_([w], 1.0, 2.0)
    pyopt.set_num_threads(pyopt.get_num_threads())
    with pyopt.num_threads(1):
        assert_type(pyopt.get_num_threads(), int)
    assert_type(pyopt.set_flush_denormal(False), bool)
    assert_type(pyopt.get_flush_denormal(), bool)
    assert_type(pyopt.show_config(mode="dicts"), dict[str, dict[str, Any]] | None)
    assert_type(pyopt.__version__, str)
    assert_type(pyopt.get_include(), str)
    assert pyopt.c_api_v1 is not None
    table = np.zeros((10, 2), np.float32)
    rows = pyopt.RowSparse(np.array([3, 3]), np.ones((2, 2), np.float32), table.shape)
    pyopt.SparseAdam([table]).step(grads=[rows])
    storage: pyopt.Storage = {"state_dtype": "bfloat16"}
    pyopt.Adam([table], **storage).step(grads=[np.ones_like(table)])


def refused(w: pyopt.Parameter) -> None:
    """What a type checker must not let pass: an ignore without need is an error. Never called."""
    pyopt.Adam([w], betas=0.9)  # type: ignore[arg-type]
    pyopt.Adam([w], learning_rate=0.9)  # type: ignore[call-arg]
    pyopt.Adam([w]).step(max_nrom=1.0)  # type: ignore[call-arg]
    pyopt.Adam([w]).register_step_post_hook(lambda optimizer: None)  # type: ignore[arg-type, misc]
    lr_scheduler.StepLR(pyopt.Adam([w]))  # type: ignore[call-arg]
    averaging.EMA(pyopt.Adam([w]), decay="0.9")  # type: ignore[arg-type]
    pyopt.set_num_threads("2")  # type: ignore[arg-type]


EVERY: list[type[pyopt.Optimizer]] = [
    pyopt.AdaBelief,
    pyopt.Adadelta,
    pyopt.Adafactor,
    pyopt.Adagrad,
    pyopt.Adam,
    pyopt.Adamax,
    pyopt.AdamW,
    pyopt.AdamWScheduleFree,
    pyopt.Adan,
    pyopt.AdEMAMix,
    pyopt.ADOPT,
    pyopt.ASGD,
    pyopt.FTRL,
    pyopt.LAMB,
    pyopt.LARS,
    pyopt.LazyAdamW,
    pyopt.LBFGS,
    pyopt.Lion,
    pyopt.Muon,
    pyopt.MuonAdamW,
    pyopt.NAdam,
    pyopt.Prodigy,
    pyopt.RAdam,
    pyopt.RMSprop,
    pyopt.RowwiseAdagrad,
    pyopt.Rprop,
    pyopt.SGD,
    pyopt.SGDScheduleFree,
    pyopt.SparseAdam,
]
