from typing import Any

MOST_AVERAGES: int

class Asked: ...

def asked(max_norm: float | None, nonfinite: str, zero_grad: bool | str, gradient_factor: float) -> Asked | None: ...

class Average:
    arrays: dict[Any, Any]
    joined: dict[Any, int]
    n_averaged: int
    steps: int
    is_swapped: bool
    def is_due(self, step: int) -> bool: ...
    def weight(self, n: int) -> float: ...
    def restore(self, arrays: dict[Any, Any], joined: dict[Any, int], n_averaged: int, steps: int) -> None: ...
