"""A step is a transaction: an exception at any point inside it leaves the optimizer as before the step, or as after it.

PYOPT_POINTS=all tries each bytecode for every optimizer, PYOPT_SIGNALS=n interrupts n episodes by real signals.
"""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest

import pyopt
from whole_steps import (
    KIND_IDS,
    KINDS,
    advance,
    in_process,
    isolated,
    numbers,
    params_of,
    random,
    snapshot,
    values,
)

SHAPES = [(3, 4), (5,), ()]


class Stop(BaseException):
    """What interrupts."""


# ------------------------------------------------------------------------------------------------------ kinds of change


def array_keys(opt, p):
    return [k for k, v in opt.state.get(p, {}).items() if isinstance(v, np.ndarray)]


def change_nothing(opt):
    pass


def change_lr(opt):
    opt.param_groups[1]["lr"] = 0.7


def change_other_options(opt):
    group = opt.param_groups[0]
    group["maximize"] = not group["maximize"]
    if "betas" in group:
        group["betas"] = (0.4, 0.6)
    if "weight_decay" in group:
        group["weight_decay"] = 0.3


def add_group(opt):
    opt.add_param_group({"params": [pyopt.Parameter(random((2, 3), seed=70)), pyopt.Parameter(random(9, seed=71))]})


def remove_group(opt):
    del opt.param_groups[0]


def swap_groups(opt):
    opt.param_groups[:] = opt.param_groups[::-1]


def add_parameter(opt):
    opt.param_groups[0]["params"].append(pyopt.Parameter(random((4, 2), seed=72)))


def remove_parameter(opt):
    opt.state.pop(opt.param_groups[1]["params"].pop(), None)


def drop_state(opt):
    opt.state.pop(params_of(opt)[1], None)


def drop_all_state(opt):
    opt.state.clear()


def replace_state(opt):
    for p in params_of(opt)[:2]:
        for key in array_keys(opt, p):
            opt.state[p][key] = np.square(opt.state[p][key]) + opt.state[p][key]


def replace_state_dicts(opt):
    for p in params_of(opt):
        if p in opt.state:
            opt.state[p] = dict(opt.state[p])


def replace_step_counts(opt):
    for i, p in enumerate(params_of(opt)):
        if "step" in opt.state.get(p, {}):
            opt.state[p]["step"] = 7 + i


def replace_data(opt):
    for i, p in enumerate(params_of(opt)):
        p.data = np.asfortranarray(random(p.data.shape, seed=80 + i)) if not opt.state.get(p) else p.data.copy("K")


def replace_data_by_another_type(opt):
    p = params_of(opt)[0]
    opt.state.pop(p, None)
    p.data = random((3, 4), "float64", 81)


def load(opt):
    saved = opt.state_dict()
    for state in saved["state"].values():
        for value in state.values():
            if isinstance(value, np.ndarray):
                value += 0.25
    opt.load_state_dict(saved)


def reshape(opt):
    p = params_of(opt)[1]
    for array in [p.data, *(opt.state[p][k] for k in array_keys(opt, p))]:
        array.shape = (5, 1)


CHANGES = [change_nothing, change_lr, change_other_options, add_group, remove_group, swap_groups, add_parameter]
CHANGES += [remove_parameter, drop_state, drop_all_state, replace_state, replace_state_dicts, replace_step_counts]
CHANGES += [replace_data, replace_data_by_another_type, load, reshape]
GRADIENTS = {
    "plain": lambda p, g: g,
    "copied": lambda p, g: g.T.copy().T if g.ndim > 1 else np.repeat(g, 2)[::2].reshape(g.shape),
    "aliased": lambda p, g: p.data[::-1] if p.data.ndim else p.data,
    "none": lambda p, g: None if p.data.ndim == 1 else g,
}
# (name, steps before, change, kind of gradients)
SCENARIOS = [("first step", 0, change_nothing, "plain"), ("first step, copied gradients", 0, change_nothing, "copied")]
SCENARIOS += [(c.__name__.replace("_", " "), 2, c, "plain") for c in CHANGES]
SCENARIOS += [(f"gradients {k}", 2, change_nothing, k) for k in list(GRADIENTS)[1:]]
SCENARIOS += [("change lr, gradients copied", 2, change_lr, "copied"), ("new state, aliased", 2, drop_state, "aliased")]
EACH_SCENARIO = pytest.mark.parametrize("scenario", SCENARIOS, ids=[s[0] for s in SCENARIOS])
EACH_KIND = pytest.mark.parametrize("cls, options", KINDS, ids=KIND_IDS)


