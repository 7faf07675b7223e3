"""Other threads beside a step of pyopt.torch: the process does not crash, and every step is whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from apart import alone
from torch_or_skip import new_parameters, optim, parameters, same_bits, torch

SECONDS = float(os.environ.get("PYOPT_BESIDE", "1.5"))
LENGTH = 20_000  # so that a step is long enough for others to come between
SEEN = RuntimeError, KeyError, TypeError, ValueError, IndexError  # what a change in mid-flight may come to


def model(name: str, count: int = 6, **options: Any) -> Any:
    """Equal parameters with equal gradients: they stay equal for ever."""
    params = [torch.nn.Parameter(torch.linspace(-1, 1, LENGTH)) for _ in range(count)]
    for p in params:
        p.grad = torch.linspace(1, 2, LENGTH)
    return getattr(optim, name)(params, **options)


def together(*works: Callable[[], Any]) -> list[int]:
    """Repeat each in a thread of its own for a while: how often each one ran; an error of one ends all."""
    sys.setswitchinterval(1e-5)
    end = time.monotonic() + SECONDS
    counts = [0] * len(works)
    errors: list[BaseException] = []

    def loop(i: int) -> None:
        try:
            while time.monotonic() < end and not errors:
                works[i]()
                counts[i] += 1
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=loop, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 30)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    assert all(counts), counts
    return counts


def assert_whole(optimizer: Any, params: list[Any], steps: int | None = None) -> None:
    """All parameters have moved alike, and so has their state."""
    first = params[0]
    for p in params[1:]:
        assert same_bits(p.detach(), first.detach()), "half a step"
        for key, value in optimizer.state.get(first, {}).items():
            assert same_bits(optimizer.state[p][key], value), f"half a step: {key}"
    if steps is not None and "step" in optimizer.state.get(first, {}):
        assert optimizer.state[first]["step"].item() == steps


def counted(optimizer: Any, allowed: tuple[type[BaseException], ...] = ()) -> tuple[Callable[[], None], list[int]]:
    """A step, and how many have gone well; a refused one has changed nothing, which assert_whole shows."""
    done = [0]

    def step() -> None:
        try:
            optimizer.step()
            done[0] += 1
        except allowed:
            pass

    return step, done


def add_groups(name: str) -> None:
    optimizer = model(name)
    kept = parameters(optimizer)

    def add() -> None:
        if len(optimizer.param_groups) < 300:
            p = torch.nn.Parameter(torch.ones(7))
            p.grad = torch.ones(7)
            optimizer.add_param_group({"params": [p]})
        else:
            del optimizer.param_groups[1:]

    step, done = counted(optimizer)
    together(step, add)
    assert_whole(optimizer, kept, done[0])


def delete_groups(name: str) -> None:
    optimizer = model(name)
    kept = parameters(optimizer)

    def replace() -> None:
        extra = [torch.nn.Parameter(torch.ones(50)) for _ in range(3)]
        for p in extra:
            p.grad = torch.ones(50)
            optimizer.param_groups.append({**optimizer.param_groups[0], "params": [p]})
            if name == "Adagrad":
                optimizer.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros(50)}
        time.sleep(0)
        del optimizer.param_groups[1:]
        for p in extra:
            optimizer.state.pop(p, None)

    step, done = counted(optimizer, SEEN)
    together(step, replace)
    assert_whole(optimizer, kept, done[0])


def edit_parameter_lists(name: str) -> None:
    optimizer = model(name)
    kept = parameters(optimizer)[:-1]
    params = optimizer.param_groups[0]["params"]

    def edit() -> None:
        p = torch.nn.Parameter(torch.ones(LENGTH))
        p.grad = torch.ones(LENGTH)
        if name == "Adagrad":
            optimizer.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros(LENGTH)}
        params[-1] = p
        time.sleep(0)
        params.pop()
        params.append(p)

    step, done = counted(optimizer, SEEN)
    together(step, edit)
    assert_whole(optimizer, kept, done[0])


def replace_state(name: str) -> None:
    """The tensors of the last parameter's entry; the old ones are freed while a step may write them."""
    optimizer = model(name)
    optimizer.step()
    last = parameters(optimizer)[-1]
    keys = [key for key, value in optimizer.state[last].items() if isinstance(value, torch.Tensor)]

    def replace() -> None:
        for key in keys:
            optimizer.state[last][key] = torch.full_like(optimizer.state[last][key], 1.0)

    step, done = counted(optimizer)
    together(step, replace)
    assert_whole(optimizer, parameters(optimizer)[:-1], done[0] + 1)


