"""What people put around torch's optimizers: schedulers, averaging, clipping, checkpoints, and torch's OpenMP."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyopt
from torch_or_skip import BRIEF, BRIEF_IDS, FIVE, Twins, in_ulps, optim, parameters, random_gradients, torch

from torch.optim import lr_scheduler, swa_utils  # isort: skip

brief = pytest.mark.parametrize(("name", "options"), BRIEF, ids=BRIEF_IDS)
each = pytest.mark.parametrize("name", FIVE)


def new_parameters(dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(5, 4), (33,), ()]
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def two_groups() -> list[dict[str, Any]]:
    params = new_parameters()
    return [{"params": params[:1], "lr": 0.02}, {"params": params[1:]}]


# --- schedulers -------------------------------------------------------------------------------------------------------

STEPS = 12
Make = Callable[[Any], Any]


def sequential(optimizer: Any) -> Any:
    first, second = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 8)
    return lr_scheduler.SequentialLR(optimizer, [first, second], [4])


def chained(optimizer: Any) -> Any:
    schedulers = [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(schedulers, optimizer)


SCHEDULERS: list[tuple[str, Make]] = [
    ("LambdaLR", lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 1 / (1 + e)])),
    ("MultiplicativeLR", lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.95)),
    ("StepLR", lambda o: lr_scheduler.StepLR(o, 3, 0.5)),
    ("MultiStepLR", lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5], 0.5)),
    ("ConstantLR", lambda o: lr_scheduler.ConstantLR(o, 0.25, 4)),
    ("LinearLR", lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6)),
    ("ExponentialLR", lambda o: lr_scheduler.ExponentialLR(o, 0.8)),
    ("PolynomialLR", lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0)),
    ("CosineAnnealingLR", lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 1e-4)),
    ("CosineAnnealingWarmRestarts", lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2)),
    *(
        ("CyclicLR", lambda o, mode=mode, **k: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 3, mode=mode, gamma=0.9, **k))
        for mode in ("triangular", "triangular2", "exp_range")
    ),
    *(
        ("OneCycleLR", lambda o, phase=phase, **k: lr_scheduler.OneCycleLR(o, [0.1, 0.2], STEPS + 1, **phase, **k))
        for phase in ({}, {"anneal_strategy": "linear", "three_phase": True})
    ),
    ("ReduceLROnPlateau", lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1)),
    ("SequentialLR", sequential),
    ("ChainedScheduler", chained),
    ("SWALR", lambda o: swa_utils.SWALR(o, 0.05, 4)),
]
SCHEDULER_IDS = [f"{name}-{i}" for i, (name, _) in enumerate(SCHEDULERS)]
# Their momentum: on the betas of Adam, on the momentum of others, which may have none.
CYCLES_MOMENTUM = {"CyclicLR", "OneCycleLR"}


def test_no_scheduler_is_missing() -> None:
    """A new one of torch's is to be added to the table."""
    base = lr_scheduler.LRScheduler
    classes = {c.__name__ for c in vars(lr_scheduler).values() if isinstance(c, type) and issubclass(c, base)}
    assert classes - {"LRScheduler", "_LRScheduler"} | {"SWALR"} == {name for name, _ in SCHEDULERS}


def hyper(optimizer: Any) -> list[Any]:
    """What schedulers change in the groups."""
    keys = ("lr", "initial_lr", "momentum", "betas", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
    return [{k: g[k] for k in keys if k in g} for g in optimizer.param_groups]


def make(scheduler: tuple[str, Make], optimizer: Any) -> Any:
    cycles = "betas" in optimizer.defaults or optimizer.defaults.get("momentum")
    if scheduler[0] in CYCLES_MOMENTUM and not cycles:
        return scheduler[1](optimizer, cycle_momentum=False)  # type: ignore[call-arg]
    return scheduler[1](optimizer)


def scheduled(twins: Twins, schedulers: list[Any], first: int, last: int) -> None:
    generator = torch.Generator().manual_seed(first)
    for step in range(first, last):
        twins.step(random_gradients(twins.theirs, generator))
        for s in schedulers:
            s.step(*([math.exp(-min(step, 3))] if isinstance(s, lr_scheduler.ReduceLROnPlateau) else []))
        assert hyper(twins.ours) == hyper(twins.theirs), f"after {step} steps"
        assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=SCHEDULER_IDS)
