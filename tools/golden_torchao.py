"""Makes tests/stored/torchao_0_18.pt: what torchao's Adam with short state saves, tensors of its classes apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchao.optim

SHAPES = ((64, 64), (7,), (4100,))  # but for the first in float32: small, and of no whole number of blocks


def main() -> None:
    result = {}
    for name in ("Adam8bit", "AdamW8bit", "AdamW4bit", "AdamWFp8"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES[: 3 if name == "AdamW8bit" else 2]]
        optimizer = getattr(torchao.optim, name)(params, lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        for p in params:
            p.data = p.data.bfloat16().float()
        saved = optimizer.state_dict()
        state = {index: {key: apart(value) for key, value in entry.items()} for index, entry in saved["state"].items()}
        grads = [torch.randn(p.shape).bfloat16() for p in params]
        before = [p.detach().bfloat16() for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.float()
        optimizer.step()
        after = [p.detach().ravel()[:512].clone() for p in params]
        groups = [{**group, "lr": group["lr"].clone()} for group in saved["param_groups"]]
        result[name] = {
            "params": before,
            "state_dict": {"state": state, "param_groups": groups},
            "grads": grads,
            "after": after,
        }
    torch.save(result, Path(__file__).parent.parent / "tests" / "stored" / "torchao_0_18.pt")


def apart(value: Any) -> Any:
    """What a state of torchao holds, as plain tensors; others as they are."""
    if not hasattr(value, "codes"):
        return value.clone()
    kept = {key: getattr(value, key) for key in ("codes", "scale", "qmap", "signed") if hasattr(value, key)}
    kept = {key: item.clone() if isinstance(item, torch.Tensor) else item for key, item in kept.items()}
    return (
        kept if value.codes.dtype == torch.uint8 and value.codes.ndim == 2 else {**kept, "numbers": value.dequantize()}
    )


if __name__ == "__main__":
    main()
