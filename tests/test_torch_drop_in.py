"""pyopt.torch in place of torch.optim: its names, the wrapper of step, wrappers of optimizers, torch.compile, speed's
price paid only where asked for, and what is left to torch."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

import pyopt
from test_torch_mixed import SPARSE_WARNING, UNCOVERED, explained, path_of, uncovered_of
from torch_or_skip import (
    BRIEF,
    ELEVEN,
    FIVE,
    MATRICES,
    Twins,
    brief,
    each,
    new,
    new_parameters,
    optim,
    parameters,
    same_bits,
    small,
    torch,
)

from torch.optim.optimizer import register_optimizer_step_pre_hook  # isort: skip

# --- names ------------------------------------------------------------------------------------------------------------


def test_every_public_name_of_torch_optim() -> None:
    """pyopt's own where it has one, torch's otherwise; by attribute, by import and by star."""
    star: dict[str, Any] = {}
    exec("from pyopt.torch import *", star)
    for name in (n for n in dir(torch.optim) if not n.startswith("_")):
        own = name in (*ELEVEN, *MATRICES, "SparseAdam")
        assert (getattr(optim, name) is getattr(torch.optim, name)) != own, name
        assert name in dir(optim) and star[name] is getattr(optim, name)
    assert {"Lion", "explain", "from_torch", "to_torch"} <= star.keys() & set(dir(optim))
    assert "torch" not in star
    exec("from pyopt.torch import lr_scheduler, swa_utils, Optimizer, SparseAdam, LBFGS")
    with pytest.raises(AttributeError, match=r"'pyopt\.torch' has no attribute 'Adamm'"):
        optim.Adamm  # noqa: B018


def test_a_script_with_one_import_changed() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    averaged = optim.swa_utils.AveragedModel(model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    averaged.update_parameters(model)
    assert isinstance(optimizer, optim.Optimizer) and scheduler.get_last_lr() == [pytest.approx(0.01)]


# --- explain ----------------------------------------------------------------------------------------------------------


class Wrapper:
    """As accelerate's AcceleratedOptimizer, HF's and Lightning's, or as ZeroRedundancyOptimizer."""

    def __init__(self, name: str, inner: Any) -> None:
        setattr(self, name, inner)