def delete_state(name: str) -> None:
    optimizer = model(name)
    optimizer.step()
    last = parameters(optimizer)[-1]

    def delete() -> None:
        if name != "Adagrad":
            optimizer.state.pop(last, None)
        else:
            optimizer.state[last] = {"step": torch.tensor(0.0), "sum": torch.zeros(LENGTH)}

    step, done = counted(optimizer, SEEN)
    together(step, delete)
    assert_whole(optimizer, parameters(optimizer)[:-1], done[0] + 1)


def look(name: str) -> None:
    """explain, state_dict and repr change nothing."""
    optimizer = model(name)
    step, done = counted(optimizer)
    with open(os.devnull, "w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            together(step, lambda: optim.explain(optimizer), lambda: (optimizer.state_dict(), repr(optimizer)))
        finally:
            sys.stdout = stdout
    assert_whole(optimizer, parameters(optimizer), done[0])


def step_twice(name: str) -> None:
    """Another step: it waits, or gets the clear error."""
    optimizer = model(name)
    done: list[int] = []

    def step() -> None:
        try:
            optimizer.step()
            done.append(1)
        except RuntimeError as error:
            assert "another thread" in str(error), error

    together(step, step)
    assert_whole(optimizer, parameters(optimizer), len(done))


def change_options(name: str) -> None:
    """A step takes the one lr or the other, for all of its parameters."""
    optimizer = model(name)
    group = optimizer.param_groups[0]

    def change() -> None:
        group["lr"] = 0.5 if group["lr"] == 0.25 else 0.25
        group["own"] = object()
        del group["own"]

    step, done = counted(optimizer)
    together(step, change)
    assert_whole(optimizer, parameters(optimizer), done[0])


def others(name: str) -> None:
    """Other optimizers in other threads do not disturb each other."""
    optimizers = [model(name) for _ in range(3)]
    works = [counted(o) for o in optimizers]
    together(*(work for work, _ in works))
    for o, (_, done) in zip(optimizers, works, strict=True):
        assert_whole(o, parameters(o), done[0])


# Not gradients that another thread replaces: torch itself crashes at reading p.grad then.
SCENES = [
    add_groups,
    delete_groups,
    edit_parameter_lists,
    replace_state,
    delete_state,
    look,
    step_twice,
    change_options,
    others,
]


@pytest.mark.parametrize("scene", SCENES)
def test_beside_step(scene: Callable[[str], None]) -> None:
    alone(scene, "Adam")


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Lion"])
@pytest.mark.parametrize("scene", [add_groups, replace_state])
def test_beside_step_of_others(scene: Callable[[str], None], name: str) -> None:
    alone(scene, name)


def fork_beside_step(name: str) -> None:
    """The thread that steps is gone in the child; the optimizer is free there."""
    optimizer, other = model(name), model(name, 2)
    (p,) = new_parameters((5,))
    p.grad = torch.ones(5)
    after = getattr(optim, name)([p])
    end = time.monotonic() + SECONDS
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            optimizer.step()

    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    forks = 0
    try:
        while time.monotonic() < end or forks < 5:
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    signal.alarm(20)  # a hang becomes a failure
                    for o in (optimizer, other, after):
                        count = float(o.state.get(parameters(o)[0], {}).get("step", 0))
                        o.step()
                        o.step()
                        o.state_dict()
                        if count:
                            assert float(o.state[parameters(o)[0]]["step"]) >= count + 2
                    assert_whole(other, parameters(other), 2)
                    status = 0
                except BaseException as error:
                    os.write(2, f"{type(error).__name__}: {error}\n".encode())
                finally:
                    os._exit(status)
            status = os.waitpid(pid, 0)[1]
            forks += 1
            assert status == 0, f"the child after {forks} forks: status {status}"
    finally:
        stop.set()
        thread.join(30)
    assert_whole(optimizer, parameters(optimizer))


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_fork_while_another_thread_steps(name: str) -> None:
    alone(fork_beside_step, name)
