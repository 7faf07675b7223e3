"""Threads that attack an optimizer while others step it: no crash, no leak, no half step, with the GIL and without.

Each program runs in a process of its own, for PYOPT_ATTACK seconds (0.6; by hand: PYOPT_ATTACK=60 pytest -s -k ...).
"""

from __future__ import annotations

import os

import pytest

import pyopt
from whole_steps import in_process

SECONDS = float(os.environ.get("PYOPT_ATTACK", "0.6"))
OPTIMIZERS = {
    "SGD": (pyopt.SGD, {"lr": 1.0, "momentum": 0.5}),
    "Adam": (pyopt.Adam, {"lr": 1.0, "amsgrad": True}),
    "AdamW in 8 bits": (pyopt.AdamW, {"lr": 0.5, "state_dtype": "8bit"}),
    "NAdam": (pyopt.NAdam, {"lr": 0.5}),
    "Prodigy": (pyopt.Prodigy, {}),
    "Adafactor": (pyopt.Adafactor, {}),
}

PREAMBLE = '''
import copy, gc, itertools, pickle, random, sys, tempfile, threading, time, weakref
import numpy as np, pyopt
from pyopt import averaging, lr_scheduler
from test_free_threading import OPTIMIZERS, SECONDS

sys.setswitchinterval(1e-6)
pyopt.set_num_threads(2)
SIZE = 300  # beyond what 8 bits need

class Token:
    """What attackers leave in the dicts: a leaked one is still alive at the end."""

alive = weakref.WeakSet()
guard = threading.Lock()

def token():
    new = Token()
    with guard:
        alive.add(new)
    return new

def leaked():
    """Who holds what was thrown away; references of threads that have ended are counted when garbage is collected."""
    for _ in range(3): gc.collect()
    return [[str(holder)[:300] for holder in gc.get_referrers(each) if type(holder) is not list] for each in alive]

def parameters(n, size=SIZE):
    return [pyopt.Parameter(np.ones(size, np.float32), np.ones(size, np.float32)) for _ in range(n)]

def same(array):
    return array.size == 0 or (array == array.flat[0]).all()

failures = []
threading.excepthook = lambda a: failures.append(a.exc_value)
# What user's code may get in the midst of changes, with the GIL as well; all others are faults.
CLEAR = (TypeError, ValueError, KeyError, IndexError, RuntimeError, AttributeError)

def run(*actions, clear=CLEAR, seconds=SECONDS):
    """Each action in a thread, again and again; how often each went without an error: the first twice at least."""
    end, done = threading.Event(), [0] * len(actions)
    together = threading.Barrier(len(actions) + 1)
    def again(k):
        together.wait()
        while not end.is_set():
            try:
                actions[k]()
                done[k] += 1
            except clear as error:
                error.__traceback__ = None
    threads = [threading.Thread(target=again, args=(k,), daemon=True) for k in range(len(actions))]
    for t in threads: t.start()
    together.wait()
    begin = time.monotonic()
    while time.monotonic() < begin + (seconds if done[0] > 1 else seconds + 30) and not failures:
        time.sleep(0.01)
    end.set()
    for t in threads:
        t.join(60)
        assert not t.is_alive(), "a thread hangs"
    assert not failures, failures
    return done
'''

# Attackers in the order of what they take away from under a step; each is called again and again.
ATTACKS = """
def some():
    return random.choice(params)
def options():
    group = random.choice(optimizer.param_groups)
    group["lr"] = random.random()
    if "betas" in group: group["betas"] = (random.random() / 2, 0.5 + random.random() / 3)
    group["mine"] = token()
    group["another"] = [token()]
    del group["mine"]
def lists():
    group = random.choice(optimizer.param_groups)
    group["params"] = list(group["params"])
    last = group["params"].pop()
    group["params"].append(last)
    optimizer.param_groups[:] = [dict(each) for each in optimizer.param_groups]
def gradients():
    for p in params:
        p.grad = np.ones(SIZE, np.float32)
    some().grad = None
    some().data = np.ones(SIZE, np.float32)
def states():
    for entry in list(optimizer.state.values()):
        for key, value in list(entry.items()):
            if isinstance(value, np.ndarray): entry[key] = value.copy()
            elif key == "step": entry[key] = int(str(value + 1000))
        entry["mine"] = token()
        entry.pop("mine", None)
def entries():
    optimizer.state[some()] = {}
    optimizer.state.pop(some(), None)
    optimizer.state[token()] = {"mine": token()}
    if random.random() < 0.02: optimizer.state.clear()
    if random.random() < 0.02: optimizer.state = type(optimizer.state)(dict)
"""