@brief
def test_scheduler(name: str, options: dict[str, Any], scheduler: tuple[str, Make]) -> None:
    """The same learning rates and momenta, the same parameters; torch warns of nothing."""
    twins = Twins(name, two_groups, options)
    schedulers = [make(scheduler, optimizer) for optimizer in twins]
    scheduled(twins, schedulers, 0, STEPS)
    # The last step was seen by the scheduler: no warning of a step in the wrong order, and a state that can be saved.
    assert list(schedulers[0].state_dict()) == list(schedulers[1].state_dict())
    assert [list(g) for g in twins.ours.param_groups] == [list(g) for g in twins.theirs.param_groups]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=SCHEDULER_IDS)
def test_scheduler_resumes(scheduler: tuple[str, Make]) -> None:
    """Optimizer and scheduler from checkpoints, as in a new process; ours from torch's and torch's from ours."""
    twins = Twins("AdamW", two_groups)
    schedulers = [make(scheduler, optimizer) for optimizer in twins]
    scheduled(twins, schedulers, 0, 5)
    again = Twins("AdamW", two_groups)
    again_schedulers = [make(scheduler, optimizer) for optimizer in again]
    for pairs in zip(again.pairs(), twins.pairs(), strict=True):
        for to, source in zip(*pairs, strict=True):
            to.data.copy_(source.data)
    for to, source in ((again.ours, twins.theirs), (again.theirs, twins.ours)):
        to.load_state_dict(copy.deepcopy(source.state_dict()))
    for to, source in zip(again_schedulers, schedulers, strict=True):
        to.load_state_dict(source.state_dict())
    again.steps = 5
    again.largest = twins.largest
    scheduled(again, again_schedulers, 5, STEPS)


@each
def test_scheduler_with_tensor_lr(name: str) -> None:
    """Schedulers fill a tensor lr in place."""
    twins = Twins(name, new_parameters, {"lr": torch.tensor(0.1)})
    lrs = [optimizer.param_groups[0]["lr"] for optimizer in twins]
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in twins]
    scheduled(twins, schedulers, 0, 4)
    assert all(optimizer.param_groups[0]["lr"] is lr for optimizer, lr in zip(twins, lrs, strict=True))


