from typing import Any

class Table:
    def step(self, optimizer: Any, grads: list[Any] | None = None) -> None: ...