def prepare(cls, options, scenario):
    """An optimizer before the step that will be interrupted, and its gradients."""
    _, steps, change, gradients = scenario
    params = [pyopt.Parameter(random(s, seed=i)) for i, s in enumerate(SHAPES)]
    opt = cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.2}], **options)
    for k in range(steps):
        opt.step(grads=[random(p.data.shape, seed=10 * k + i) for i, p in enumerate(params)])
    change(opt)
    now = params_of(opt)
    for i, p in enumerate(now):
        p.grad = GRADIENTS[gradients](p, random(p.data.shape, p.data.dtype, 40 + i))
    return opt


def is_before_or_after(opt, before, after):
    now = values(opt)
    if now == numbers(before):
        return "before"
    if now == numbers(after):
        return "after"
    parts = [
        (i, what)
        for i, (n, b, a) in enumerate(zip(now, numbers(before), numbers(after), strict=False))
        for what in ("data", "state")
        if n[what == "state"] not in (b[what == "state"], a[what == "state"])
    ]
    raise AssertionError(f"neither before nor after the step; torn in themselves: {parts}; {len(now)} parameters")


def goes_on(opt, steps=2):
    """It steps as the oracle does from where it is, with the gradients that it has and with other ones."""
    for k in range(steps):
        grads = [p.grad for p in params_of(opt)]
        if k:
            grads = [random(p.data.shape, p.data.dtype, 90 + i) for i, p in enumerate(params_of(opt))]
        expected = numbers(advance(opt, snapshot(opt), grads))
        opt.step() if k == 0 else opt.step(grads=grads)
        assert values(opt) == expected, f"step {k + 1} after the interrupted one is wrong"


def exhaust(cls, options, scenario, interrupted_step, limit=100_000, stride=1):
    """Interrupt at the 1st, 2nd, ... n-th point, until a step passes without reaching n. Returns how many there are."""
    opt = prepare(cls, options, scenario)
    before = snapshot(opt)
    after = advance(opt, before, [p.grad for p in params_of(opt)])
    seen = {"before": 0, "after": 0}
    n = 1
    while n < limit:
        opt = prepare(cls, options, scenario)
        try:
            reached = interrupted_step(opt, n)
        except BaseException as error:
            if not isinstance(error, Stop):
                raise AssertionError(f"point {n}: {error!r} in place of the interruption") from error
            reached = True
        try:
            where = is_before_or_after(opt, before, after)
            if reached:
                seen[where] += 1
            else:
                assert where == "after", "a step that nothing stopped"
            goes_on(opt)
        except Exception as error:
            raise AssertionError(f"interrupted at point {n}: {type(error).__name__}: {error}") from error
        if not reached:
            return seen
        n += stride
    raise AssertionError(f"a step has more than {limit} points")


# ------------------------------------------------------------------------------------------- from outside: every point


def by_profile(opt, n):
    """Raise at the n-th call or return of a function, in Python or in C."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        if frame.f_code is by_profile.__code__:
            return
        count += 1
        if count == n:
            raise Stop

    sys.setprofile(profile)
    try:
        opt.step()
    finally:
        sys.setprofile(None)
    return count >= n


def by_trace(opt, n, opcodes):
    """Raise at the n-th line, or bytecode, of Python inside step."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = opcodes, not opcodes
        count += 1
        if count == n:
            raise Stop
        return trace

    before = sys.gettrace()  # a measurement of coverage
    sys.settrace(trace)
    try:
        opt.step()
    finally:
        sys.settrace(before)
    return count >= n


