"""Fuzz pyopt.load and inspect, guided by coverage: pip install atheris, then

python tools/fuzz_files.py [options of libFuzzer, such as -max_total_time=600] [folder of inputs]

The first byte of an input says what the others are: a file as it is; the header of one, which then gets its checksum;
the document in a header that is right; or edits of the document that was saved. A load must end in an error of the
three kinds, with nothing changed, or be that of a valid file: one as it is then is the very file that was saved, and
with another document the run goes on.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from contextlib import suppress
from typing import Any

import atheris  # type: ignore[import-not-found]
import numpy as np

with atheris.instrument_imports(include=["pyopt.files", "pyopt._state_dict", "pyopt.lr_scheduler", "json"]):
    import pyopt
    from pyopt._xxh64 import xxh64
    from pyopt.files.container import DIGITS, ZEROS
    from pyopt.files.inspecting import described

FOLDER = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
PATH = os.path.join(FOLDER, "run")


def run() -> tuple[Any, Any]:
    """An optimizer after two steps, and its scheduler."""
    optimizer = pyopt.Adam({"w": np.ones((2, 3), np.float32), "b": np.ones((), np.float32)}, amsgrad=True)
    scheduler = pyopt.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    for _ in range(2):
        optimizer.step(grads=[np.ones((2, 3), np.float32), np.ones((), np.float32)])
        scheduler.step()
    return optimizer, scheduler


SAVED = run()
EXTRA = {"epoch": 3, "pair": (1, float("nan")), 7: [None, True], "ids": np.arange(3)}
pyopt.save(PATH, SAVED[0], schedulers=[SAVED[1]], extra=EXTRA)
with open(PATH, "rb") as file:
    FILE = file.read()
LENGTH = int.from_bytes(FILE[:8], "little")
HEADER, DATA = FILE[8 : 8 + LENGTH], FILE[8 + LENGTH :]
DOCUMENT = json.loads(HEADER)["__metadata__"]["document"]
# What edits put into the document beside parts of itself.
VALUES = [None, True, 0, -1, 1.5, 1e308, 10**30, "", "w", [], {}, {"$float": "nan"}, {"$tuple": [0.5, 2]}]
VALUES += [{"$array": "parameters.w"}, {"$array": "x"}, {"$tensor": "parameters.b"}, {"$dict": [[0, {"step": 1}]]}]


def sealed(header: bytes) -> bytes:
    """A file with this header, its checksum, and the data that were saved."""
    header = header[: DIGITS.start] + ZEROS.encode() + header[DIGITS.stop :]
    header = header[: DIGITS.start] + f"{xxh64(header):016x}".encode() + header[DIGITS.stop :]
    return len(header).to_bytes(8, "little") + header + DATA


def with_document(text: str) -> bytes:
    """A file with this document, right otherwise."""
    header = json.loads(HEADER)
    header["__metadata__"]["document"] = text
    return sealed(json.dumps(header, separators=(",", ":")).encode())


def edited(data: bytes) -> str:
    """The document with some of its parts taken out, doubled, exchanged or replaced."""
    choose = atheris.FuzzedDataProvider(data)
    document = json.loads(DOCUMENT)
    for _ in range(choose.ConsumeIntInRange(1, 4)):
        found: list[tuple[Any, Any]] = []
        places: list[Any] = [document]
        while places:
            place = places.pop()
            items = list(place.items()) if isinstance(place, dict) else list(enumerate(place))
            found += [(place, key) for key, _ in items]
            places += [value for _, value in items if isinstance(value, (dict, list))]
        if not found:
            break
        place, key = found[choose.ConsumeIntInRange(0, len(found) - 1)]
        other, its_key = found[choose.ConsumeIntInRange(0, len(found) - 1)]
        way = choose.ConsumeIntInRange(0, 4)
        if way == 0:
            del place[key]
        elif way == 1:
            place[key] = copy.deepcopy(other[its_key])
        elif way == 2 and isinstance(place, list):
            place.insert(key, copy.deepcopy(other[its_key]))
        elif way == 3 and isinstance(place, dict):
            place[choose.PickValueInList(["lr", "step", "x", "$array", "$dict", "params"])] = place.pop(key)
        else:
            place[key] = copy.deepcopy(choose.PickValueInList(VALUES))
    return json.dumps(document)


def as_file(data: bytes) -> bytes:
    """The file that an input stands for."""
    kind, rest = data[:1], data[1:]
    if kind == b"d":
        return with_document(rest.decode("utf-8", "replace"))
    if kind == b"e":
        return with_document(edited(rest))
    return sealed(rest) if kind == b"h" else rest


def look(optimizer: Any, scheduler: Any) -> Any:
    """All that a load may change."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [{k: getattr(v, "tobytes", lambda v=v: repr(v))() for k, v in optimizer.state[p].items()} for p in params]
    groups = [repr({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
    return [p.data.tobytes() for p in params], state, groups, repr(scheduler.state_dict())


OTHER = run()
for _parameter in OTHER[0].param_groups[0]["params"]:
    _parameter.data[...] = 5
BEFORE = look(*OTHER)


def test_one(data: bytes) -> None:
    """Load and inspect one input."""
    global OTHER
    content = as_file(data)
    with open(PATH, "wb") as file:
        file.write(content)
    try:
        pyopt.load(PATH, OTHER[0], schedulers=[OTHER[1]])
    except (KeyError, TypeError, ValueError):
        assert look(*OTHER) == BEFORE, "a refused file has changed the optimizer"
        assert content != FILE, "the file that was saved is refused"
    else:
        if data[:1] not in (b"d", b"e", b"h"):
            assert content == FILE, "a damaged file was accepted"
        # Its numbers may be too large for a step; an error that says so is right.
        with suppress(ValueError, RuntimeError):
            OTHER[0].step(grads=[np.ones((2, 3), np.float32), np.ones((), np.float32)])
            OTHER[1].step()
        pyopt.save(PATH, OTHER[0], schedulers=[OTHER[1]])
        OTHER = run()
        for parameter in OTHER[0].param_groups[0]["params"]:
            parameter.data[...] = 5
    with open(PATH, "wb") as file:
        file.write(content)
    with suppress(KeyError, TypeError, ValueError):
        described(PATH)


def main() -> None:
    """Fuzz from the saved file, its header and its document."""
    seeds = os.path.join(FOLDER, "seeds")
    os.mkdir(seeds)
    inputs = {"file": FILE, "header": b"h" + HEADER, "document": b"d" + DOCUMENT.encode(), "edits": b"e" + bytes(40)}
    for name, data in inputs.items():
        with open(os.path.join(seeds, name), "wb") as file:
            file.write(data)
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    atheris.Setup([sys.argv[0], "-max_len=6000", *options, *folders, seeds], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
