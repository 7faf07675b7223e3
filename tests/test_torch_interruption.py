"""A step of pyopt.torch that is interrupted, anywhere, has happened or has not: the next ones are right."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from apart import alone, apart
from torch_or_skip import bits, new, new_parameters, optim, parameters, torch


class Stop(BaseException):
    """As KeyboardInterrupt is: no Exception."""


# --- what is interrupted ----------------------------------------------------------------------------------------------

CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Lion", {"lr": 0.01}),
]
CASE_IDS = ["-".join([name, *options]) for name, options in CASES]


def set_gradients(optimizer: Any, seed: int) -> None:
    for i, p in enumerate(parameters(optimizer)):
        p.grad = new(*p.shape, dtype=p.dtype, seed=seed * 100 + i)


def made(name: str, options: dict[str, Any], steps: int) -> Any:
    a, b, c = new_parameters((3, 2), (5,), ())
    optimizer = getattr(optim, name)([{"params": [a, b]}, {"params": [c]}], **options)
    for seed in range(steps):
        set_gradients(optimizer, seed)
        optimizer.step()
    set_gradients(optimizer, steps)
    return optimizer


def first_step(name: str, options: dict[str, Any]) -> Any:
    return made(name, options, 0)


def unchanged(name: str, options: dict[str, Any]) -> Any:
    return made(name, options, 2)


def new_group(name: str, options: dict[str, Any]) -> Any:
    optimizer = made(name, options, 2)
    optimizer.add_param_group({"params": new_parameters((4,), (2, 2)), "lr": 0.5})
    set_gradients(optimizer, 2)
    return optimizer


def removed_group(name: str, options: dict[str, Any]) -> Any:
    optimizer = made(name, options, 2)
    del optimizer.param_groups[0]
    return optimizer


def changed_lr(name: str, options: dict[str, Any]) -> Any:
    optimizer = made(name, options, 2)
    optimizer.param_groups[0]["lr"] = 100.0
    return optimizer


def tensor_lr(name: str, options: dict[str, Any]) -> Any:
    optimizer = made(name, {**options, "lr": torch.tensor(0.1)} if name != "Lion" else options, 2)
    if name == "Lion":
        optimizer.param_groups[0]["lr"] = 7.0
    else:
        optimizer.param_groups[0]["lr"].fill_(100.0)
    return optimizer


def new_state(name: str, options: dict[str, Any]) -> Any:
    """Dropped, so that the step makes it anew."""
    optimizer = made(name, options, 2)
    for p in parameters(optimizer)[1:]:
        if name == "Adagrad":
            optimizer.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}
        else:
            optimizer.state.pop(p, None)
    return optimizer


def replaced_data(name: str, options: dict[str, Any]) -> Any:
    optimizer = made(name, options, 2)
    for p in parameters(optimizer):
        p.data = p.data.clone() + 1
    return optimizer


def replaced_state(name: str, options: dict[str, Any]) -> Any:
    optimizer = made(name, options, 2)
    for p in parameters(optimizer):
        for key, value in optimizer.state.get(p, {}).items():
            optimizer.state[p][key] = value.clone() + 1
    return optimizer


def other_order(name: str, options: dict[str, Any]) -> Any:
    """A gradient that needs a private copy."""
    optimizer = made(name, options, 2)
    a = parameters(optimizer)[0]
    a.grad = new(2, 3, seed=7).t()
    return optimizer


def no_gradient_before(name: str, options: dict[str, Any]) -> Any:
    """A parameter that has its first gradient now."""
    a, b, c = new_parameters((3, 2), (5,), ())
    optimizer = getattr(optim, name)([{"params": [a, b]}, {"params": [c]}], **options)
    for seed in range(2):
        set_gradients(optimizer, seed)
        b.grad = None
        optimizer.step()
    set_gradients(optimizer, 2)
    return optimizer


def loaded(name: str, options: dict[str, Any]) -> Any:
    optimizer = made(name, options, 2)
    optimizer.load_state_dict(made(name, options, 3).state_dict())
    return optimizer


def mixed(name: str, options: dict[str, Any]) -> Any:
    """One between the others is left to torch."""
    optimizer = made(name, options, 0)
    half = torch.nn.Parameter(new(3, 2, dtype=torch.bfloat16)[:, 1])
    optimizer.param_groups[0]["params"].insert(1, half)
    if name == "Adagrad":
        optimizer.state[half] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(half)}
    for seed in range(3):
        set_gradients(optimizer, seed)
        if seed < 2:
            optimizer.step()
    return optimizer


CHANGES = [
    first_step,
    unchanged,
    new_group,
    removed_group,
    changed_lr,
    tensor_lr,
    new_state,
    replaced_data,
    replaced_state,
    other_order,
    no_gradient_before,
    loaded,
    mixed,
]


def covered(optimizer: Any) -> dict[str, Any]:
    """The bits of all rows that the kernels take; state that no step has used counts as none."""
    result: dict[str, Any] = {}
    for i, p in enumerate(parameters(optimizer)):
        if p.dtype not in (torch.float32, torch.float64):
            continue
        result[f"parameter {i}"] = bits(p).tolist()
        state = optimizer.state.get(p, {})
        fresh = "initial_accumulator_value" not in optimizer.defaults and float(state.get("step", 1)) == 0
        for key, value in state.items():
            if not fresh and value is not None:
                result[f"{key} {i}"] = bits(value).tolist()
    return result


def assert_whole(optimizer: Any, make: Callable[[], Any], before: dict[str, Any], after: dict[str, Any]) -> str:
    """As before or as after the step, and the next ones are those of a twin that was not interrupted."""
    found = covered(optimizer)
    moved = [key for key in after if found.get(key) == after[key] != before.get(key)]
    stayed = [key for key in before if found.get(key) == before[key] != after.get(key)]
    assert found in (before, after), f"half a step: {moved} moved, {stayed} stayed, of {sorted({*found, *after})}"
    which = "after" if found == after and before != after else "before"
    if which == "before":
        optimizer.step()
        assert covered(optimizer) == after, "the step after the interrupted one is another"
    twin = make()
    twin.step()
    for seed in (8, 9):
        for o in (optimizer, twin):
            set_gradients(o, seed)
            o.step()
        assert covered(optimizer) == covered(twin), "a later step is another"
    return which


# --- an exception at the n-th event -----------------------------------------------------------------------------------


class Interrupter:
    """Raises at the n-th event of a kind while it is on."""

    def __init__(self, n: int) -> None:
        self.left = n

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop

    @property
    def raised(self) -> bool:
        return self.left <= 0


class ByCall(Interrupter):
    """Calls of Python's and of C's functions."""

    def __enter__(self) -> None:
        sys.setprofile(self.event)

    def event(self, frame: Any, event: str, argument: Any) -> None:
        if event.endswith("call") and argument is not sys.setprofile:
            self.count()

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


class ByLine(Interrupter):
    """Lines of Python code, wherever the step passes."""

    def __enter__(self) -> None:
        self.before = sys.gettrace()  # a measurement of coverage
        sys.settrace(self.event)

    def event(self, frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code is ByLine.__exit__.__code__:
            return None
        self.count()
        return self.event

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


def interrupted(optimizer: Any, how: Interrupter) -> bool:
    try:
        with how:
            optimizer.step()
    except Stop:
        return True
    return how.raised


def every_point(make: Callable[[], Any], interrupt: Callable[[Any, int], bool]) -> int:
    """Interrupt a step at the first, second, ... event, until one passes: how many there were."""
    twin = make()
    before = covered(twin)
    twin.step()
    after = covered(twin)
    for n in itertools.count(1):
        optimizer = make()
        assert covered(optimizer) == before
        reached = interrupt(optimizer, n)
        try:
            assert_whole(optimizer, make, before, after)
        except BaseException as error:
            raise AssertionError(f"interrupted at event {n}: {type(error).__name__}: {error}") from error
        if not reached:
            return n - 1
    raise AssertionError


@apart
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("name", "options", "how"),
    [(*case, ByCall) for case in CASES] + [(*case, ByLine) for case in CASES if case[0] == "Adam"][:1],
    ids=[*CASE_IDS, "by line"],
)
def test_interrupted_at_every_point(name: str, options: dict[str, Any], change: Any, how: Any) -> None:
    every_point(lambda: change(name, options), lambda optimizer, n: interrupted(optimizer, how(n)))


# --- objects that raise where they are read ---------------------------------------------------------------------------


class Wire:
    """What hostile objects touch."""

    now: Interrupter | None = None

    @classmethod
    def touch(cls) -> None:
        if cls.now is not None:
            cls.now.count()


def touching(base: Any, names: list[str]) -> Any:
    """A subclass whose special methods touch the wire first."""

    def wrapped(name: str) -> Any:
        original = getattr(base, name)

        def method(self: Any, *args: Any) -> Any:
            Wire.touch()
            return original(self, *args)

        return method

    return type(f"Hostile{base.__name__}", (base,), {name: wrapped(name) for name in names})


NUMBER = ["float", "eq", "ne", "lt", "le", "gt", "ge", "mul", "rmul", "neg", "hash", "bool", "sub", "rsub", "truediv"]
MAPPING = ["getitem", "contains", "setitem", "iter", "len"]
METHODS = [*(f"__{name}__" for name in MAPPING), "get", "items", "keys", "values", "setdefault"]
HostileFloat = touching(float, [f"__{name}__" for name in NUMBER])
HostileDict = touching(dict, METHODS)
HostileOrderedDict = touching(OrderedDict, METHODS)
HostileList = touching(list, ["__getitem__", "__iter__", "__len__", "__contains__"])


def spoil_numbers(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for key, value in group.items():
            if type(value) is float:
                group[key] = HostileFloat(value)
            elif type(value) is tuple:
                group[key] = tuple(map(HostileFloat, value))


def spoil_groups(optimizer: Any) -> None:
    optimizer.param_groups = [HostileDict(group) for group in optimizer.param_groups]


def spoil_lists(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["params"] = HostileList(group["params"])
    optimizer.param_groups = HostileList(optimizer.param_groups)


def spoil_entries(optimizer: Any) -> None:
    for p, entry in list(optimizer.state.items()):
        optimizer.state[p] = HostileOrderedDict(entry)


def spoil_factory(optimizer: Any) -> None:
    def factory() -> dict[str, Any]:
        Wire.touch()
        return {}

    optimizer.state.default_factory = factory


@apart
@pytest.mark.parametrize("change", [first_step, unchanged, new_group, changed_lr, new_state, replaced_data, mixed])
@pytest.mark.parametrize("spoil", [spoil_numbers, spoil_groups, spoil_lists, spoil_entries, spoil_factory])
@pytest.mark.parametrize(("name", "options"), CASES[1:4], ids=CASE_IDS[1:4])
def test_interrupted_inside_hostile_objects(name: str, options: dict[str, Any], spoil: Any, change: Any) -> None:
    def make() -> Any:
        optimizer = change(name, options)
        spoil(optimizer)
        return optimizer

    def interrupt(optimizer: Any, n: int) -> bool:
        Wire.now = Interrupter(n)
        try:
            optimizer.step()
        except Stop:
            return True
        finally:
            reached, Wire.now = Wire.now.raised, None
        return reached

    every_point(make, interrupt)


# --- under a GradScaler -----------------------------------------------------------------------------------------------


class InsideStep(ByCall):
    """Calls from within pyopt's step; what comes before and after is not ours to keep whole."""

    def __enter__(self) -> None:
        self.frame: Any = None
        super().__enter__()

    def event(self, frame: Any, event: str, argument: Any) -> None:
        if self.frame is None:
            if event == "call" and f"{os.sep}pyopt{os.sep}torch{os.sep}" in frame.f_code.co_filename:
                self.frame = frame
        elif event == "return" and frame is self.frame:
            self.frame = None
        elif event.endswith("call"):
            self.count()