def test_wrong_order_warns() -> None:
    """torch's schedulers notice whether our step has run."""
    optimizer = optim.SGD(new_parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


# --- averaging and clipping -------------------------------------------------------------------------------------------


def network() -> Any:
    torch.manual_seed(0)
    # No bias before the normalization: its gradient is rounding noise, which Adagrad makes large.
    layers = torch.nn.Linear(6, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    return torch.nn.Sequential(*layers).double()


DATA = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(module: Any, name: str, average: Callable[[Any], Any], clip: Callable[[Any], Any]) -> list[Any]:
    model = network()
    averaged = average(model)
    optimizer = getattr(module, name)(model.parameters(), lr=0.02)
    scheduler = swa_utils.SWALR(optimizer, 0.01, 4)
    for batch in DATA.repeat(3, 1, 1):
        optimizer.zero_grad()
        (model(batch).squeeze() - batch.sum(1)).pow(2).mean().backward()
        clip(model.parameters())
        optimizer.step()
        averaged.update_parameters(model)
        scheduler.step()
    swa_utils.update_bn(DATA, averaged)
    return [*model.state_dict().values(), *averaged.state_dict().values(), averaged(DATA[0])]


AVERAGES: list[Callable[[Any], Any]] = [
    swa_utils.AveragedModel,
    lambda m: swa_utils.AveragedModel(m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True),
    lambda m: swa_utils.AveragedModel(m, avg_fn=swa_utils.get_ema_avg_fn(0.9)),
]
CLIPS = [lambda p: torch.nn.utils.clip_grad_norm_(p, 0.5), lambda p: torch.nn.utils.clip_grad_value_(p, 0.1)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@each
def test_averaging_and_clipping(name: str) -> None:
    """A network with batch normalization, trained by autograd in double."""
    for average, clip in zip(AVERAGES, [*CLIPS, CLIPS[0]], strict=True):
        ours, theirs = (trained(module, name, average, clip) for module in (optim, torch.optim))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@brief
def test_clipped(name: str, options: dict[str, Any]) -> None:
    """Clipping scales the gradients in place, step by step."""
    options = {k: v for k, v in options.items() if k != "weight_decay"}
    twins = Twins(name, new_parameters, options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for pair, g in zip(twins.pairs(), random_gradients(twins.theirs, generator), strict=True):
            for p in pair:
                p.grad = g.clone()
        norms = [torch.nn.utils.clip_grad_norm_(parameters(optimizer), 1.0) for optimizer in twins]
        assert norms[0] == norms[1] > 1
        twins.step()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def by_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("transport", [copy.deepcopy, by_file], ids=["memory", "file"])
@brief
def test_checkpoints_change_sides(name: str, options: dict[str, Any], transport: Any) -> None:
    """Every few steps the optimizers of pyopt.torch and torch.optim swap their state_dicts, and go on."""
    twins = Twins(name, two_groups, options)
    for seed in range(4):
        twins.run(3, seed)
        saved = [transport(optimizer.state_dict()) for optimizer in twins]
        for optimizer, state_dict in zip(twins, reversed(saved), strict=True):
            optimizer.load_state_dict(state_dict)
        for optimizer, cls in zip(twins, (getattr(m, name) for m in (optim, torch.optim)), strict=True):
            assert type(optimizer) is cls


@brief
def test_checkpoints_of_fused(name: str, options: dict[str, Any]) -> None:
    """A state_dict of torch's fused (or foreach) optimizer, and ours loaded by one."""
    switch = {"foreach": True} if name == "RMSprop" else {"fused": True}
    twins = Twins(name, two_groups, {**options, **switch})
    for seed in range(3):
        twins.run(2, seed)
        saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in twins]
        for optimizer, state_dict in zip(twins, reversed(saved), strict=True):
            optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "options"), [*BRIEF, ("Lion", {"weight_decay": 0.1})], ids=[*BRIEF_IDS, "Lion"])
def test_checkpoints_travel_to_numpy(name: str, options: dict[str, Any], dtype: Any) -> None:
    """torch.optim -> pyopt (NumPy) -> pyopt.torch -> pyopt -> torch.optim, against torch.optim all the way."""
    modules = [torch.optim, pyopt, optim, pyopt, torch.optim] if name != "Lion" else [optim, pyopt, optim]
    reference = new_parameters(torch.float32 if dtype is np.float32 else torch.float64)
    oracle = getattr(modules[0], name)(reference, **options)
    values = [p.detach().clone().numpy() for p in reference]
    generator = torch.Generator().manual_seed(0)
    largest = [p.detach().abs() for p in reference]
    saved: Any = None
    steps = 0
    for module in modules:
        numpy_side = module is pyopt
        if numpy_side:
            params: list[Any] = [pyopt.Parameter(v) for v in values]
        else:
            params = [torch.nn.Parameter(torch.from_numpy(v)) for v in values]
        optimizer = getattr(module, name)(params, **options)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for _ in range(3):
            for p, q, g in zip(params, reference, random_gradients(oracle, generator), strict=True):
                q.grad = g
                p.grad = g.numpy() if numpy_side else g
            optimizer.step()
            oracle.step()
            steps += 1
            largest = [torch.maximum(big, q.detach().abs()) for big, q in zip(largest, reference, strict=True)]
        for v, q, big in zip(values, reference, largest, strict=True):
            error = in_ulps(torch.from_numpy(v), q, big)
            assert error <= 6 * min(steps, 10), f"{error} ulps off in {module.__name__} after {steps} steps"
        before = optimizer.state_dict()
        saved = optim.to_torch(before) if numpy_side else optim.from_torch(before)
        for a, b in zip(saved["param_groups"], before["param_groups"], strict=True):
            assert a["params"] == b["params"] and a["lr"] == b["lr"]


@brief
def test_old_checkpoints_travel_to_numpy(name: str, options: dict[str, Any]) -> None:
    """Groups without the options that torch got later: they mean there what they mean to torch."""
    reference = new_parameters(torch.float64)
    oracle = getattr(torch.optim, name)(reference, **options)
    for seed in range(2):
        for p, g in zip(reference, random_gradients(oracle, torch.Generator().manual_seed(seed)), strict=True):
            p.grad = g
        oracle.step()
        if seed == 0:
            saved = optim.from_torch(oracle.state_dict())
            for key in ("maximize", "decoupled_weight_decay"):
                saved["param_groups"][0].pop(key, None)
            params = [pyopt.Parameter(p.detach().numpy().copy()) for p in reference]
            optimizer = getattr(pyopt, name)(params, **options)
            optimizer.load_state_dict(saved)
    optimizer.step(grads=[p.grad.numpy() for p in reference])
    for p, q in zip(params, reference, strict=True):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-13)
    assert optimizer.param_groups[0].keys() == getattr(pyopt, name)(params, **options).param_groups[0].keys()


