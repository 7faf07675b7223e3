"""Whatever is done to an optimizer of pyopt.torch between its steps, it stays with torch's for-loop.

A random walk over two worlds, one with pyopt.torch's class and one with torch's: the same is done to both, and after
each step all parameters and all state agree. They are then made equal in bits, so that a difference is one step's.
PYOPT_EXAMPLES is the number of walks (of up to 40 actions); by hand, with the figures:

    PYOPT_EXAMPLES=5000 pytest -s tests/test_torch_properties.py
"""

from __future__ import annotations

import copy
import mmap
import os
import pickle
import signal
import struct
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from apart import in_child
from test_torch_interruption import ByCall, interrupted
from torch_or_skip import bits, new, optim, outcome, parameters, torch

EXAMPLES = int(os.environ.get("PYOPT_EXAMPLES", "60"))
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.5}),
    ("SGD", {"lr": 0.1, "momentum": 0.5, "dampening": 0.25}),
    ("SGD", {"lr": 0.1, "momentum": 0.5, "nesterov": True}),
    ("Adam", {"lr": 0.1}),
    ("Adam", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.1}),
    ("RMSprop", {"lr": 0.1}),
    ("RMSprop", {"lr": 0.1, "momentum": 0.5}),
    ("RMSprop", {"lr": 0.1, "centered": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
]
# Relative to the largest value of the row: wrong memory is far beyond it, and a step may cancel.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 0.05, torch.float16: 0.05}
SHAPES = [(4,), (2, 3), (3, 2), (1, 3), (0, 3), (), (4, 3), (2, 2, 3), (33,)]
DTYPES = [torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.complex64]

# --- what this process and its parent share ---------------------------------------------------------------------------

NOBODY, OURS, THEIRS = range(3)  # whose step is running


class Figures:
    """Steps, walks, steps that raised, and whose step is running; they outlive a crash of the child."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4 * 8)

    def __getitem__(self, i: int) -> int:
        return struct.unpack_from("q", self.memory, 8 * i)[0]

    def __setitem__(self, i: int, value: int) -> None:
        struct.pack_into("q", self.memory, 8 * i, value)


STEPS, WALKS, RAISED, RUNNING = range(4)
figures = Figures()
log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # the walk that is under way

# --- what is done to a world ------------------------------------------------------------------------------------------


def values(shape: Any, dtype: Any, seed: int) -> Any:
    """Neither small nor large, so that little cancels."""
    x = new(*shape, dtype=torch.float64, seed=seed)
    x = x.sign() * (x.abs() + 0.5)
    return torch.complex(x.float(), -x.float()) if dtype.is_complex else x.to(dtype)


class World:
    """An optimizer and all that can be done to it; the same calls do the same in both worlds."""

    def __init__(self, module: Any, name: str, options: dict[str, Any]) -> None:
        self.module, self.name, self.options = module, name, options
        self.reset()

    def reset(self) -> None:
        params = [torch.nn.Parameter(values(shape, torch.float32, i)) for i, shape in enumerate([(4,), (2, 3), (3,)])]
        self.optimizer = getattr(self.module, self.name)(params, **self.options)
        for i, p in enumerate(params):
            p.grad = values(p.shape, p.dtype, i + 10)

    def row(self, i: int) -> Any:
        params = parameters(self.optimizer)
        return params[i % len(params)]

    def entry(self, i: int, key: int) -> tuple[dict[str, Any], str] | None:
        """The state of a row and one of its names, if it has state."""
        state = self.optimizer.state.get(self.row(i), {})
        names = [k for k, v in state.items() if isinstance(v, torch.Tensor)]
        return (state, names[key % len(names)]) if names else None

    def memory(self, i: int, what: str, key: int) -> Any:
        """A tensor that lies where a row has its parameter, gradient or state."""
        p = self.row(i)
        if what == "parameter":
            return p.detach()
        if what == "grad":
            g = p.grad
            return None if g is None or g.layout is not torch.strided else g
        found = self.entry(i, key)
        return None if found is None else found[0][found[1]]

    def gradient(self, i: int, kind: str, seed: int, j: int, what: str) -> None:
        p = self.row(i)
        shape, dtype = p.shape, p.dtype
        g: Any = None
        if kind == "plain":
            g = values(shape, dtype, seed)
        elif kind == "expanded":
            g = values((1,) * len(shape), dtype, seed).expand(shape)
        elif kind == "transposed":
            g = values(shape[::-1], dtype, seed).permute(*reversed(range(len(shape))))
        elif kind == "every other":
            g = values((*shape, 2), dtype, seed)[..., 0]
        elif kind == "negated":
            g = torch._neg_view(values(shape, dtype, seed))
        elif kind == "imag":
            g = values(shape, torch.complex64, seed).conj().imag
        elif kind == "sparse":
            g = values(shape, dtype, seed)
            tensors = [p, *(t for t in self.optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor))]
            # torch's own step writes beyond the memory where one begins behind the start of its storage.
            g = g.to_sparse() if g.dim() and not any(t.storage_offset() for t in tensors) else g
        elif kind == "zero":
            g = torch.zeros(shape, dtype=dtype)
        elif kind == "shared":
            memory = self.memory(j, what, seed)
            if memory is not None and memory.dtype == dtype:
                if memory.shape == shape:
                    g = memory
                elif memory.is_contiguous() and memory.numel() >= p.numel():
                    g = memory.reshape(-1)[: p.numel()].view(shape)
        elif kind == "kept" and p.grad is not None and p.grad.layout is torch.strided:
            with torch.no_grad():
                p.grad.mul_(0.5)
            return
        if g is None or g.dtype == dtype:
            p.grad = None
            p.grad = g

    def data(self, i: int, kind: str, shape: Any, dtype: Any, seed: int, j: int, state: str) -> None:
        p = self.row(i)
        old = p.data
        if kind == "same":
            p.data = values(p.shape, p.dtype, seed)
        elif kind == "set_":
            with torch.no_grad():
                p.set_(values(p.shape, p.dtype, seed))
        elif kind == "transposed":
            p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data.clone()
        elif kind == "other view":
            p.data = p.data.t() if p.dim() == 2 else p.data.flatten()
        elif kind == "other":
            p.data = values(shape, dtype, seed)
        elif kind == "strided":
            p.data = values((*p.shape, 2), p.dtype, seed)[..., 1]
        elif kind == "negated" and not p.is_complex():
            p.data = torch._neg_view(p.data)
        elif kind == "shared":
            q = self.row(j)
            if q.dtype == p.dtype and q.data.is_contiguous() and q.numel() >= p.numel():
                p.data = q.data.reshape(-1)[q.numel() - p.numel() :].view(p.shape)
        elif kind == "gradient":
            memory = self.memory(j, "grad", 0)
            if memory is not None and memory.dtype == p.dtype and memory.shape == p.shape and 0 not in memory.stride():
                p.data = memory
        if (p.shape, p.dtype) != (old.shape, old.dtype):
            p.grad = values(p.shape, p.dtype, seed)
            if state == "new":
                for key, value in self.optimizer.state.get(p, {}).items():
                    if key != "step" and isinstance(value, torch.Tensor):
                        self.optimizer.state[p][key] = values(p.shape, p.dtype, seed + 1).abs()
            elif state == "dropped" and self.name != "Adagrad":
                self.optimizer.state.pop(p, None)

    def state(self, i: int, key: int, kind: str, seed: int, j: int, what: str) -> None:
        if kind == "dropped":
            if self.name != "Adagrad":
                self.optimizer.state.pop(self.row(i), None)
            return
        found = self.entry(i, key)
        if found is None:
            return
        state, name = found
        value = state[name]
        if kind == "clone":
            state[name] = value.clone()
        elif kind == "detached":
            state[name] = value.detach()
        elif kind == "new":
            state[name] = torch.full_like(value, 3) if name == "step" else values(value.shape, value.dtype, seed).abs()
        elif kind == "transposed" and value.dim() == 2:
            state[name] = value.t().contiguous().t()
        elif kind == "negated" and not value.is_complex() and name != "step":
            state[name] = torch._neg_view(-value)
        elif kind == "dtype":
            state[name] = value.to(torch.float64 if value.dtype == torch.float32 else torch.float32)
        elif kind == "own":
            state["own"] = values((2,), torch.float32, seed)
        elif kind == "shared step":
            other = self.optimizer.state.get(self.row(j), {}).get("step")
            if "step" in state and other is not None:
                state["step"] = other
        elif kind == "shared":
            memory = self.memory(j, what, seed)
            if memory is not None and memory.dtype == value.dtype:
                if memory.shape == value.shape:
                    state[name] = memory
                elif memory.is_contiguous() and memory.numel() >= value.numel() > 0:
                    state[name] = memory.reshape(-1)[: value.numel()].view(value.shape)

    def group(self, kind: str, shape: Any, dtype: Any, seed: int, lr: float) -> None:
        groups = self.optimizer.param_groups
        if kind == "add" and len(parameters(self.optimizer)) < 8:
            p = torch.nn.Parameter(values(shape, dtype, seed))
            p.grad = values(shape, dtype, seed + 1)
            self.optimizer.add_param_group({"params": [p], "lr": lr, "name": "added"})
            if self.name == "Adagrad":
                self.optimizer.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}
        elif kind == "remove" and len(groups) > 1:
            for p in groups.pop(seed % len(groups))["params"]:
                self.optimizer.state.pop(p, None)
        elif kind == "remove, state stays" and len(groups) > 1:
            groups.pop(seed % len(groups))
        elif kind == "lr":
            groups[seed % len(groups)]["lr"] = lr
        elif kind == "tensor lr":
            groups[seed % len(groups)]["lr"] = torch.tensor(lr)
        elif kind == "reverse":
            for group in groups:
                group["params"].reverse()
        elif kind == "requires_grad":
            p = self.row(seed)
            p.requires_grad_(not p.requires_grad)

    def copied(self, how: str) -> None:
        o = self.optimizer
        if how == "state_dict":
            o.load_state_dict(copy.deepcopy(o.state_dict()))
        elif how == "state_dict of its own":
            o.load_state_dict(o.state_dict())
        else:
            grads = [p.grad for p in parameters(o)]
            self.optimizer = copy.deepcopy(o) if how == "deepcopy" else pickle.loads(pickle.dumps(o))
            for p, g in zip(parameters(self.optimizer), grads, strict=True):
                p.grad = None if g is None else g.clone()

    def tensors(self) -> dict[tuple[int, str], Any]:
        result: dict[tuple[int, str], Any] = {}
        for i, p in enumerate(parameters(self.optimizer)):
            result[i, "parameter"] = p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    result[i, key] = value.detach()
        return result

    def gradients(self) -> dict[tuple[int, str], Any]:
        grads = ((i, p.grad) for i, p in enumerate(parameters(self.optimizer)))
        return {(i, "grad"): g.detach() for i, g in grads if g is not None and g.layout is torch.strided}


def real(x: Any) -> Any:
    x = x.detach()
    if x.layout is not torch.strided:  # torch's SGD keeps a sparse gradient as the first momentum
        x = x.to_dense()
    x = x.resolve_neg().resolve_conj()
    return (torch.view_as_real(x) if x.is_complex() else x).double()


def largest_of(*tensors: Any) -> float:
    return max((float(real(t).abs().nan_to_num(0, 0, 0).max()) for t in tensors if t.numel()), default=0.0)


# --- the walk ---------------------------------------------------------------------------------------------------------

rows = st.integers(0, 7)
seeds = st.integers(0, 30)
places = st.sampled_from(["parameter", "grad", "state"])


class Walk(RuleBasedStateMachine):
    @initialize(case=st.sampled_from(CASES))
    def start(self, case: Any) -> None:
        figures[WALKS] += 1
        log.seek(0)
        log.truncate()
        name, options = case
        self.worlds = [World(module, name, options) for module in (optim, torch.optim)]
        self.sane = True
        self.note(f"{name} {options}")

    def note(self, text: str) -> None:
        log.write(text + "\n")
        log.flush()

    def both(self, action: str, *args: Any) -> None:
        self.note(f"{action}{args}")
        found = [outcome(lambda world=world: getattr(world, action)(*args)) for world in self.worlds]
        ours, theirs = (None if f is None else f[0] for f in found)
        assert ours == theirs, f"{action}: {found}"
        if theirs is not None:
            self.reset()

    def alike(self, j: int, what: str, key: int) -> bool:
        """Whether a memory has one layout in both worlds: torch's first momentum has its gradient's, ours p's."""
        first, second = (world.memory(j, what, key) for world in self.worlds)
        return first is not None and second is not None and first.stride() == second.stride()

    def reset(self) -> None:
        for world in self.worlds:
            world.reset()
        self.sane = True

    @rule(
        i=rows,
        kind=st.sampled_from(
            [
                *["none", "plain", "expanded", "transposed", "every other", "negated", "imag"],
                *["sparse", "zero", "shared", "shared", "kept"],
            ]
        ),
        seed=seeds,
        j=rows,
        what=places,
    )
    def gradient(self, i: int, kind: str, seed: int, j: int, what: str) -> None:
        if kind == "shared" and not self.alike(j, what, seed):
            return
        self.sane &= kind not in ("sparse", "shared")
        self.both("gradient", i, kind, seed, j, what)

    @rule(
        i=rows,
        kind=st.sampled_from(
            ["same", "set_", "transposed", "other view", "other", "strided", "negated", "shared", "gradient"]
        ),
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(DTYPES),
        seed=seeds,
        j=rows,
        state=st.sampled_from(["new", "new", "dropped", "dropped", "stays"]),
    )
    def data(self, i: int, kind: str, shape: Any, dtype: Any, seed: int, j: int, state: str) -> None:
        self.sane &= kind in ("same", "set_", "transposed")
        self.both("data", i, kind, shape, dtype, seed, j, state)

    @rule(
        i=rows,
        key=st.integers(0, 3),
        kind=st.sampled_from(
            [
                *["clone", "detached", "new", "transposed", "negated", "dtype", "own"],
                *["shared step", "shared", "shared", "dropped"],
            ]
        ),
        seed=seeds,
        j=rows,
        what=places,
    )
    def state(self, i: int, key: int, kind: str, seed: int, j: int, what: str) -> None:
        if kind == "shared" and not self.alike(j, what, seed):
            return
        self.sane &= kind in ("clone", "new", "transposed", "own")
        self.both("state", i, key, kind, seed, j, what)

    @rule(
        kind=st.sampled_from(
            ["add", "add", "remove", "remove, state stays", "lr", "tensor lr", "reverse", "requires_grad"]
        ),
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(DTYPES),
        seed=seeds,
        lr=st.sampled_from([0.5, 0.25, 0.01]),
    )
    def group(self, kind: str, shape: Any, dtype: Any, seed: int, lr: float) -> None:
        self.sane &= dtype in (torch.float32, torch.float64)
        self.both("group", kind, shape, dtype, seed, lr)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "state_dict", "state_dict of its own"]))
    def copied(self, how: str) -> None:
        self.both("copied", how)

    @rule(n=st.integers(1, 60))
    def interruption(self, n: int) -> None:
        """A step that an exception ends has happened or has not; only where all rows are pyopt's."""
        if not self.sane:
            return
        self.note(f"interruption({n})")
        ours, theirs = self.worlds
        before = {key: bits(t) for key, t in ours.tensors().items()}
        figures[RUNNING] = OURS
        stopped = interrupted(ours.optimizer, ByCall(n))
        figures[RUNNING] = NOBODY
        after = {key: bits(t) for key, t in ours.tensors().items() if key in before}
        same = all(torch.equal(after[key], before[key]) for key in before)
        if stopped and same:
            return
        figures[STEPS] += 1
        limits = self.limits()
        theirs.optimizer.step()
        self.compare(limits)

    @rule()
    def step(self) -> None:
        figures[STEPS] += 1
        self.note("step")
        limits = self.limits()
        found = []
        for who, world in zip((OURS, THEIRS), self.worlds, strict=True):
            self.note("ours" if who == OURS else "theirs")
            figures[RUNNING] = who
            found.append(outcome(world.optimizer.step))
            figures[RUNNING] = NOBODY
        ours, theirs = (None if f is None else f[0] for f in found)
        assert ours == theirs, f"{found}"
        if theirs is not None:
            figures[RAISED] += 1
            self.reset()
        else:
            self.compare(limits)

    step_again = step

    def limits(self) -> dict[int, float]:
        """The largest value of each row before a step."""
        result: dict[int, float] = {}
        for (i, key), t in (*self.worlds[1].tensors().items(), *self.worlds[1].gradients().items()):
            if key != "step":
                result[i] = max(result.get(i, 0.0), largest_of(t))
        return result

    def compare(self, limits: dict[int, float]) -> None:
        ours, theirs = (world.tensors() for world in self.worlds)
        assert list(ours) == list(theirs), "other state than torch's"
        wild = False
        lrs = [group["lr"] for group in self.worlds[1].optimizer.param_groups for _ in group["params"]]
        singles = {i for i, lr in enumerate(lrs) if isinstance(lr, torch.Tensor) and lr.dtype == torch.float32}
        for (i, key), expected in theirs.items():
            actual = ours[i, key]
            where = f"{key} of parameter {i}"
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
            a, e = real(actual), real(expected)
            assert torch.equal(a.isnan(), e.isnan()), f"{where} is {a}, must be {e}"
            fine = e.isfinite()
            wild = wild or not bool(fine.all()) or largest_of(expected) > 1e6
            # A learning rate in a float32 tensor: torch computes with it in float32, also for float64 parameters.
            single = expected.is_complex() or (expected.dtype == torch.float64 and i in singles)
            precision = torch.float32 if single else expected.dtype
            limit = TOLERANCE.get(precision, 0.0) * max(limits.get(i, 0.0), largest_of(expected))
            distance = (a - e)[fine].abs()
            assert bool((distance <= limit).all()), f"{where} is {a}, must be {e}"
        for key, g in self.worlds[1].gradients().items():
            other = real(self.worlds[0].gradients()[key])
            torch.testing.assert_close(other, real(g), rtol=1e-2, atol=1e-2 * limits.get(key[0], 1), equal_nan=True)
        if wild:
            self.reset()
            return
        with torch.no_grad():
            for key, expected in theirs.items():
                ours[key].copy_(expected)
            ours_grads = self.worlds[0].gradients()
            for key, expected in self.worlds[1].gradients().items():
                if 0 not in expected.stride():
                    ours_grads[key].copy_(expected)

    @invariant()
    def same_rows(self) -> None:
        if hasattr(self, "worlds"):
            ours, theirs = self.worlds
            assert len(parameters(ours.optimizer)) == len(parameters(theirs.optimizer))


def walk(examples: int) -> None:
    import warnings

    warnings.simplefilter("ignore")
    how = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=examples <= 200,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    signal.alarm(0 if examples > 200 else 100)
    run_state_machine_as_test(Walk, settings=how)


def walks(run: Callable[[], Any], attempts: int = 20) -> None:
    """Run in a child; torch itself may crash in a rare walk, which says nothing about pyopt."""
    crashes = 0
    for _ in range(attempts):
        found, text = in_child(run)
        log.seek(0)
        if found and "died" in found and figures[RUNNING] == THEIRS:
            crashes += 1
            continue
        print(
            f"\n{figures[STEPS]} steps of {figures[WALKS]} walks, {figures[RAISED]} raised on both sides,"
            f" torch's own crashes: {crashes}"
        )
        if found:
            pytest.fail(f"{found}\n{text[-6000:]}\nThe last walk:\n{log.read()[-4000:]}", pytrace=False)
        return
    pytest.fail("torch itself crashes all the time", pytrace=False)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_stays_with_torch() -> None:
    walks(lambda: walk(EXAMPLES))
