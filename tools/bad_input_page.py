"""Write docs/bad_input.md: what is refused, and with which message, by doing it: `python tools/bad_input_page.py`.

The inputs are those of the tests, which also see that nothing has changed after the error.
"""

from __future__ import annotations

import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np

import pyopt

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
import test_averaging  # noqa: E402
import test_bad_input  # noqa: E402
import test_files  # noqa: E402
import test_lr_scheduler  # noqa: E402
import test_names  # noqa: E402
import test_rows  # noqa: E402
import test_rows_clipping  # noqa: E402
import test_step_extras  # noqa: E402

PAGE = ROOT / "docs" / "bad_input.md"
INTRODUCTION = """\
# What is refused

Each of these is an error before anything has changed: parameters, state, options, gradients and files stay as they
were, and after the input is mended everything goes on as if nothing had been. A message names the thing, its value and
what was expected; a parameter is called by its name where it has one, else by its number over all groups.

This page is made by `tools/bad_input_page.py`, which does what the table says and prints what comes out. The inputs are
those of the tests. On tensors, `pyopt.torch` has torch's constructors and messages, and checks what torch lets pass:
see [Differences from torch](differences.md).
"""

Row = tuple[str, Callable[[], Any]]  # what is done, in words or code, and the doing


# --- the inputs, by section -------------------------------------------------------------------------------------------


def w(dtype: str = "float32") -> pyopt.Parameter:
    return pyopt.Parameter(np.ones(3, dtype), np.ones(3, dtype), name="w")


def parameters() -> Iterator[Row]:
    """What an optimizer is made of."""
    for name, (params, _, _) in test_bad_input.NO_PARAMETERS.items():
        yield name, lambda params=params: pyopt.Adam(params)
    for name, (params, _, _) in test_names.BAD_PARAMS.items():
        yield f"mapping: {name}", lambda params=params: pyopt.Adam(params)


def arrays() -> Iterator[Row]:
    """A parameter must be a writable float32 or float64 array, dense in memory."""
    for name, (array, _, _) in test_bad_input.bad_arrays("float32").items():
        yield name, lambda array=array: pyopt.Adam([("w", array)])


def shared_memory() -> Iterator[Row]:
    """Two parameters must not share memory."""
    for name, made in test_bad_input.SHARED.items():
        yield name, lambda made=made: pyopt.Adam(list(made(np.ones(16))))


def options() -> Iterator[Row]:
    """Options are checked in the constructor, in groups, and in each step, when they have been changed."""
    seen = set()
    for cls, names in test_bad_input.RULES.items():
        for name, values in names.items():
            for value, _ in values:
                found = said(lambda cls=cls, name=name, value=value: cls([w()], **{name: value}))
                kind = name, re.sub(r"== .*?, must|, not \w+$", "", found[1])
                if kind not in seen and not (isinstance(value, tuple) and value[:1] == (0.9,) and len(value) == 2):
                    seen.add(kind)
                    yield f"`{cls.__name__}(..., {name}={value!r})`", lambda a=cls, b=name, c=value: a([w()], **{b: c})
    for cls, given, _ in test_bad_input.OPTIONS:
        text = ", ".join(f"{key}={value!r}" for key, value in given.items())
        yield f"`{cls.__name__}(..., {text})`", lambda cls=cls, given=given: cls([w()], **given)


# Of the keys that are refused alike by all, those of two optimizers are shown, and these.
SHOWN = {"aplha": pyopt.RMSprop, "decoupled_weight_decay": pyopt.AdamW}


def keys() -> Iterator[Row]:
    """A key of a group that looks like a misspelt option; others are your own."""
    for cls, given, _ in test_bad_input.IN_GROUPS:
        if cls in (pyopt.SGD, pyopt.Adam, SHOWN.get(next(iter(given)))):
            text = str({"params": ..., **given}).replace("Ellipsis", "...")
            yield f"`{cls.__name__}([{text}])`", lambda cls=cls, given=given: cls([{"params": [w()], **given}])


