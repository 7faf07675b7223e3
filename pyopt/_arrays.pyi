from typing import Any

from pyopt._step import Workspace

class ArrayWorkspace(Workspace):
    def step_by_update(self, optimizer: Any, grads: list[Any] | None) -> None: ...
