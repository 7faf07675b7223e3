"""The code blocks of docs/how_to run as they stand, each page in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stacks import need

PAGES = sorted((Path(__file__).parent.parent / "docs" / "how_to").glob("*.md"))
PACKAGES = {
    "accelerate": ("accelerate", "torch"),
    "hugging_face": ("transformers", "accelerate", "torch"),
    "lightning": ("lightning", "torch"),
    "mpi": ("mpi4py",),
    "scikit_learn": ("sklearn",),
    "skorch": ("skorch", "torch"),
    "spacy": ("thinc", "spacy"),
}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem in PACKAGES], ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path) -> None:
    need(*PACKAGES[page.stem], level=False)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert blocks
    path = os.pathsep.join([str(page.parent.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_every_stack_has_its_page() -> None:
    assert set(PACKAGES) <= {page.stem for page in PAGES}