def gradients() -> Iterator[Row]:
    """A gradient has the shape and dtype of its parameter, here (5, 3) and float32, in any memory order."""
    for name, (spoil, _, _) in test_bad_input.BAD_GRADS.items():

        def step(spoil: Callable[[Any], Any] = spoil) -> None:
            optimizer, (*_, last) = test_bad_input.make(named=True)
            last.grad = spoil(last.grad)
            optimizer.step()

        yield name, step
    for text, grads in {"two of three": [None, None], "a number": 1.5, "an array": np.ones(3)}.items():
        yield f"grads: {text}", lambda grads=grads: test_bad_input.make()[0].step(grads=grads)
    for name, (grads, _, _) in test_names.BAD.items():
        yield f"by name: {name}", lambda grads=grads: pyopt.Adam(test_names.tree()).step(grads=grads)


def rows() -> Iterator[Row]:
    """Row-sparse ones: their arguments, those of a table of shape (4, 3) in a step, its bound, and their clipping."""
    for name, (make, _, _) in test_rows.NEVER.items():
        yield name, make
    for name, (make, _, _) in test_rows.BAD.items():
        table = pyopt.Parameter(np.ones((4, 3)), name="table")
        yield name, lambda make=make, table=table: pyopt.SGD([table]).step(grads=[make()])
    for cls, value in ((pyopt.SGD, 0), (pyopt.SparseAdam, "1"), (pyopt.Adam, 1.0)):
        what = f"`{cls.__name__}([table], max_row_norm={value!r})`"
        yield what, lambda cls=cls, value=value: cls([np.ones((4, 3))], max_row_norm=value)
    for name, (make, _, _) in test_rows_clipping.BAD.items():
        yield f"`clip_grad_norm_`: {name}", lambda make=make: pyopt.clip_grad_norm_([make()], 0.1)


def step_arguments() -> Iterator[Row]:
    """What else a step is given."""
    for given, _ in test_step_extras.WRONG:
        ((name, value),) = given.items()
        yield f"`step({name}={value!r})`", lambda given=given: pyopt.SGD([w()]).step(**given)
    yield "`step(gradient_factor=nan)`", lambda: pyopt.SGD([w()]).step(gradient_factor=np.nan)
    yield "`step(3)`", lambda: pyopt.SGD([w()]).step(3)  # type: ignore[arg-type]
    yield "`step(grads=..., zero_grad=True)`", lambda: pyopt.SGD([w()]).step(grads=[np.ones(3)], zero_grad=True)
    yield "no gradient for bare arrays", lambda: pyopt.SGD([np.ones(3)]).step()


def state() -> Iterator[Row]:
    """State that was replaced between two steps: "exp_avg" of the last parameter, of shape (5, 3), and "step"."""
    for name, (spoil, _, _) in test_bad_input.BAD_LIVE_ENTRIES.items():

        def step(key: str = "exp_avg", spoil: Callable[[Any], Any] = spoil) -> None:
            optimizer, (*_, last) = test_bad_input.make(named=True)
            optimizer.state[last][key] = spoil(optimizer.state[last][key])
            optimizer.step()

        yield name, step
    for name, value in test_bad_input.BAD_STEPS.items():
        yield f"step: {name}", lambda step=step, value=value: step("step", lambda _: value)
    for name, other in test_bad_input.SHARED_STATE.items():

        def shared(other: Callable[..., Any] = other) -> None:
            p, q = (pyopt.Parameter(np.ones(7), np.ones(7), name=name) for name in "pq")
            optimizer = pyopt.Adam([q, p])
            optimizer.step()
            optimizer.state[p]["exp_avg"] = other(optimizer, p, q)
            optimizer.step()

        yield f"memory of {name}", shared


def checkpoints() -> Iterator[Row]:
    """What `load_state_dict` is given: the dict of an optimizer of three parameters in two groups, damaged."""
    for name, (change, _, _) in test_bad_input.BAD_STATE_DICTS.items():

        def load(change: Callable[[Any], Any] = change) -> None:
            saved = test_bad_input.make()[0].state_dict()
            change(saved)
            test_bad_input.make()[0].load_state_dict(saved)

        yield name, load
    for name, (spoil, _, _) in test_bad_input.BAD_ENTRIES.items():

        def entry(saved: Any, spoil: Callable[[Any], Any] = spoil) -> None:
            saved["state"][2]["exp_avg"] = spoil(saved["state"][2]["exp_avg"])

        yield f"exp_avg: {name}", lambda load=load, entry=entry: load(entry)
    yield "of another optimizer", lambda: pyopt.SGD([w()]).load_state_dict(pyopt.Lion([w()]).state_dict())