@pytest.mark.parametrize("names", [["optimizer"], ["optim"], ["optim", "optimizer"]])
def test_explain_looks_through_wrappers(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    p = new_parameters((3,))[0]
    p.grad = torch.ones(3)
    optimizer: Any = optim.Adam([("weight", p)])
    for name in names:
        optimizer = Wrapper(name, optimizer)
    assert explained(optimizer, capsys) == ["weight  (3,)  float32  pyopt"]


def test_explain_torchs_own(capsys: pytest.CaptureFixture[str]) -> None:
    p = new_parameters((3,))[0]
    p.grad = torch.ones(3)
    for cls in (torch.optim.Adam, optim.LBFGS):
        (line,) = explained(cls([p]), capsys)
        assert path_of(line) == "torch" and f"its optimizer is torch.optim.{cls.__name__}" in line


def test_explain_names_the_class_it_refuses() -> None:
    for what, name in ((pyopt.SGD([np.ones(3)]), "SGD"), (3, "int"), (torch.nn.Linear(1, 1), "Linear")):
        with pytest.raises(TypeError, match=f"optimizer is a {name}, must be an optimizer of torch"):
            optim.explain(what)
    around_itself = Wrapper("optimizer", None)
    around_itself.optimizer = around_itself
    with pytest.raises(TypeError, match="optimizer is a Wrapper, must"):
        optim.explain(around_itself)


# --- the wrapper that torch puts around step --------------------------------------------------------------------------


def stepped(cls: Any) -> Any:
    optimizer = cls(new_parameters((3,)))
    parameters(optimizer)[0].grad = torch.ones(3)
    return optimizer


def test_constructors_leave_step_alone() -> None:
    """Also that of a copy: nothing is wrapped around it."""
    before = optim.Adam.step
    for optimizer in (stepped(optim.Adam), copy.deepcopy(stepped(optim.Adam))):
        assert type(optimizer).step is before and optimizer.step.__func__ is before
    assert (
        before.hooked
        and before.__name__ == "step"
        and "closure" in torch.jit._recursive.inspect.signature(before).parameters
    )


def calls_of(step: Any, *, profiler: bool = False) -> Counter[str]:
    """How often each function of Python is called by a step."""
    seen: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            seen[frame.f_code.co_name] += 1

    step()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return seen


def test_nobody_looks_and_nothing_is_wrapped() -> None:
    optimizer = stepped(optim.Adam)
    plain = calls_of(optimizer.step)
    assert "wrapper" not in plain and "__enter__" not in plain and plain.total() <= 12, plain
    handle = optimizer.register_step_pre_hook(lambda *_: None)
    assert calls_of(optimizer.step)["wrapper"] == 1
    handle.remove()
    assert calls_of(optimizer.step) == plain
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert calls_of(optimizer.step)["wrapper"] == 1
    finally:
        handle.remove()
    assert calls_of(optimizer.step) == plain


def inherits() -> Any:
    class Mine(optim.Adam):  # type: ignore[name-defined,misc]
        """A class of the user's own without a step."""

    return Mine


def overrides() -> Any:
    class Mine(optim.Adam):  # type: ignore[name-defined,misc]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return Mine


def overrides_twice() -> Any:
    class Mine(overrides()):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return Mine


def wraps() -> Any:
    class Mine(optim.Adam):  # type: ignore[name-defined,misc]
        """functools.wraps copies the mark of a step that needs no wrapper."""

        @functools.wraps(optim.Adam.step)
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return Mine


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("make", [lambda: optim.Adam, inherits, overrides, overrides_twice, wraps])
def test_hooks_and_profile_once(make: Any, scheduled: bool) -> None:
    """Whoever overrides or wraps step: each hook once, one mark in a profile."""
    cls = make()
    optimizer = stepped(cls)
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda *args: seen.append(("pre", *args)))
    optimizer.register_step_post_hook(lambda *args: seen.append(("post", *args)))
    closure = lambda: 3  # noqa: E731
    assert optimizer.step(closure) == 3 and optimizer.step(closure=closure) == 3
    assert [what for what, *_ in seen] == ["pre", "post"] * 2
    by_name = ((optimizer, closure), {}) if make is wraps else ((optimizer,), {"closure": closure})
    expected = [(optimizer, (optimizer, closure), {})] * 2 + [(optimizer, *by_name)] * 2
    assert [tuple(rest) for _, *rest in seen] == expected
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    for profile in (torch.autograd.profiler.profile, torch.profiler.profile):
        with profile() as found:
            optimizer.step()
        marks = [e.key for e in found.key_averages() if e.key.startswith("Optimizer.step")]
        counts = [e.count for e in found.key_averages() if e.key.startswith("Optimizer.step")]
        assert (marks, counts) == ([f"Optimizer.step#{cls.__name__}.step"], [1])