CALLS = """
saved = optimizer.state_dict()
ema = averaging.EMA(optimizer, 0.5)
ema_saved = ema.state_dict()
scheduler = lr_scheduler.StepLR(optimizer, 5)
folder = tempfile.mkdtemp()
def read():
    repr(optimizer), optimizer.last_grad_norm, optimizer.skipped_steps, ema.n_averaged
    optimizer.state_dict(), optimizer.state_dict(copy=False), ema.state_dict(), scheduler.state_dict()
    ema.averages, ema.arrays, ema.joined, ema.kept
def duplicate():
    copy.deepcopy(optimizer).step()
    pickle.loads(pickle.dumps(optimizer)).step()
def load():
    optimizer.load_state_dict(saved)
    ema.load_state_dict(ema_saved)
    optimizer.skipped_steps = 0
def average():
    with ema.swapped(): pass
    other = averaging.SWA(optimizer)
    other.detach()
def hooks():
    hook = lambda *_: None
    handles = [optimizer.register_step_pre_hook(hook), pyopt.register_optimizer_step_post_hook(hook)]
    handles += [optimizer.register_state_dict_pre_hook(hook, prepend=True)]
    for handle in handles: handle.remove()
def schedule():
    scheduler.step()
    scheduler.get_last_lr()
def groups():
    optimizer.add_param_group({"params": [np.ones(SIZE, np.float32)], "mine": token()})
    del optimizer.param_groups[-1]
def clear():
    optimizer.zero_grad(random.random() < 0.5)
    for p in params: p.grad = np.ones(SIZE, np.float32)
def clip():
    pyopt.clip_grad_norm_(params, 1e3)
    pyopt.clip_grad_value_(params, 1e3)
    pyopt.get_total_norm([p.grad for p in params if p.grad is not None])
def file():
    pyopt.save(folder + "/x", optimizer)
    pyopt.load(folder + "/x", optimizer)
def threads():
    with pyopt.num_threads(random.choice([1, 2, 3])): pyopt.get_num_threads()
    pyopt.show_config(mode="dicts")
"""

# After all of it: what was thrown away is gone, and the optimizer steps as one that nothing ever touched.
END = """
optimizer._averages = []
optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"]}) if "saved" in globals() else None
optimizer.param_groups[:] = [{**optimizer.defaults, **added, "params": params}]
optimizer.state.clear()
untouched = make(parameters(len(params)))
for p in params: p.data, p.grad = np.ones(SIZE, np.float32), np.ones(SIZE, np.float32)
for each in (optimizer, untouched):
    for _ in range(3): each.step()
for p, q in zip(params, untouched.param_groups[0]["params"]):
    assert p.data.tobytes() == q.data.tobytes(), (p.data, q.data)
optimizer = ema = scheduler = saved = None
assert not leaked(), leaked()
assert done[0] > 1, done
print(*done)
"""


def attacked(name: str, attacks: str, *actions: str) -> None:
    """Two threads step, each action goes on in one of its own."""
    code = f"""{PREAMBLE}
cls, given = OPTIMIZERS[{name!r}]
make = lambda params: cls(params, **given)
params = parameters(20)
optimizer = make(params)
added = {{k: v for k, v in optimizer.param_groups[0].items() if k not in optimizer.defaults}}
def step():
    optimizer.step(**random.choice([{{}}, {{"max_norm": 1e3}}, {{"zero_grad": True}}]))
{attacks}
optimizer.step()
done = run(step, step, {", ".join(actions)})
{END}"""
    print(name, *actions, in_process(code, 90 + 3 * SECONDS, OMP_NUM_THREADS="2"))


@pytest.mark.parametrize("attack", ["options", "lists", "gradients", "states", "entries"])
@pytest.mark.parametrize("name", ["Adam", "AdamW in 8 bits"])
def test_what_a_step_walks_over_is_taken_away(name: str, attack: str) -> None:
    attacked(name, ATTACKS, attack, attack, attack)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_of_it_is_taken_away_at_once(name: str) -> None:
    attacked(name, ATTACKS, "options", "lists", "gradients", "states", "entries", "states")


CALLED = ["read", "duplicate", "load", "average", "hooks", "schedule", "groups", "clear", "clip", "file", "threads"]


@pytest.mark.parametrize("name", ["Adam", "Prodigy"])
def test_every_method_is_called_meanwhile(name: str) -> None:
    attacked(name, CALLS, *CALLED)


def test_every_method_is_called_while_all_is_taken_away() -> None:
    attacked("Adam", ATTACKS + CALLS, *CALLED, "options", "lists", "gradients", "states", "entries")


