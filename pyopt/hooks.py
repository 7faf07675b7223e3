"""Hooks: ordered callables with handles that remove them, as in torch.optim."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import ref

_ids = count()


class Hooks(OrderedDict[int, Callable[..., Any]]):
    """Callables in the order in which they run."""

    def register(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Add a hook, at the front with prepend=True."""
        if not callable(hook):
            raise TypeError(f"hook == {hook!r}, must be callable")
        handle = RemovableHandle(self, next(_ids))
        self[handle.id] = hook
        if prepend:
            self.move_to_end(handle.id, last=False)
        return handle


class RemovableHandle:
    """What a registration returns: remove() ends it; as a context manager, at the end of the block."""

    def __init__(self, hooks: Hooks, id: int) -> None:
        self.hooks = ref(hooks)
        self.id = id

    def remove(self) -> None:
        """Take the hook away; a second call does nothing."""
        hooks = self.hooks()
        if hooks is not None:
            hooks.pop(self.id, None)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()
