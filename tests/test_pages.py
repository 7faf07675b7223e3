"""Every code block of every page is run, prints what the page says, and every link inside of the repository leads on.

The blocks of a page are one program, from top to bottom. A block of text right behind one is what it prints, with ...
for what may differ.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pyopt
import test_stack_how_to

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^ *```$", re.M | re.S)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Commands that set up, or measure for minutes: what they name must be there.
LONG = ("pip ", "pytest", "bash .ci/run", "tools/", "python bench/", "python examples/")
# What is shown and not run: output, settings, and pieces of programs that have tests of their own.
SHOWN = ("text", "toml", "yaml", "dockerfile", "cpp", "cython", "cmake")


@dataclass
class Block:
    language: str
    text: str
    line: int  # the first of the text
    output: str = ""


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, but for directives; those of text that follow a block at once are its output."""
    text = page.read_text()
    found: list[Block] = []
    end = -1
    for match in FENCE.finditer(text):
        block = Block(match[2].strip(), textwrap.dedent(match[3]), text.count("\n", 0, match.start(3)) + 1)
        if block.language == "text" and found and not text[end : match.start()].strip():
            found[-1].output = block.text
        elif not block.language.startswith("{"):
            found.append(block)
        end = match.end()
    return found


def needed(page_blocks: list[Block]) -> set[str]:
    """The packages that the blocks import."""
    trees = [ast.parse(block.text) for block in page_blocks if block.language == "python"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    packages = {name.partition(".")[0] for name in names}
    return packages | ({"torch"} if any(name.startswith("pyopt.torch") for name in names) else set())


def run(block: Block, page: Path, names: dict[str, Any], library: Path | None = None) -> str:
    """What a block prints; library is where libpyopt is, for programs in C."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
        elif block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, names, page.name, str(page), block.line - 1)
            assert not doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False).failed, output.getvalue()
        elif block.language == "sh":
            for line in block.text.splitlines():
                output.write(run_command(line))
        elif block.language == "c" and library:
            Path("program.c").write_text(block.text)
            warnings = "-std=c99 -Wall -Wextra -Wpedantic -Werror"
            compiler = f"cc {warnings} program.c -I{library} {library}/libpyopt.a -fopenmp -lm -o program"
            output.write(run_command(f"{compiler} && ./program"))
        else:
            assert block.language in SHOWN, f"line {block.line}: nothing says how a block of {block.language!r} is run"
    return output.getvalue()


def run_command(line: str) -> str:
    """What a line for the shell prints; one that sets up or takes long is not run."""
    commands = [part.strip() for part in line.split("&&")]
    if any(command.startswith(LONG) for command in commands):
        files = re.findall(r"(?:tools|bench|examples|tests|\.ci)/[\w./]+", line)
        assert all((ROOT / file).exists() for file in files), line
        assert all(command.startswith((*LONG, "pre-commit ")) for command in commands), line
        return ""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(pyopt.__file__).parent.parent)}
    result = subprocess.run(["bash", "-euc", line], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What pages set for the whole process."""
    threads = pyopt.get_num_threads()
    yield
    pyopt.set_num_threads(threads)
    pyopt.set_flush_denormal(False)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    found = blocks(page)
    if page.stem in test_stack_how_to.PACKAGES:
        pytest.skip("test_stack_how_to.py runs it, in a process of its own")
    for package in sorted(needed(found)):
        if package == "torch" and os.environ.get("PYOPT_REQUIRE_TORCH") == "1":
            importlib.import_module(package)
        pytest.importorskip(package, reason=f"{package} is not installed")
    library = request.getfixturevalue("library") if any(block.language == "c" for block in found) else None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in found:
        printed = run(block, page, names, library)
        if block.output:
            assert doctest.OutputChecker().check_output(block.output, printed, FLAGS), (
                f"{page.name}, line {block.line} prints\n{printed}but the page says\n{block.output}"
            )


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    if include := re.search(r"^```\{include\} (\S+)", page.read_text(), re.M):
        text += (page.parent / include[1]).read_text()
    return {slug(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)) for heading in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_relative_to(ROOT) and path.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(path), f"{target}: no such heading"


def test_every_kind_of_block_is_looked_at(tmp_path: Path) -> None:
    """A page that says something wrong, and one in a language that nobody knows, fail."""
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n\n- in a list:\n\n  ```pycon\n  >>> 1\n  2\n  ```\n")
    wrong, listed = blocks(page)
    assert (wrong.line, wrong.output, listed.text) == (2, "2\n", ">>> 1\n2\n")
    assert run(wrong, page, {}) == "1\n"
    for block in (listed, Block("sh", "exit 3", 1), Block("sh", "tools/nothing", 1), Block("fortran", "", 1)):
        with pytest.raises(AssertionError):
            run(block, page, {})
    page.write_text("[there](nowhere.md)\n")
    with pytest.raises(AssertionError):
        test_links(page)
    assert needed([Block("python", "import torch.nn, os\nfrom jax import numpy\n", 1)]) == {"torch", "os", "jax"}
