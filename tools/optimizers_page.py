"""Write docs/optimizers.md from the signatures and docstrings of the optimizers: `python tools/optimizers_page.py`."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pyopt
from pyopt import Optimizer

USUAL = ": TypeError, ValueError: see Optimizer."  # what every optimizer raises
PAGE = Path(__file__).resolve().parent.parent / "docs" / "optimizers.md"
INTRODUCTION = """\
# The optimizers

In the formulas p is the parameter, g its gradient and t the number of the step, from 1 on; operations go element by
element. All of them are in `pyopt`, for NumPy arrays, and in `pyopt.torch`, for tensors, by the same formula; where
torch has the class, the options there are torch's. Those of `pyopt.Storage` (types of the state, weights that do not
stall) go with every one that steps [short types](how_to/short_types.md).

A picture shows the path on two functions of two variables: Rosenbrock's curved valley, (1 - x)² + 100 (y - x²)², and a
straight one whose curvature is 50 times as large across as along, turned by 30°. It starts at the ring, the star is the
minimum, and it goes from dark to bright. The learning rate is the one of 1, 2 and 5 times the powers of ten that comes
lowest, unless the optimizer finds its own. There is no weight decay.

This page is made of the docstrings by `tools/optimizers_page.py`, the pictures by `examples/trajectories.py`.
"""


def catalogue() -> list[type[Optimizer]]:
    """Every optimizer of the package, by name."""
    found = {value for value in vars(pyopt).values() if isinstance(value, type) and issubclass(value, Optimizer)}
    return sorted(found - {Optimizer}, key=lambda cls: cls.__name__.lower())


def sections(cls: type[Optimizer]) -> dict[str, str]:
    """A docstring by the words that its parts begin with; "" is what stands before them: summary, formula, remarks."""
    parts = re.split(r"^(Args|State|Raises|Example|Source)\b", inspect.getdoc(cls) or "", flags=re.M)
    return {"": parts[0].strip(), **{name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}}


def options(cls: type[Optimizer]) -> tuple[list[list[str]], str]:
    """Rows of option, default and meaning, as Args of the docstring has them, and the remarks that follow there."""
    given = inspect.signature(cls).parameters.items()
    parameters = {name: p for name, p in given if p.kind is not p.VAR_KEYWORD}  # those of Storage, the same for all
    listed, _, remarks = sections(cls)["Args"].partition("\n\n")
    rows = []
    for entry in re.split(r"\n(?! {5})", textwrap.dedent(listed.lstrip(":\n")).replace("\n    ", "\n        ")):
        names, _, meaning = " ".join(entry.split()).partition(": ")
        defaults = {name: f"`{parameters.pop(name).default!r}`" for name in names.split(", ")}
        defaults.pop("params", None)
        if defaults:
            rows.append([", ".join(f"`{name}`" for name in defaults), ", ".join(defaults.values()), meaning])
    if parameters:
        raise ValueError(f"{cls.__name__}: Args of its docstring lacks {', '.join(parameters)}")
    return rows, remarks


def paper(cls: type[Optimizer]) -> str:
    """Authors and year of the first source, with a link where it is on arXiv."""
    source = " ".join(sections(cls)["Source"].split()).lstrip(": ")
    authors = re.match(r"[^,]+ et al\.|(?:[^,(]+, )*?[^,(]+ and [^,(]+(?=,)|[^,(]+", source)
    assert authors is not None
    first = re.split(r"\)|;", source)[0]
    if arxiv := re.search(r"arXiv ((\d\d)\d\d\.\d+)", first):
        return f"[{authors[0]}, 20{arxiv[2]}](https://arxiv.org/abs/{arxiv[1]})"
    year = re.search(r"\b(?:19|20)\d\d\b", first)
    return f"{authors[0]}, {year[0]}" if year else authors[0]


def prose(text: str) -> str:
    """A paragraph: in one line, with links to arXiv."""
    text = " ".join(text.split()).replace("**", r"\*\*")
    return re.sub(r"arXiv (\d{4}\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def summary(cls: type[Optimizer]) -> str:
    """What it does, in a sentence."""
    return prose(sections(cls)[""].partition("\n\n")[0])


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the head and its rule among them."""
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)


def signature(cls: type[Optimizer]) -> str:
    """The class as it is called, for Sphinx, which gives it an entry in the index."""
    found = inspect.signature(cls)
    bare = [each.replace(annotation=each.empty) for each in found.parameters.values()]
    return f"```{{py:class}} pyopt.{cls.__name__}{found.replace(parameters=bare, return_annotation=found.empty)}\n```"


def entry(cls: type[Optimizer]) -> str:
    """The section of an optimizer."""
    name, parts = cls.__name__, sections(cls)
    rows, remarks = options(cls)
    raised = prose(parts["Raises"])
    _, *texts = [*parts[""].split("\n\n"), *([remarks] if remarks else [])]
    return "\n\n".join(
        [
            f"## {name}",
            signature(cls),
            summary(cls),
            f"![the path of {name}](paths/{name.lower()}.png)",
            *(text if text.startswith("    ") else prose(text) for text in texts),
            table([["option", "default", "meaning"], ["---"] * 3, *rows]),
            "State" + prose(parts["State"]),
            *([] if raised == USUAL else ["Raises" + raised]),
            "Source" + prose(parts["Source"]),
            "```pycon\n" + textwrap.dedent(parts["Example"].lstrip(":\n")) + "\n```",
        ]
    )


def page() -> str:
    """The text of docs/optimizers.md."""
    found = catalogue()
    rows = [[f"[{cls.__name__}](#{cls.__name__.lower()})", summary(cls), paper(cls)] for cls in found]
    index = table([["optimizer", "in short", "paper"], ["---"] * 3, *rows])
    return "\n\n".join([INTRODUCTION.strip(), index, *map(entry, found)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
