"""A Sphinx extension: the docstrings of pyopt, which are plain text, as reStructuredText.

Paragraphs stay; what is indented between them is a formula. Then come sections: Args, Attributes and Raises (entries
of the form "names: text"), Returns (text) and Example (a doctest).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

SECTIONS = r"^(Args|Attributes|Raises|Returns|Example):\n((?:(?: +.*)?\n)+)"
LABELS = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises", "Returns": "Returns"}


def as_rest(docstring: str) -> str:
    """The docstring, without the indentation of its source, as reStructuredText."""
    return "\n\n".join(part for name, text in parts(docstring) for part in section(name, text)) + "\n"


def parts(docstring: str) -> Iterator[tuple[str, str]]:
    """Sections as (name, text), in order; the name is "" for what stands outside of them."""
    pieces = re.split(SECTIONS, f"{docstring.strip()}\n", flags=re.M)
    for text, name, body in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        yield "", text.strip("\n")
        yield name, textwrap.dedent(body).strip("\n")


def section(name: str, text: str) -> Iterator[str]:
    """The paragraphs of a section."""
    if not text:
        return
    if name == "Example":
        yield ".. rubric:: Example"
        yield code(text, "pycon")
    elif name == "Returns":
        yield f":{LABELS[name]}:\n" + textwrap.indent("\n\n".join(paragraphs(text)), "    ")
    elif name:
        entries, *remarks = text.split("\n\n")
        found = [" ".join(entry.split()).partition(": ") for entry in re.split(r"\n(?! )", entries)]
        listed = "\n".join(f"- **{literal(names)}**: {prose(meaning)}" for names, _, meaning in found)
        yield f":{LABELS[name]}:\n" + textwrap.indent(listed, "    ")
        yield from paragraphs("\n\n".join(remarks))
    else:
        yield from paragraphs(text)


def paragraphs(text: str) -> Iterator[str]:
    """Prose, formulas and lists."""
    for paragraph in filter(None, text.split("\n\n")):
        if paragraph.startswith("    "):
            yield code(textwrap.dedent(paragraph), "none")
        else:
            yield prose(paragraph)


def code(text: str, language: str) -> str:
    """A block of code."""
    return f".. code-block:: {language}\n\n" + textwrap.indent(text, "    ")


def prose(text: str) -> str:
    """Text in which nothing but names and code in `backquotes` is marked: names that have a place here become links."""
    pieces = re.split(r"`([^`]+)`", text)
    pieces[::2] = map(literal, pieces[::2])
    pieces[1::2] = [f":py:obj:`{c}`" if re.fullmatch(r"\w[\w.]*(\(\))?", c) else f"``{c}``" for c in pieces[1::2]]
    marked = "\\ ".join(pieces)
    return re.sub(r"arXiv (\d{4}\.\d+)", r"`arXiv \1 <https://arxiv.org/abs/\1>`__", marked)


def literal(text: str) -> str:
    """Text whose signs mean themselves."""
    return re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", text)


def convert(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What autodoc calls with the lines of each docstring, which it then takes as they are."""
    lines[:] = as_rest("\n".join(lines)).splitlines()


def setup(app: Any) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", convert)
    return {"parallel_read_safe": True}