def schedules() -> Iterator[Row]:
    """Arguments of schedules, with an optimizer of two groups."""
    for cls, given, _ in test_lr_scheduler.BAD:
        text = ", ".join(f"{key}={shown(value)}" for key, value in given.items())
        yield (
            f"`{cls.__name__}(..., {text})`",
            lambda cls=cls, given=given: cls(test_lr_scheduler.new_optimizer(), **given),
        )
    yield "`StepLR(3, ...)`", lambda: pyopt.lr_scheduler.StepLR(3, 1)

    def by_hand() -> None:
        optimizer = pyopt.SGD([w()], lr=0.1)
        scheduler = pyopt.lr_scheduler.StepLR(optimizer, 3)
        optimizer.param_groups[0]["lr"] = 0.2
        scheduler.step()

    yield "lr changed by hand", by_hand


def averages() -> Iterator[Row]:
    """Arguments of averages."""
    for kind, name, values in test_averaging.test_wrong_arguments.pytestmark[0].args[1]:
        for value in values:
            cls = getattr(pyopt.averaging, kind)
            yield (
                f"`{kind}(..., {name}={value!r})`",
                lambda cls=cls, name=name, value=value: cls(pyopt.SGD([w()]), **{name: value}),
            )


def files() -> Iterator[Row]:
    """What `pyopt.load` finds in run.safetensors: other bytes than `pyopt.save` has written."""
    path = Path("run.safetensors")
    for name, (data, _) in test_files.BYTES.items():

        def load(data: bytes = data) -> None:
            path.write_bytes(data)
            pyopt.load(path, pyopt.SGD([w()]))

        yield name, load


def documents() -> Iterator[Row]:
    """What `pyopt.load` finds in run.safetensors: sound in its form, but not what belongs there."""
    path = Path("run.safetensors")
    for name, (change, _) in test_files.WRONG.items():

        def load(change: Callable[[Any], Any] = change) -> None:
            test_files.saved(path)
            test_files.with_document(path, change)
            optimizer, schedule, average = test_files.fresh()
            pyopt.load(path, optimizer, schedulers=[schedule], averages=[average])

        yield name, load
    yield "no such file", lambda: pyopt.load("nothing.safetensors", pyopt.SGD([w()]))


def threads() -> Iterator[Row]:
    """Numbers of threads."""
    for value in (0, -1, 1.5, "2"):
        yield f"`set_num_threads({value!r})`", lambda value=value: pyopt.set_num_threads(value)


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "Parameters": parameters,
    "Arrays": arrays,
    "Shared memory": shared_memory,
    "Options": options,
    "Keys of groups": keys,
    "Gradients": gradients,
    "Gradients of rows": rows,
    "Arguments of a step": step_arguments,
    "State": state,
    "Checkpoints": checkpoints,
    "Schedules": schedules,
    "Averages": averages,
    "Files: bytes": files,
    "Files: content": documents,
    "Threads": threads,
}


# --- writing ----------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """Code for a value; functions by their names."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return getattr(value, "__name__", None) or repr(value)


def said(action: Callable[[], Any]) -> tuple[str, str]:
    """The kind of error that an action raises, and its message."""
    try:
        action()
    except Exception as error:
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        message = re.sub(r"(no valid JSON: )(?!it holds|a key).*|(cannot be one: ).*", r"\1\2...", message)  # Python's
        return type(error).__name__, message
    raise AssertionError("it was not refused")


def row(what: str, kind: str, message: str) -> str:
    """A line of a table."""
    message = textwrap.shorten(f"{kind}: {message}", 400, placeholder=" ...")
    fence = "``" if "`" in message else "`"
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in (what, f"{fence}{message}{fence}")) + " |"


def section(title: str, rows: Callable[[], Iterator[Row]]) -> str:
    """A table with its heading; what has one message shares a line."""
    found: dict[tuple[str, str], list[str]] = {}
    for what, action in rows():
        found.setdefault(said(action), []).append(what)
    lines = [row(", ".join(dict.fromkeys(whats)), *error) for error, whats in found.items()]
    return "\n".join([f"## {title}\n", f"{rows.__doc__}\n", "| what | error |", "| --- | --- |", *lines])


def page() -> str:
    """The text of docs/bad_input.md."""
    with tempfile.TemporaryDirectory() as directory, chdir(directory):
        return "\n\n".join([INTRODUCTION.strip(), *(section(*each) for each in SECTIONS.items())]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
