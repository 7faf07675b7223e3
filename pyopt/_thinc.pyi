from typing import Any

KINDS: dict[str, int]

class Hyper:
    lr: float
    b1: float
    b2: float
    eps: float
    l2: float
    decay: float
    grad_clip: float
    def __init__(
        self, lr: float, b1: float, b2: float, eps: float, l2: float, is_decay: bool, grad_clip: float
    ) -> None: ...

class PlainSteps:
    def __init__(self, kind: int, m: Any, v: Any) -> None: ...
    def step(
        self,
        weights: Any,
        gradient: Any,
        hyper: Hyper,
        lr_scale: float,
        t: int,
        average: Any,
        entry: dict[str, Any],
        counts: dict[Any, int],
        key: Any,
    ) -> bool: ...

def scalars(kind: int, hyper: Hyper, lr: float, t: int) -> dict[str, Any]: ...
def average_weight(t: int) -> float: ...