def test_snapshots_are_of_whole_steps_and_every_step_counts() -> None:
    """While two threads step, the rate changes, and lists and gradients are replaced by equal ones."""
    code = f"""{PREAMBLE}
params = parameters(20) + parameters(2, 20_000)
optimizer = pyopt.Adam(params, lr=0.5)
steps = [0, 0]
def step(k):
    optimizer.step()
    steps[k] += 1
def rate():
    optimizer.param_groups[0]["lr"] = random.choice([0.5, 1.0])
def equal():
    for p in params: p.grad = np.ones(p.data.size, np.float32)
    optimizer.param_groups[0]["params"] = list(params)
def snapshot():
    state = optimizer.state_dict()["state"]
    assert len({{entry["step"] for entry in state.values()}}) <= 1
    assert len({{entry["exp_avg"].flat[0] for entry in state.values()}}) <= 1
    assert all(same(entry["exp_avg"]) for entry in state.values())
run(lambda: step(0), lambda: step(1), rate, equal, snapshot, clear=RuntimeError)
assert {{optimizer.state[p]["step"] for p in params}} == {{sum(steps)}}, steps
assert len({{p.data.flat[0] for p in params}}) == 1 and all(same(p.data) for p in params)
assert sum(steps) > 1, steps
"""
    in_process(code, 90 + 3 * SECONDS, OMP_NUM_THREADS="2")


def test_optimizers_in_threads_of_their_own_are_as_if_alone() -> None:
    """Four threads, each with optimizers of its own, small and large, beside blocks of numbers of threads."""
    code = f"""{PREAMBLE}
def trained(seed):
    numbers = np.random.default_rng(seed)
    cls, given = list(OPTIMIZERS.values())[seed % len(OPTIMIZERS)]
    params = [pyopt.Parameter(numbers.normal(size=n).astype("f")) for n in (3, 70_000, 1, 1024, 300)]
    optimizer = cls(params, **given)
    ema = averaging.EMA(optimizer, 0.9)
    for _ in range(10):
        optimizer.step(grads=[numbers.normal(size=p.data.size).astype("f") for p in params], max_norm=5.0)
    return b"".join(p.data.tobytes() for p in params) + b"".join(a.tobytes() for a in ema.averages)
expected = [trained(seed) for seed in range(12)]
turns = itertools.count()
def train():
    seed = next(turns) % len(expected)
    assert trained(seed) == expected[seed], seed
def block():
    with pyopt.num_threads(random.choice([1, 2, 4])): time.sleep(1e-4)
done = run(train, train, train, train, block, clear=())
assert all(done[:4]), done
print(*done)
"""
    in_process(code, 60 + 3 * SECONDS, OMP_NUM_THREADS="2")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_threads_of_a_forked_child_find_the_lock_free_once() -> None:
    """Forked in the middle of a step of another thread: the child's threads come to the lock at the same moment."""
    code = f"""{PREAMBLE}
import os
large = parameters(1, 2_000_000)
optimizer = pyopt.SGD(large, lr=1.0, momentum=0.5)
end = threading.Event()
def step_on():
    while not end.is_set(): optimizer.step()
stepping = threading.Thread(target=step_on, daemon=True)
stepping.start()
def child():
    optimizer.param_groups[0]["params"] = params = parameters(3)
    steps, gate = [0] * 4, threading.Barrier(4)
    def step(k):
        gate.wait()
        for _ in range(20):
            try:
                optimizer.step()
                steps[k] += 1
            except RuntimeError as error:
                assert "already running" in str(error), error
    threads = [threading.Thread(target=step, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    twin = pyopt.SGD(parameters(1), lr=1.0, momentum=0.5)
    for _ in range(sum(steps)): twin.step()
    assert not failures and all((p.data == twin.param_groups[0]["params"][0].data).all() for p in params), failures
begin, forks = time.monotonic(), 0
while forks < 3 or time.monotonic() < begin + SECONDS:
    forks += 1
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
end.set()
stepping.join(60)
"""
    in_process(code, 120 + 3 * SECONDS, OMP_NUM_THREADS="2")


def test_a_fork_inside_a_step_leaves_the_lock_with_the_thread_that_goes_on() -> None:
    """Other threads of the child wait for its end."""
    code = f"""{PREAMBLE}
import os
class Forking(pyopt.SGD):
    def new_state(self, p, group):
        global pid
        if pid is None:
            pid = os.fork()
            if pid == 0:
                done = []
                thread = threading.Thread(target=lambda: done.append(optimizer.state_dict()))
                thread.start()
                time.sleep(0.2)
                assert not done, "a second thread has got the lock in the middle of a step"
                rest.append(thread)
        return super().new_state(p, group)
pid, rest = None, []
params = parameters(2)
optimizer = Forking(params, lr=1.0, momentum=0.5)
optimizer.step()
assert all((p.data == 0).all() for p in params)
for thread in rest: thread.join(30)
if pid: assert os.waitpid(pid, 0)[1] == 0
"""
    in_process(code, 60)