@apart
@pytest.mark.parametrize("skipped", [False, True], ids=["finite", "inf"])
@pytest.mark.parametrize("change", [first_step, unchanged, mixed])
@pytest.mark.parametrize(("name", "options"), CASES[:3], ids=CASE_IDS[:3])
def test_interrupted_scaler_step_leaves_nothing(name: str, options: dict[str, Any], change: Any, skipped: bool) -> None:
    """The attributes that the scaler sets are gone, and the next plain step is not divided by the scale."""
    for n in itertools.count(1):
        optimizer, twin = (change(name, {**options, "fused": True}) for _ in range(2))
        before = covered(optimizer)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(float(skipped))
        how = InsideStep(n)
        try:
            with how:
                optimizer.step()
        except Stop:
            pass
        else:
            if how.raised:  # where torch's own code swallows it
                continue
            break
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf"), f"event {n}"
        if covered(optimizer) == before:
            optimizer.step()
            twin.step()
            assert covered(optimizer) == covered(twin), f"event {n}"
    assert optimizer.grad_scale == 1024  # the scaler deletes them itself


# --- signals ----------------------------------------------------------------------------------------------------------


def rounds_of_signals(seconds: str) -> None:
    """Random optimizers and changes under a timer's signal at a random moment; prints the figures."""
    draw = random.Random(0)
    armed = False

    def handler(*_: Any) -> None:
        if armed:
            raise Stop

    signal.signal(signal.SIGALRM, handler)
    known: dict[Any, Any] = {}
    episodes = interruptions = inconsistent = 0
    counts = {"before": 0, "after": 0}
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        (name, options), change = draw.choice(CASES), draw.choice(CHANGES)
        key = name, len(options), change

        def make(name: str = name, options: dict[str, Any] = options, change: Any = change) -> Any:
            return change(name, options)

        if key not in known:
            twin = make()
            before = covered(twin)
            start = time.perf_counter()
            twin.step()
            known[key] = before, covered(twin), time.perf_counter() - start
        before, after, took = known[key]
        optimizer = make()
        delay = max(1e-6, draw.random() * min(took, 2e-3) * 1.5)
        stopped = False
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, delay)
            optimizer.step()
            armed = False
        except Stop:
            stopped = True
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        episodes += 1
        interruptions += stopped
        try:
            which = assert_whole(optimizer, make, before, after)
            counts[which] += stopped
        except Exception as error:
            inconsistent += 1
            print(f"{name} {change.__name__}: {type(error).__name__}: {error}")
    print(f"{episodes} episodes, {interruptions} interrupted, {counts}, {inconsistent} inconsistent")


def test_signals() -> None:
    """PYOPT_SIGNALS is how many seconds it runs."""
    printed = alone(rounds_of_signals, os.environ.get("PYOPT_SIGNALS", "4"))
    print(printed)
    assert printed.rstrip().endswith(" 0 inconsistent") and " 0 interrupted" not in printed, printed[-3000:]
