"""Makes tests/stored/bitsandbytes_0_50.pt: what the optimizers of bitsandbytes, whose wheel runs on CPUs, save."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch

CLASSES = {
    "Adam": bnb.optim.Adam8bit,
    "AdamW": bnb.optim.AdamW8bit,
    "AdEMAMix": bnb.optim.AdEMAMix8bit,
    "Lion": bnb.optim.Lion8bit,
    "SGD": bnb.optim.SGD8bit,
}


def main() -> None:
    result = {}
    for name, cls in CLASSES.items():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (7,))]
        optimizer = cls(params, lr=1e-2, **({"momentum": 0.9} if name == "SGD" else {}))
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        for p in params:
            p.data = p.data.bfloat16().float()
        saved = {"params": [p.detach().bfloat16() for p in params], "state_dict": optimizer.state_dict()}
        saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
        saved["grads"] = [torch.randn(p.shape).bfloat16() for p in params]
        for p, g in zip(params, saved["grads"], strict=True):
            p.grad = g.float()
        optimizer.step()
        result[name] = {**saved, "after": [p.detach().ravel()[:512].clone() for p in params]}
    torch.save(result, Path(__file__).parent.parent / "tests" / "stored" / "bitsandbytes_0_50.pt")


if __name__ == "__main__":
    main()
