from collections.abc import Callable
from types import TracebackType
from typing import Any

from pyopt._asked import Asked, Average

class Swapped:
    def __init__(self, average: Average, workspace: Workspace, optimizer: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Workspace:
    skipped_steps: int
    @property
    def last_grad_norm(self) -> float | None: ...
    def step(
        self,
        optimizer: Any,
        grads: list[Any] | None = None,
        asked: Asked | None = None,
        gradient_factor: float = 1,
    ) -> None: ...
    def step_by(
        self,
        function: Callable[[list[Any] | None, float], Any],
        optimizer: Any,
        grads: list[Any] | None = None,
        asked: Asked | None = None,
        gradient_factor: float = 1,
    ) -> None: ...
    def exchange(self, optimizer: Any, average: Average) -> None: ...
    def follow(self, optimizer: Any, average: Average) -> None: ...
    def copied(self, what: str, like: Any, values: Any) -> Any: ...
    def __enter__(self) -> Workspace: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