def test_wrong_arguments_of_step() -> None:
    with pytest.raises(TypeError, match=r"step\(\) got an unexpected keyword argument 'grads'"):
        stepped(optim.Adam).step(grads=[])


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [BRIEF[0], BRIEF[2], BRIEF[7]], ids=["SGD", "Adam", "Adagrad"])
def test_compiled_training_step(name: str, options: dict[str, Any]) -> None:
    """One break at the step, none of its Python is looked at, and nothing is compiled again."""
    from torch._dynamo.utils import counters

    models = [torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    compiled, eager = (getattr(optim, name)(m.parameters(), **options) for m in models)
    x = new(3, 4)

    def train() -> Any:
        loss = models[0](x).square().mean()
        loss.backward()
        compiled.step()
        return x + 1

    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(train, backend="eager")
    for step in range(4):
        for optimizer in (compiled, eager):
            optimizer.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            run()
        models[1](x).square().mean().backward()
        eager.step()
    breaks = {reason.split("\n")[0]: n for reason, n in counters["graph_break"].items()}
    assert breaks.pop("Unsupported Tensor.backward() call", 1) == 1  # torch's, at any optimizer
    assert list(breaks.values()) == [1], counters["graph_break"]
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("first", ["import", "step"])
def test_torch_dynamo_is_not_imported(first: str) -> None:
    """By pyopt; torch's constructor does, so one that unpickles an optimizer may do without."""
    code = """
import io, pickle, sys, torch, pyopt.torch
assert "torch._dynamo" not in sys.modules
if sys.argv[1] == "step":
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    o = object.__new__(pyopt.torch.SGD)
    o.__setstate__({"defaults": {}, "state": {}, "param_groups": [dict(
        params=[p], lr=1.0, momentum=0, dampening=0, weight_decay=0, nesterov=False, maximize=False)]})
    o.step()
    assert p.tolist() == [0.0] * 3
print("torch._dynamo" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code, first], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# --- what is left to torch --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(SPARSE_WARNING)
@pytest.mark.parametrize("switch", ["fused", "foreach"])
@each
def test_what_is_left_takes_the_implementation_asked_for(name: str, switch: str) -> None:
    """In the bits of torch with the same switch, or of its for-loop where the fused kernel cannot or is wrong."""
    if name == "RMSprop" and switch == "fused":
        return
    for what in uncovered_of(name):
        make, gradient, _ = UNCOVERED[what]
        oracle = {switch: True} if switch == "foreach" else {}
        twins = Twins(name, lambda make=make: [make(), make()], {"lr": 0.1, switch: True}, {"lr": 0.1, **oracle})
        for step in range(3):  # the second parameter gets its state a step later
            twins.step([gradient(p) if i <= step else None for i, p in enumerate(parameters(twins.theirs))])
        if what != "wrapper":
            assert all(same_bits(p, q) for p, q in twins.pairs()), what


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["strided"])
def test_fused_where_strides_differ(name: str, dtype: Any, layout: str) -> None:
    """torch's fused kernels misread them: what is left takes the for-loop then, with fused=True as without."""
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1}

    def build() -> list[Any]:
        base = new(6, 40, 2, dtype=dtype)
        value = {"transposed": base[..., 0].contiguous().t(), "strided": base[..., 0]}.get(
            layout, base[..., 0].contiguous()
        )
        return [torch.nn.Parameter(value)]

    twins = Twins(name, build, {**options, "fused": True}, options)
    for step in range(3):
        p = parameters(twins.theirs)[0]
        g = new(*p.shape, dtype=dtype, seed=step)
        if layout == "gradient transposed":
            g = g.t().contiguous().t()
        elif layout == "gradient expanded":
            g = g[:1].expand(p.shape)
        if layout == "state":
            twins.ours.param_groups[0]["fused"] = step == 1  # the bits of the first step are those of the for-loop
        if layout == "state" and step == 1:
            for optimizer in twins:
                entry = optimizer.state[parameters(optimizer)[0]]
                for key, value in entry.items():
                    if key != "step" and value is not None:
                        entry[key] = value.t().contiguous().t()
        if layout == "transposed" and name != "SGD":
            g = g.contiguous()
        twins.step([g])
    assert same_bits(*twins.pairs()[0])


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad"])
def test_fused_halves_run_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = f"_fused_{name.lower()}_"
    calls = []
    inner = getattr(torch, kernel)
    monkeypatch.setattr(torch, kernel, lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs))
    for fused in (None, True):
        base = new(67, dtype=torch.bfloat16)  # they share memory, so that torch steps them
        optimizer = getattr(optim, name)([torch.nn.Parameter(base), torch.nn.Parameter(base[:9])], fused=fused)
        for p in parameters(optimizer):
            p.grad = new(*p.shape, dtype=torch.bfloat16)
        optimizer.step()
    assert calls == [1]


