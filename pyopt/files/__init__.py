"""Runs in files: pyopt.save, pyopt.load, and `python -m pyopt inspect FILE`.

container.py    the file: header, checksums, data
replacing.py    how a file takes the place of another
plain.py        plain data as JSON
matching.py     what in the file belongs to what of the optimizer
sides.py        what differs between optimizers of arrays and of tensors (pyopt/torch/files.py)
schedules.py    schedulers, loaded aside
progress.py     the bar
inspecting.py   the table of what is in a file
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import starmap
from operator import call
from typing import Any

import numpy as np

from pyopt.checks import count
from pyopt.files import container
from pyopt.files.container import Array, Container
from pyopt.files.matching import LoadResult, by_class, follows_groups, follows_parameters, lacking, matched, rearranged
from pyopt.files.plain import Encoder, as_dict, decoded
from pyopt.files.progress import Progress
from pyopt.files.schedules import committed, staged
from pyopt.files.sides import Call, Side, Stay, kind_of, side_of

Path = str | os.PathLike[str]

COUNTERS = ("skipped_steps",)  # attributes of an optimizer, where it has them


def save(
    path: Path,
    optimizer: Any,
    *,
    schedulers: Iterable[Any] = (),
    averages: Iterable[Any] = (),
    extra: Any = None,
    progress: bool | None = None,
) -> None:
    """Save a run in one file: parameters, state, groups, and what goes with them.

    The file is safetensors, with checksums; nothing is pickled. It is written beside and then takes the place of what
    was there, on the disk: a process killed at any moment leaves the old file or the new one, whole. What a killed one
    has left beside is removed by the next save to the same path. A step in another thread waits meanwhile.

    Args:
        path: the file, usually named *.safetensors. A link is followed; the folder must exist.
        optimizer: of pyopt or pyopt.torch, on the CPU. The file is the same for both.
        schedulers: those of the optimizer, of pyopt.lr_scheduler or torch's: anything with a `state_dict()` that is
            plain data.
        averages: those of pyopt.averaging.
        extra: what else belongs to the run, plain data: numbers, strings, None, lists, tuples, dicts, arrays, tensors.
        progress: whether a bar is shown on stderr; None: where that is a terminal, when it takes over a second.

    Raises:
        TypeError, ValueError: something that is no plain data, a dtype that safetensors has not, or another optimizer.
        OSError: the file cannot be written, or the disk is full; what was there is still there.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> import pyopt
        >>> w = np.ones(2)
        >>> optimizer = pyopt.Adam({"w": w}, lr=0.5)
        >>> optimizer.step(grads={"w": np.ones(2)})
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> pyopt.save(path, optimizer, extra={"epoch": 3})
        >>> optimizer.step(grads={"w": np.ones(2)})
        >>> pyopt.load(path, optimizer)
        {'epoch': 3}
        >>> w
        array([0.5, 0.5])
    """
    side = side_of(optimizer)
    encoder = Encoder(side.as_array)
    with side.lock():
        state_dict = side.state_dict()
        names = side.names()
        # Parameters first, so that in a clash of names they keep theirs.
        parameters = [
            encoder.add(f"parameters.{name}", array) for name, array in zip(names, side.parameters(), strict=True)
        ]
        state = []
        for key, entry in state_dict["state"].items():
            where = f"state.{names[key] if type(key) is int and key < len(names) else key}"
            state.append([encoder.encode(key, where), encoder.encode(entry, where)])
        document = {
            "optimizer": side.kind,
            "parameters": parameters,
            "groups": [encoder.encode(each, f"groups.{i}") for i, each in enumerate(state_dict["param_groups"])],
            "state": state,
            "counters": {name: int(getattr(optimizer, name)) for name in COUNTERS if hasattr(optimizer, name)},
            "schedulers": _states("schedulers", schedulers, encoder),
            "averages": _states("averages", averages, encoder),
            "extra": encoder.encode(extra, "extra"),
        }
        total = sum(array.nbytes for array in encoder.arrays.values())
        with Progress(f"save {os.path.basename(os.fsdecode(path))}", total, progress) as bar:
            container.write(path, document, encoder.arrays, bar.step)


def _states(what: str, objects: Iterable[Any], encoder: Encoder) -> list[dict[str, Any]]:
    return [
        {"class": kind_of(each), "state": encoder.encode(each.state_dict(), f"{what}.{i}")}
        for i, each in enumerate(with_states(what, objects))
    ]


def with_states(what: str, objects: Iterable[Any]) -> list[Any]:
    """Schedulers or averages as a list."""
    try:
        found = list(objects)
    except TypeError:
        raise TypeError(f"{what} is a {type(objects).__name__}, must be a list: one alone as [{what[:-1]}]") from None
    for i, each in enumerate(found):
        if not (callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))):
            raise TypeError(f"{what}[{i}] is a {type(each).__name__}, must have state_dict and load_state_dict")
    return found


def load(
    path: Path,
    optimizer: Any,
    *,
    schedulers: Iterable[Any] = (),
    averages: Iterable[Any] = (),
    strict: bool = True,
    progress: bool | None = None,
) -> Any:
    """Go on from a file of `pyopt.save`: all of it, or an error and nothing has changed.

    Parameters are written in place, and state where there is a fitting array. Everything is checked before. A run moves
    between pyopt and pyopt.torch by its file.

    Parameters are matched by name, in any order, where they have names here and in the file; else by place. State and
    averages follow their parameters. Options are those of the file's groups: a group here and one there belong together
    where each has parameters of the other and of no third, wherever they stand. Schedulers need the groups in the order
    of the file, and LBFGS its parameters.

    Args:
        path: the file.
        optimizer: of the class that was saved, with the parameters that were saved, of the same shapes and dtypes.
        schedulers, averages: of the classes that were saved, in the same order.
        strict: whether all of the file must match all that is given. False: what matches is loaded, and all else stays
            as it is: parameters of another name, shape or dtype with their state; groups that the file divides
            otherwise; schedulers and averages for which the file has none of their class; schedulers where the groups
            differ. An average goes on for the parameters that match, and keeps what it has of the others.
        progress: as for `save`.

    Returns:
        `extra` as it was saved, arrays as copies. Tensors are arrays where the optimizer is one of arrays; those of
        bfloat16 then need the package ml_dtypes. With strict=False a named tuple of extra, missing, unexpected and
        mismatched: see `pyopt.files.LoadResult`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no file of pyopt.save, or damaged, cut off, or of a newer version; or of another optimizer.
        TypeError, KeyError, ValueError: what is in it does not fit the optimizer, a scheduler or an average.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> import pyopt
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> pyopt.save(path, pyopt.SGD({"body": np.ones(2), "head": np.ones(3)}))
        >>> params = {"head": np.zeros(5), "body": np.zeros(2)}
        >>> pyopt.load(path, pyopt.SGD(params), strict=False).mismatched
        {'parameters.head': 'has shape (3,) in the file, must be (5,)'}
        >>> params["body"]
        array([1., 1.])
    """
    if not isinstance(strict, bool):
        raise TypeError(f"strict is a {type(strict).__name__}, must be True or False")
    side = side_of(optimizer)
    schedulers, averages = with_states("schedulers", schedulers), with_states("averages", averages)
    with side.lock(), named(path):
        file = Container(path)
        with Progress(f"load {os.path.basename(os.fsdecode(path))}", file.size - file.start, progress) as bar:
            arrays = file.arrays(bar.step)
        document = file.document
        extra = _commit(file, side, document, arrays, schedulers, averages, strict)
    side.after()
    return extra


def _commit(
    file: Container,
    side: Side,
    document: Any,
    arrays: dict[str, Array],
    schedulers: list[Any],
    averages: list[Any],
    strict: bool,
) -> Any:
    """Check what is in a file that is whole, then do it all; returns what `load` does."""
    parts = checked(document)
    arrays = {name: side.native(array) for name, array in arrays.items()}

    def mapped(name: str, is_tensor: bool) -> Array:
        if name not in arrays:
            raise ValueError(f"has no array {name!r}")
        return side.typed(name, arrays[name])

    if parts["optimizer"] != side.kind:
        raise ValueError(f"is of the optimizer {parts['optimizer']}, optimizer is a {side.kind}")
    values = [mapped(name, False) for name in parts["parameters"]]
    state = as_dict([(decoded(key, mapped), decoded(entry, mapped)) for key, entry in parts["state"]])
    groups = [decoded(group, mapped) for group in parts["groups"]]
    match = matched(side, parts["parameters"], groups, values, strict)
    state_dict = rearranged(match, side, state, groups)
    calls: list[Call] = side.parameter_writes([None if at is None else values[at] for at in match.params])
    stay = Stay(lacking(match.groups), lacking(match.state), own=not strict)
    loaded = side.loaded(state_dict, stay)
    calls += loaded.calls
    for name, value in parts["counters"].items():
        if name in COUNTERS and hasattr(side.optimizer, name):
            count(name, value)
            workspace, _ = side.optimizer._stage()  # where the property keeps it: setting that would run Python code
            calls.append((setattr, workspace, name, value))
    extra = decoded(parts["extra"], lambda name, is_tensor: side.own(name, mapped(name, is_tensor), is_tensor))
    of_schedulers = list(by_class(match, "schedulers", schedulers, parts["schedulers"]))
    of_averages = list(by_class(match, "averages", averages, parts["averages"]))
    for i, scheduler, state in of_schedulers:
        if not follows_groups(match, f"schedulers.{i}"):
            continue
        held = decoded(state, lambda name, is_tensor: side.own(name, mapped(name, is_tensor), is_tensor))
        twin = staged(f"schedulers[{i}]", scheduler, side.optimizer, loaded.groups)
        twin.load_state_dict(held)
        calls += committed(scheduler, twin, side.optimizer)
    calls += side.last(loaded.groups)
    undo: list[Call] = []
    done: list[bool] = []
    try:
        for i, average, state in of_averages:
            held = decoded(state, lambda name, _: side.borrowed(mapped(name, False)))
            held = follows_parameters(match, f"averages.{i}", average, held)
            if held is None:
                continue
            if hasattr(average, "_load_writes"):  # it checks now, and returns calls of functions that are no bytecode
                calls += average._load_writes(held)
            else:
                undo.append((average.load_state_dict, deepcopy(average.state_dict())))
                average.load_state_dict(held)
        # A single call, in C, as in _state_dict.load; what it ends with says that it was made.
        deque(starmap(call, [*_in_pieces(calls, file.release()), (done.append, True)]), maxlen=0)
    finally:
        if not done:
            deque(starmap(call, undo), maxlen=0)
    return extra if strict else LoadResult(extra, match.missing, match.unexpected, match.mismatched)


def _in_pieces(calls: list[Call], release: list[Call]) -> Iterator[Call]:
    """The calls, writes of large arrays in pieces, with the map given back after every few: it counts as memory."""
    size = 0
    for function, *args in calls:
        large = len(args) == 3 and isinstance(args[2], np.ndarray) and args[1] is ...
        if not large:
            yield (function, *args)
            continue
        target, _, value = args
        for index in container.indices(value.shape, value.itemsize):
            yield (function, target, index, value[index])
            size += min(value.nbytes, container.PIECE)
            if size >= 4 * container.PIECE:
                yield from release
                size = 0


def checked(document: Any) -> dict[str, Any]:
    """The parts of a document, each of the right form."""
    forms: dict[str, Any] = {
        "optimizer": lambda value: isinstance(value, str),
        "parameters": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "groups": lambda value: isinstance(value, list),
        "state": lambda value: isinstance(value, list) and all(isinstance(e, list) and len(e) == 2 for e in value),
        "counters": lambda value: isinstance(value, dict),
        "schedulers": _is_states,
        "averages": _is_states,
        "extra": lambda value: True,
    }
    for name, is_right in forms.items():
        if name not in document or not is_right(document[name]):
            raise ValueError(f"has a document without valid {name!r}")
    return dict(document)


def _is_states(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and each.keys() == {"class", "state"} and isinstance(each["class"], str)
        for each in value
    )


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors in the block say which file it was."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        kind = next(kind for kind in (KeyError, TypeError, ValueError) if isinstance(error, kind))
        message = error.args[0] if len(error.args) == 1 else str(error)
        raise kind(f"{os.fsdecode(path)}: {message}") from None
