from typing import Any

from pyopt._step import Workspace

def use_exchange_api(use: bool) -> bool: ...

class TensorWorkspace(Workspace):
    def explain(self, optimizer: Any) -> list[tuple[int, Any, str | None]]: ...

def raise_versions(tensors: list[Any]) -> None: ...
