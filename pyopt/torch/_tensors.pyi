from typing import Any

from pyopt._table import Table

def use_exchange_api(use: bool) -> bool: ...

class TensorTable(Table):
    def step(  # type: ignore[override]
        self, optimizer: Any, grads: None = None, factor: float = 1
    ) -> None: ...
    def look(self, optimizer: Any) -> list[tuple[int, Any, str | None]]: ...
