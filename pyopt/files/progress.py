"""How far a long save or load is: a bar on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

DELAY = 1.0  # seconds; what is faster needs no bar


class Progress:
    """A bar of tqdm where it is installed, else a line of its own.

    Args:
        what: written before the bar.
        total: number of bytes.
        shown: None shows the bar where stderr is a terminal, and when it has taken over a second; True always.
    """

    def __init__(self, what: str, total: int, shown: bool | None) -> None:
        if shown is not None and not isinstance(shown, bool):
            raise TypeError(f"progress is a {type(shown).__name__}, must be True, False or None")
        self.what, self.total, self.done = what, total, 0
        self.shown = sys.stderr is not None and sys.stderr.isatty() if shown is None else shown
        self.begin = time.monotonic() + (0 if shown else DELAY)
        self.bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, size: int) -> None:
        """So many bytes more are done."""
        self.done += size
        if not self.shown or time.monotonic() < self.begin:
            return
        if self.bar is None:
            self.bar = _bar(self.what, self.total)
        self.bar.update(self.done - self.bar.n)


class _Line:
    """What tqdm's bar does, in a line of numbers."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.n = what, total, 0

    def update(self, n: int) -> None:
        self.n += n
        percent = 100 * self.n // max(self.total, 1)
        sys.stderr.write(f"\r{self.what}: {percent:3d}% of {self.total / 1e6:.0f} MB")
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\n")


def _bar(what: str, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return _Line(what, total)
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, file=sys.stderr)
