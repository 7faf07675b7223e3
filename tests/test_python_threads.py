"""Many Python threads: an optimizer each, or one optimizer that lets one step at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

import pyopt

THREADS = 6
STEPS = 3000


def in_threads(function: Callable[[int], None]) -> None:
    """Call it in all threads at once, with the number of each; an exception in one is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> None:
        try:
            barrier.wait(60)
            function(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def new() -> pyopt.Adam:
    params = [pyopt.Parameter(np.linspace(-1, 1, n), np.linspace(2, 3, n)) for n in (1, 7, 300)]
    return pyopt.Adam(params, lr=0.01)


def content(optimizer: pyopt.Adam) -> list[bytes]:
    params = optimizer.param_groups[0]["params"]
    return [p.data.tobytes() + optimizer.state[p]["exp_avg_sq"].tobytes() for p in params]


def after(steps: int) -> list[bytes]:
    optimizer = new()
    for _ in range(steps):
        optimizer.step()
    return content(optimizer)


@pytest.fixture(autouse=True)
def short_turns() -> object:
    """Threads that change places often, where there is a GIL."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_an_optimizer_each() -> None:
    optimizers = [new() for _ in range(THREADS)]

    def run(number: int) -> None:
        for _ in range(STEPS):
            optimizers[number].step()

    in_threads(run)
    expected = after(STEPS)
    assert all(content(optimizer) == expected for optimizer in optimizers)


def test_one_optimizer_steps_in_one_thread_at_a_time() -> None:
    """Each step is taken whole, or refused by name; others may look at any time."""
    optimizer = new()
    taken = [0] * THREADS

    def run(number: int) -> None:
        for turn in range(STEPS):
            try:
                optimizer.step()
                taken[number] += 1
            except RuntimeError as error:
                assert str(error) == "step() of this optimizer is already running in another thread"
            if turn % 200 == 0:
                state = optimizer.state_dict()["state"]
                assert len({entry["step"] for entry in state.values()}) <= 1, "a snapshot in the middle of a step"

    in_threads(run)
    steps = sum(taken)
    assert {optimizer.state[p]["step"] for p in optimizer.param_groups[0]["params"]} == {steps}
    assert content(optimizer) == after(steps)


def test_settings_of_threads() -> None:
    before = pyopt.get_num_threads()

    def run(number: int) -> None:
        for _ in range(20):
            with pyopt.num_threads(1 + number % 2):
                assert 1 <= pyopt.get_num_threads() <= 2
                pyopt.show_config(mode="dicts")

    in_threads(run)
    assert pyopt.get_num_threads() == before