def by_line(opt, n):
    return by_trace(opt, n, False)


def by_opcode(opt, n):
    return by_trace(opt, n, True)


OVERRIDES = ["check_group", "state_streams", "scalars", "new_state", "initial_value"]


def watched(cls):
    """A subclass that overrides all it may, so that Python runs at each of these points."""

    def override(name):
        def method(self, *args, **kwargs):
            self.tick(name)
            result = getattr(cls, name)(self, *args, **kwargs)
            self.tick(name)
            return result

        return method

    return type(f"Watched{cls.__name__}", (cls,), {"tick": lambda *args: None, **{n: override(n) for n in OVERRIDES}})


EVERY = KINDS if os.environ.get("PYOPT_POINTS") else KINDS[1:3]
EVERY_IDS = KIND_IDS if os.environ.get("PYOPT_POINTS") else KIND_IDS[1:3]


@EACH_SCENARIO
@EACH_KIND
@isolated
def test_interrupted_at_any_call(cls, options, scenario):
    seen = exhaust(cls, options, scenario, by_profile)
    assert seen["before"], "some calls come before the first write"


@EACH_SCENARIO
@pytest.mark.parametrize("cls, options", EVERY, ids=EVERY_IDS)
@isolated
def test_interrupted_at_any_call_of_overrides(cls, options, scenario):
    assert exhaust(watched(cls), options, scenario, by_profile)["before"] > 10


@EACH_SCENARIO
@pytest.mark.parametrize("cls, options", EVERY, ids=EVERY_IDS)
@isolated
def test_interrupted_at_any_line(cls, options, scenario):
    assert exhaust(cls, options, scenario, by_line, stride=1 if os.environ.get("PYOPT_POINTS") else 2)["before"]


@EACH_SCENARIO
@pytest.mark.parametrize("cls, options", EVERY, ids=EVERY_IDS)
@isolated
def test_interrupted_at_any_bytecode(cls, options, scenario):
    assert exhaust(cls, options, scenario, by_opcode, stride=1 if os.environ.get("PYOPT_POINTS") else 7)["before"]


# --------------------------------------------------------------------------------------- from inside: what a step calls


def by_override(opt, n, error=Stop):
    count = 0

    def tick(*args):
        nonlocal count
        count += 1
        if count == n:
            raise error

    opt.tick = tick
    try:
        opt.step()
    finally:
        opt.tick = lambda *args: None
    return count >= n


@EACH_SCENARIO
@EACH_KIND
@isolated
def test_interrupted_in_any_override(cls, options, scenario):
    exhaust(watched(cls), options, scenario, by_override)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, KeyError, AttributeError, TypeError, SystemExit])
@pytest.mark.parametrize("scenario", [SCENARIOS[0], SCENARIOS[3], SCENARIOS[5]], ids=lambda s: s[0])
@isolated
def test_overrides_raise_what_might_be_taken_for_something_else(scenario, error):
    def step(opt, n):
        try:
            return by_override(opt, n, error)
        except error:
            raise Stop from None

    exhaust(watched(pyopt.Adam), {}, scenario, step)


class Hostile:
    """Counts what is asked of it, and raises at the n-th question."""

    count = 0
    at = None

    @classmethod
    def ask(cls):
        Hostile.count += 1
        if Hostile.count == Hostile.at:
            raise Stop


def questions(base, names):
    def question(name):
        inherited = getattr(base, name)

        def method(self, *args):
            Hostile.ask()
            return inherited(self, *args)

        return method

    return type(f"Hostile{base.__name__.title()}", (base,), {n: question(n) for n in names if hasattr(base, n)})