@pytest.mark.filterwarnings(SPARSE_WARNING)
def test_groups_are_never_seen_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that adds a group while torch steps what is left adds it to the optimizer."""
    p, q, r = (torch.nn.Parameter(new(3, 2, dtype=torch.bfloat16)[:, 1]) for _ in range(3))  # left to torch
    optimizer = optim.SGD([p, q], lr=0.5)
    p.grad = torch.ones_like(p)
    seen = []

    def step(self: Any, closure: Any = None) -> None:
        seen.append([len(g["params"]) for g in optimizer.param_groups])
        optimizer.add_param_group({"params": [r]})

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    optimizer.step()
    assert seen == [[2]] and [len(g["params"]) for g in optimizer.param_groups] == [2, 1]


# --- a user's own keys and entries ------------------------------------------------------------------------------------


def test_checkpoints_hold_plain_numbers() -> None:
    """torch.load(weights_only=True) takes the file, whatever NumPy type the options were of."""
    ours = pyopt.Adam([np.ones(2, np.float32)], lr=np.float64(0.1), betas=(np.float32(0.5), np.float64(0.75)))
    ours.step(grads=[np.ones(2, np.float32)])
    saved = ours.state_dict()
    saved["param_groups"][0] |= {
        "layer": np.int64(3),
        "scales": [np.float64(2.0), {"a": np.float32(0.5)}],
        "on": np.bool_(True),
    }
    saved["state"][0]["slow"] = {"weights": np.ones(3), "count": np.int32(2)}
    converted = optim.to_torch(saved)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    (group,), entry = loaded["param_groups"], loaded["state"][0]
    assert group["lr"] == 0.1 and group["betas"] == (0.5, 0.75) and group["params"] == [0]
    assert (group["layer"], group["scales"], group["on"]) == (3, [2.0, {"a": 0.5}], True)
    assert entry["slow"]["count"] == 2 and torch.equal(entry["slow"]["weights"], torch.ones(3, dtype=torch.float64))
    adam = optim.Adam(new_parameters((2,)))
    adam.load_state_dict(loaded)
    assert adam.param_groups[0]["layer"] == 3
    there = optim.from_torch(adam.state_dict())
    assert there["param_groups"][0]["scales"] == [2.0, {"a": 0.5}] and there["param_groups"][0]["params"] == [0]
    assert there["state"][0]["slow"]["count"] == 2 and type(there["state"][0]["slow"]["weights"]) is np.ndarray
    there["state"][0]["slow"]["weights"][:] = 7
    assert torch.equal(
        adam.state[parameters(adam)[0]]["slow"]["weights"],
        torch.ones(3, dtype=adam.state[parameters(adam)[0]]["slow"]["weights"].dtype),
    )


def test_step_counts_in_checkpoints() -> None:
    saved = {"state": {0: {"step": 2**24 + 1}}, "param_groups": []}
    assert optim.to_torch(saved)["state"][0]["step"].item() == 2**24 + 1
    assert optim.to_torch({**saved, "state": {0: {"step": 3}}})["state"][0]["step"].dtype == torch.float32
    for step in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"parameter 0: state 'step' is .*, must be a whole number"):
            optim.from_torch({"state": {0: {"step": torch.tensor(step)}}, "param_groups": []})


@brief
def test_entries_of_the_users_own_before_the_first_step(name: str, options: dict[str, Any]) -> None:
    """As Lookahead sets them: they stay, and the step is what it is without (torch's Adam fails)."""
    with_entry, without = (getattr(optim, name)(small(), **options) for _ in range(2))
    for p in parameters(with_entry):
        with_entry.state[p]["slow_weights"] = p.detach().clone()
    for step in range(3):
        for p, q in zip(parameters(with_entry), parameters(without), strict=True):
            p.grad = q.grad = new(*p.shape, seed=step)
        with_entry.step()
        without.step()
    for p, q in zip(parameters(with_entry), parameters(without), strict=True):
        assert same_bits(p, q)
        assert with_entry.state[p].keys() == {"slow_weights"} | without.state[q].keys()
        assert all(same_bits(v, with_entry.state[p][k]) for k, v in without.state[q].items() if v is not None)
    again = getattr(optim, name)(small(), **options)
    again.load_state_dict(with_entry.state_dict())
    for p, q in zip(parameters(with_entry), parameters(again), strict=True):
        assert same_bits(with_entry.state[p]["slow_weights"], again.state[q]["slow_weights"])


@pytest.mark.parametrize("name", FIVE)
def test_entries_of_the_users_own_where_torch_steps(name: str) -> None:
    p, q = (torch.nn.Parameter(new(67, 2, dtype=torch.bfloat16)[:, 1]) for _ in range(2))
    with_entry, without = getattr(optim, name)([p]), getattr(torch.optim, name)([q])
    with_entry.state[p]["slow_weights"] = kept = p.detach().clone()
    for step in range(3):
        p.grad = q.grad = new(67, dtype=torch.bfloat16, seed=step)
        with_entry.step()
        without.step()
    assert same_bits(p, q) and with_entry.state[p]["slow_weights"] is kept