@brief
def test_there_and_back(name: str, options: dict[str, Any]) -> None:
    """to_torch(from_torch(...)) is the same numbers, and what torch saves; nothing is shared, nothing is changed."""
    twins = Twins(name, two_groups, options)
    twins.run(2)
    original = twins.theirs.state_dict()
    kept = copy.deepcopy(original)
    middle = optim.from_torch(original)
    for group in middle["param_groups"]:
        assert not {"foreach", "fused", "capturable", "differentiable"} & set(group)
    for state in middle["state"].values():
        assert all(isinstance(v, int) if k == "step" else type(v) is np.ndarray for k, v in state.items())
    back = optim.to_torch(middle)
    assert list(back["state"]) == list(original["state"])
    for index, state in original["state"].items():
        assert list(back["state"][index]) == list(state)
        for key, value in state.items():
            assert back["state"][index][key].dtype == value.dtype and torch.equal(back["state"][index][key], value)
    by_file(back)
    for state in middle["state"].values():
        for key, value in state.items():
            if key != "step":
                value += 1
    torch.testing.assert_close(twins.theirs.state_dict(), kept, rtol=0, atol=0)


def test_conversion_of_odd_state_dicts() -> None:
    """Tensor hyper-parameters become numbers, names of parameters and keys of schedulers travel."""
    params = [("a", new_parameters()[0]), ("b", new_parameters()[1])]
    optimizer = optim.Adam(params, lr=torch.tensor(0.5), betas=(torch.tensor(0.75), torch.tensor(0.5)))
    lr_scheduler.StepLR(optimizer, 3)
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    (group,) = optim.from_torch(optimizer.state_dict())["param_groups"]
    assert group["lr"] == 0.5 and isinstance(group["lr"], float) and group["betas"] == (0.75, 0.5)
    assert group["param_names"] == ["a", "b"] and float(group["initial_lr"]) == 0.5
    numpy_side = pyopt.Adam([(name, p.detach().numpy()) for name, p in params])
    numpy_side.load_state_dict(optim.from_torch(optimizer.state_dict()))
    assert numpy_side.param_groups[0]["lr"] == 0.5
    torch.set_default_dtype(torch.float64)
    try:
        assert optim.to_torch(numpy_side.state_dict())["state"][0]["step"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# --- the process ------------------------------------------------------------------------------------------------------

IN_BOTH = """
import re, sys
if sys.argv[1] == "torch":
    import torch, pyopt, pyopt.torch
else:
    import pyopt, pyopt.torch, torch
import numpy as np
pyopt.set_num_threads(2)
numpy_side = [np.ones(1 << 20, np.float32)]
pyopt.Adam(numpy_side).step(grads=numpy_side)
p = torch.nn.Parameter(torch.ones(1 << 20))
p.grad = torch.ones(1 << 20)
pyopt.torch.Adam([p]).step()
torch.optim.Adam([p], fused=True).step()
(torch.ones(1 << 20) * 2).sum()
maps = open("/proc/self/maps").read()
print(sorted({path for path in re.findall(r"(/\\S+)$", maps, re.M) if re.search("gomp|iomp|libomp", path)}))
"""


def in_fresh_process(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("first", ["torch", "pyopt"])
def test_one_openmp(first: str) -> None:
    """Whichever is imported first, one OpenMP runtime is mapped when both have worked in parallel."""
    paths = eval(in_fresh_process(IN_BOTH, first))
    assert len(paths) == 1 and "gomp" in Path(paths[0]).name, paths


def test_pyopt_does_not_import_torch() -> None:
    assert in_fresh_process("import sys, pyopt; print('torch' in sys.modules)").strip() == "False"
