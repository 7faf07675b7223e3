"""What is in a file, as a table: `python -m pyopt inspect FILE`."""

from __future__ import annotations

from math import prod
from typing import Any

from pyopt.files import Path, checked, named
from pyopt.files.container import Container, Place
from pyopt.files.plain import decoded
from pyopt.files.sides import called


def described(path: Path) -> str:
    """The optimizer, its step and groups, each parameter, schedulers and averages, and the sizes, as text.

    The header is checked, the data are not read.

    Raises:
        OSError, ValueError: no such file, or none of pyopt.save.
    """
    with named(path):
        file = Container(path)
        parts = checked(file.document)

        def place(name: str, is_tensor: bool = False) -> Place:
            if name not in file.places:
                raise ValueError(f"has no array {name!r}")
            return file.places[name]

        groups = [_dict("a group", decoded(group, place)) for group in parts["groups"]]
        state = {str(decoded(key, place)): decoded(entry, place) for key, entry in parts["state"]}
        lines = [f"{parts['optimizer']}, {_step(state)}, {_size(file.size)}"]
        for i, group in enumerate(groups):
            options = [f"{key}={_short(value)}" for key, value in group.items() if key not in ("params", "param_names")]
            lines.append(f"group {i}: {', '.join(options)}")
        rows: list[tuple[str, ...]] = [("parameter", "group", "shape", "dtype", "size", "state", "size of state")]
        of_group = {i: g for g, group in enumerate(groups) for i in _list("params", group.get("params"))}
        for i, name in enumerate(parts["parameters"]):
            data, entry = place(name), state.get(str(i), {})
            arrays = _places(entry)
            rows.append(
                (
                    _printable(name.removeprefix("parameters.")),
                    str(of_group.get(i, "")),
                    "x".join(map(str, data.shape)) or "()",
                    called(data.dtype),
                    _size(data.end - data.begin),
                    " ".join(map(str, entry)) if isinstance(entry, dict) else _short(entry),
                    _size(sum(each.end - each.begin for each in arrays)),
                )
            )
        lines += ["", *_table(rows), ""]
        for what in ("schedulers", "averages"):
            for i, each in enumerate(parts[what]):
                held = decoded(each["state"], place)
                lines.append(f"{what}[{i}]: {each['class']} {_short(held)}")
        if any(parts["counters"].values()):
            lines.append(f"counters: {_short(parts['counters'])}")
        if parts["extra"] is not None:
            lines.append(f"extra: {_short(decoded(parts['extra'], place))}")
        total = sum(each.end - each.begin for each in file.places.values())
        elements = sum(prod(place(name).shape) for name in parts["parameters"])
        lines.append(
            f"{len(parts['parameters'])} parameters of {elements} elements; {len(file.places)} arrays of {_size(total)}"
        )
    return "\n".join(map(_printable, lines))


def _printable(text: str) -> str:
    """The text without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _step(state: dict[str, Any]) -> str:
    """The step counts of the parameters."""
    steps = [entry["step"] for entry in state.values() if isinstance(entry, dict) and type(entry.get("step")) is int]
    if not steps:
        return "no step counts"
    return f"step {max(steps)}" if min(steps) == max(steps) else f"steps {min(steps)} to {max(steps)}"


def _dict(what: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}, must be a dict")
    return value


def _list(what: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"{what} is {_short(value)}, must be a list of ints")
    return value


def _places(value: Any) -> list[Place]:
    """All arrays in nested data."""
    if isinstance(value, Place):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [place for item in value for place in _places(item)] if isinstance(value, (list, tuple)) else []


def _short(value: Any, most: int = 200) -> str:
    """The value in a line, arrays as their dtype and shape."""
    text = _text(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _text(value: Any) -> str:
    if isinstance(value, Place):
        return f"{called(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_text, value)) + ")"
    return str(value)


def _size(n: int) -> str:
    """A number of bytes for people."""
    size, units = float(n), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{n} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows in columns; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = (1, 4, 6)
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
