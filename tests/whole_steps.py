"""What a whole step is: the oracle's step on a snapshot. And tests in processes, where a crash is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np

import pyopt
import reference
from apart import apart

ORACLES = {
    pyopt.SGD: reference.sgd,
    pyopt.Adam: reference.adam,
    pyopt.AdamW: reference.adam,
    pyopt.RMSprop: reference.rmsprop,
    pyopt.Adagrad: reference.adagrad,
    pyopt.Lion: reference.lion,
}
# Per class options with much state; SGD once more without state and once with the momentum that starts as the gradient.
KINDS = [
    (pyopt.SGD, {"lr": 0.1}),
    (pyopt.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (pyopt.Adam, {"lr": 0.1, "amsgrad": True}),
    (pyopt.AdamW, {"lr": 0.1}),
    (pyopt.RMSprop, {"lr": 0.1, "momentum": 0.9, "centered": True}),
    (pyopt.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    (pyopt.Lion, {"lr": 0.1, "weight_decay": 0.1}),
]
KIND_IDS = ["-".join([cls.__name__, *options]) for cls, options in KINDS]


def isolated(test, seconds=60):
    """A test that runs in a forked child: a crash or a hang there fails it alone."""
    return apart(test, seconds)


def in_process(code: str, seconds: float = 60, **environment: str) -> str:
    """What a program prints in a fresh process; an end by a signal, an error or a hang is a failure."""
    path = os.pathsep.join(p for p in [os.path.dirname(__file__), *sys.path] if p)
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert result.returncode == 0, f"ended with {result.returncode}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def oracle_of(opt):
    return next(ORACLES[cls] for cls in type(opt).__mro__ if cls in ORACLES)


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def in_double(option):
    """Numbers of NumPy as Python's: scalars are computed in double, whatever they come as."""
    if isinstance(option, tuple):
        return tuple(map(in_double, option))
    return option.item() if isinstance(option, np.generic) else option


def snapshot(opt):
    """Copies of all that a step writes: (options, data, state) per parameter, in the order of the groups."""
    out = []
    for group in opt.param_groups:
        options = {k: in_double(v) for k, v in group.items() if k != "params"}
        for p in group["params"]:
            state = dict.items(opt.state[p]) if p in opt.state else ()
            copied = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in state}
            out.append((options, p.data.copy(), copied))
    return out


def advance(opt, before, grads):
    """A whole step, by the oracle: what the snapshot is after it."""
    out = []
    rule = oracle_of(opt)
    with np.errstate(all="ignore"):
        for (h, data, state), g in zip(before, grads, strict=True):
            if g is None:
                out.append((h, data, state))
                continue
            new, changed = rule(data, np.array(g), state, h)
            changed = {k: np.asarray(v, data.dtype) if isinstance(state.get(k, v), np.ndarray | np.floating) else v
                       for k, v in changed.items()}  # fmt: skip
            out.append((h, np.asarray(new, data.dtype), state | changed))
    return out


def bits(x):
    return (x.dtype, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else (type(x), x)


def numbers(shot):
    """A snapshot as something to compare in bits. Empty state is no state."""
    return [(bits(data), {k: bits(v) for k, v in state.items()}) for _, data, state in shot]


def values(opt):
    return numbers(snapshot(opt))


def random(shape, dtype="float32", seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def in_place(array, **fields):
    """Set shape, strides or dtype of the array object itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in fields.items():
            setattr(array, name, value)


def refused(opt, action, error=(TypeError, ValueError, KeyError), words=()):
    """It raises, names these words, and has changed nothing."""
    before = values(opt)
    try:
        action()
    except error as e:
        assert all(word in str(e) for word in words), f"{e!r} does not name {words}"
    else:
        raise AssertionError("it must raise")
    assert values(opt) == before, "it raised and something has changed"


def steps_right(opt, grads=None, steps=2, **arguments):
    """The next steps are those of the oracle, in bits."""
    for i in range(steps):
        given = [p.grad for p in params_of(opt)] if grads is None else grads
        expected = numbers(advance(opt, snapshot(opt), given))
        if grads is None:
            opt.step(**arguments)
        else:
            opt.step(grads=grads)
        assert values(opt) == expected, f"step {i + 1} is wrong"