COMPARED = ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"]
COUNTED = [
    "__add__",
    "__radd__",
    "__sub__",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__rtruediv__",
    "__pow__",
    "__rpow__",
]
COUNTED += ["__float__", "__int__", "__index__", "__bool__", "__neg__", "__round__", "__trunc__"]
LOOKED_UP = ["__getitem__", "__setitem__", "__contains__", "__len__", "__iter__", "get", "items", "keys", "values"]
LOOKED_UP += ["setdefault", "update", "pop", "__eq__", "copy"]
HostileFloat = questions(float, COMPARED + COUNTED)
HostileInt = questions(int, COMPARED + COUNTED)
HostileTuple = questions(tuple, [*COMPARED, "__getitem__", "__len__", "__iter__", "__contains__"])
HostileDict = questions(dict, LOOKED_UP)
HostileList = questions(list, [*COMPARED[:-1], "__getitem__", "__len__", "__iter__", "__contains__"])
HostileString = questions(str, COMPARED)
HostileParameter = questions(pyopt.Parameter, ["__eq__", "__hash__"])
HostileArray = questions(np.ndarray, ["__eq__", "__getitem__", "__array_finalize__", "copy", "__len__"])


class LazyGradient(pyopt.Parameter):
    """A gradient that is computed when it is asked for."""

    @property
    def grad(self):
        Hostile.ask()
        return random((5,), seed=99)

    @grad.setter
    def grad(self, value):
        pass


class ConvertedGradient:
    """An array of another library: asked for what it is."""

    shape = property(lambda self: (Hostile.ask(), (5,))[1])
    dtype = property(lambda self: (Hostile.ask(), np.dtype("float32"))[1])
    ndim = property(lambda self: (Hostile.ask(), 1)[1])

    def __array__(self, dtype=None, copy=None):
        Hostile.ask()
        return random((5,), seed=99)


def hostile_state_value(opt):
    p = params_of(opt)[1]
    for key in array_keys(opt, p):
        opt.state[p][key] = opt.state[p][key].view(HostileArray)


def hostile_count(opt):
    p = params_of(opt)[1]
    if "step" in opt.state.get(p, {}):
        opt.state[p]["step"] = HostileInt(opt.state[p]["step"])


def hostile_options(opt):
    for group in opt.param_groups:
        for key, value in group.items():
            if type(value) is float:
                group[key] = HostileFloat(value)
            if type(value) is tuple:
                group[key] = HostileTuple(map(HostileFloat, value))


def hostile_group(opt):
    opt.param_groups[1] = HostileDict(opt.param_groups[1])


def hostile_groups(opt):
    opt.param_groups = HostileList(opt.param_groups)


def hostile_params(opt):
    opt.param_groups[0]["params"] = HostileList(opt.param_groups[0]["params"])


def hostile_keys(opt):
    group = opt.param_groups[0]
    opt.param_groups[0] = {HostileString(k): v for k, v in group.items()}


def hostile_entries(opt):
    for p in params_of(opt):
        opt.state[p] = HostileDict(opt.state.get(p, {}))


def hostile_state(opt):
    opt.state = HostileDict(opt.state)


def hostile_parameters(opt):
    opt.param_groups[0]["params"].append(HostileParameter(random((2, 2), seed=5)))
    opt.param_groups[0]["params"].append(LazyGradient(random((5,), seed=6)))


HOSTILE = [hostile_state_value, hostile_count, hostile_options, hostile_group, hostile_groups, hostile_params]
HOSTILE += [hostile_keys, hostile_entries, hostile_state, hostile_parameters]


