"""A copy of the tree to build and test in, so that the build in place stays as it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def copy_tree(directory: Path) -> None:
    """What git tracks or would, as it stands in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, directory / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def build(directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Build it in place; the result has the return code and all output."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "build_ext", "--inplace"],  # the name and version, the modules
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