@pytest.mark.parametrize("cls, options", KINDS[1:], ids=KIND_IDS[1:])
@isolated
def test_names_in_the_state_are_of_str(cls, options):
    """A subclass could run code where a count is stored: refused, without asking it."""
    opt = prepare(cls, options, ("hostile", 2, lambda opt: None, "plain"))
    p = params_of(opt)[0]
    opt.state[p] = {HostileString(k): v for k, v in opt.state[p].items()}
    Hostile.count = 0
    with pytest.raises(TypeError, match=r"parameter .* must be of str"):
        opt.step()
    assert Hostile.count == 0


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("change", HOSTILE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls, options", KINDS[1:], ids=KIND_IDS[1:])
@isolated
def test_interrupted_in_a_question_to_a_users_object(cls, options, change, steps):
    """Comparisons, hashes, conversions and look-ups of objects that the user put there."""

    def step(opt, n):
        Hostile.count, Hostile.at = 0, n
        try:
            opt.step()
        except (TypeError, ValueError):
            assert Hostile.count < n, "refused as such, before the question"
            raise Refused from None
        finally:
            Hostile.at = None
        return Hostile.count >= n

    try:
        exhaust(cls, options, ("hostile", steps, change, "plain"), step, 3000)
    except AssertionError as error:
        if not isinstance(error.__cause__, Refused):
            raise
        opt = prepare(cls, options, ("hostile", steps, change, "plain"))
        before = values(opt)
        with pytest.raises((TypeError, ValueError)):
            opt.step()
        assert values(opt) == before, "refused, and something has changed"


class Refused(BaseException):
    """An object that an optimizer need not take."""


@EACH_KIND
@isolated
def test_interrupted_in_the_conversion_of_a_gradient(cls, options):
    def step(opt, n):
        Hostile.count, Hostile.at = 0, n
        grads = [p.grad for p in params_of(opt)]
        grads[1] = ConvertedGradient()
        try:
            opt.step(grads=grads)
        finally:
            Hostile.at = None
        return Hostile.count >= n

    def change(opt):
        pass

    def same_gradient(opt):
        params_of(opt)[1].grad = random((5,), seed=99)

    scenario = ("converted", 2, change, "plain")
    original = GRADIENTS["plain"]
    GRADIENTS["plain"] = lambda p, g: random((5,), seed=99) if p.data.shape == (5,) else g
    try:
        exhaust(cls, options, scenario, step)
    finally:
        GRADIENTS["plain"] = original


@pytest.mark.parametrize("place", ["closure", "pre hook", "post hook", "gradients' iterator"])
@EACH_KIND
@isolated
def test_interrupted_around_a_step(cls, options, place):
    for scenario in SCENARIOS[0], SCENARIOS[4]:
        opt = prepare(cls, options, scenario)
        before = snapshot(opt)
        grads = [p.grad for p in params_of(opt)]
        after = advance(opt, before, grads)

        def stop(*args):
            raise Stop

        def some(grads=grads):
            yield grads[0]
            raise Stop

        handle = None
        if "hook" in place:
            handle = (opt.register_step_pre_hook if place == "pre hook" else opt.register_step_post_hook)(stop)
        arguments = {"closure": {"closure": stop}, "gradients' iterator": {"grads": some()}}.get(place, {})
        with pytest.raises(Stop):
            opt.step(**arguments)
        if handle:
            handle.remove()
        assert is_before_or_after(opt, before, after) == ("after" if place == "post hook" else "before")
        goes_on(opt)


# ------------------------------------------------------------------------------------------------------- real signals

SIGNALS = """
import random as chance, signal, sys, time, traceback
import numpy as np, pyopt
import test_interruption as t
from whole_steps import KINDS, advance, numbers, params_of, snapshot, values

episodes, seconds, seed = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
chance.seed(seed)

def handler(number, frame):
    raise t.Stop if chance.random() < 0.5 else KeyboardInterrupt

signal.signal(signal.SIGALRM, handler)
expected = {}

def history(kind, scenario):
    # snapshots after 0, 1, ... whole steps, by the oracle
    if (kind, scenario[0]) not in expected:
        opt = t.prepare(*KINDS[kind], scenario)
        shots = [snapshot(opt)]
        grads = [p.grad for p in params_of(opt)]
        own = scenario[3] == "aliased"
        for _ in range(1 if own else 12):
            shots.append(advance(opt, shots[-1], grads))
        expected[kind, scenario[0]] = list(map(numbers, shots))
    return expected[kind, scenario[0]]

began, count, inside, hit = time.monotonic(), 0, 0, {}
while count < episodes and time.monotonic() - began < seconds:
    kind, scenario = chance.randrange(len(KINDS)), chance.choice(t.SCENARIOS)
    shots = history(kind, scenario)
    opt = t.prepare(*KINDS[kind], scenario)
    done, where = 0, None
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(2e-6, 2e-4 if chance.random() < 0.7 else 2e-5))
        try:
            while done < len(shots) - 1:
                opt.step()
                done += 1
            while True:
                time.sleep(0.001)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (t.Stop, KeyboardInterrupt) as error:
        names = [f.name for f in traceback.extract_tb(error.__traceback__)]
        where = len(names) > 2 or "step" in names
    count += 1
    inside += bool(where)
    now = values(opt)
    who = f"episode {count} of seed {seed}: {KINDS[kind][0].__name__}, {scenario[0]}, after {done} steps"
    found = [k for k in (done, done + 1) if k < len(shots) and now == shots[k]]
    assert found, f"{who}: neither {done} nor {done + 1} whole steps"
    for params in [params_of(opt)]:
        if scenario[2] is not t.replace_step_counts and scenario[0] == "first step":
            steps = {opt.state[p].get("step") for p in params if p in opt.state}
            assert len(steps) <= 1, f"{who}: step counts {steps}"
    try:
        t.goes_on(opt)
    except Exception as error:
        raise AssertionError(f"{who}: {error!r}") from error
print(f"{count} episodes, {inside} interrupted inside step, 0 inconsistent")
"""


def test_interrupted_by_real_signals():
    episodes = int(os.environ.get("PYOPT_SIGNALS", 0))
    seconds = 5 if not episodes else 36_000
    seed = int(os.environ.get("PYOPT_SEED", 1))
    code = f"import sys; sys.argv[1:] = ['{episodes or 100_000}', '{seconds}', '{seed}']\n{SIGNALS}"
    out = in_process(code, seconds + 60, OMP_NUM_THREADS="2")
    print(out)
    count, inside = (int(part.split()[0]) for part in out.split(",")[:2])
    assert count and inside > count // 20, out


def test_interrupted_by_signals_while_threads_sweep():
    """Large arrays: the signal arrives while the kernels run, and is answered after the whole sweep."""
    out = in_process("""
import signal, random as chance, numpy as np, pyopt
chance.seed(2)
class Stop(BaseException): pass
def handler(*args): raise Stop
signal.signal(signal.SIGALRM, handler)
stopped = 0
with pyopt.num_threads(2):
    for episode in range(40):
        params = [pyopt.Parameter(np.zeros(n, np.float32), np.ones(n, np.float32)) for n in (3, 700_000, 300_000, 5)]
        opt, done = pyopt.SGD(params, lr=1.0), 0
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 4e-3))
            try:
                while done < 200:
                    opt.step()
                    done += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Stop:
            stopped += 1
        moved = {float(x) for p in params for x in (-p.data.min(), -p.data.max())}
        assert len(moved) == 1 and moved <= {done, done + 1}, (moved, done)
        opt.step()
        assert {float(x) for p in params for x in (-p.data.min(), -p.data.max())} == {moved.pop() + 1}
print(stopped)
""")
    assert int(out) > 10


@isolated
def test_stopped_step_lets_another_thread_step():
    """The lock is free after an interruption, whoever comes next."""
    p = pyopt.Parameter(np.zeros(4), np.ones(4))
    opt = watched(pyopt.SGD)([p], lr=1.0, momentum=0.9)
    reached, n = True, 1
    while reached and n < 100:  # each group brings new points
        q = pyopt.Parameter(np.zeros(4), np.ones(4))
        opt.add_param_group({"params": [q]})
        before = p.data.copy()
        try:
            reached = by_override(opt, n)
        except Stop:
            assert np.array_equal(p.data, before)
            worker = threading.Thread(target=opt.step)
            worker.start()
            worker.join(30)
            assert not worker.is_alive()
        assert not np.array_equal(p.data, before) and (q.data == -1).all()
        n += 1
