"""What tests of clipping, of extras of a step and of averages on tensors share: optimizers that are alike, in bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from test_torch_own import OWN
from torch_or_skip import BRIEF, ELEVEN, MATRICES, bits, new, optim, parameters, torch

EVERY = [
    *BRIEF,
    *((name, {"lr": 0.1}) for name in ELEVEN if name not in {row[0] for row in BRIEF}),
    *((cls.__name__, {"lr": 0.1}) for cls in OWN),
    *((name, {"lr": 0.1}) for name in [*MATRICES, "MuonAdamW"]),
]
every = pytest.mark.parametrize("name, options", EVERY, ids=["-".join([name, *options]) for name, options in EVERY])
FEW = [("Adam", {"lr": 0.1}), ("LAMB", {"lr": 0.1}), ("Adafactor", {"lr": 0.1})]
# All of them in float32, some in float64.
IN_DTYPES = [(*row, None) for row in EVERY] + [(*row, torch.float64) for row in FEW]
DTYPE_IDS = ["-".join([name, *options, *([str(dtype)] if dtype else [])]) for name, options, dtype in IN_DTYPES]
every_dtype = pytest.mark.parametrize("name, options, dtype", IN_DTYPES, ids=DTYPE_IDS)
few = pytest.mark.parametrize("name, options", FEW, ids=[name for name, _ in FEW])
# What the kernels leave to torch, of float32 where nothing else is said.
LEFT_TO_TORCH = {
    "bfloat16": lambda: [new(67, 2, dtype=torch.bfloat16)[..., 1]],
    "float16": lambda: [new(67, 2, dtype=torch.float16)[..., 1]],
    "not dense": lambda: [new(8, 2, seed=3)[..., 1]],
    "shared memory": lambda: overlapping(new(12, seed=4)),
}


def overlapping(base: Any) -> list[Any]:
    return [base[:8], base[4:]]


def covered(name: str) -> list[Any]:
    shapes = [(3, 4), (4, 2), (20, 60)] if name == "Muon" else [(3, 4), (5,), (0, 3), (), (20, 60)]
    return [new(*shape, seed=i) for i, shape in enumerate(shapes)]


def alike(name: str, options: Any, n: int = 2, dtype: Any = None, left: Any = (), steps: int = 2) -> list[Any]:
    """Optimizers with the same numbers, of two groups, after the same steps, with the same gradients; parameters of
    the kinds in `left` stand between those that the kernels take."""
    opts = []
    for _ in range(n):
        values = covered(name)
        for kind in left:
            values[1:1] = LEFT_TO_TORCH[kind]()
        params = [torch.nn.Parameter(v if dtype is None else v.to(dtype)) for v in values]
        opts.append(getattr(optim, name)([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], **options))
    for step in range(steps):
        set_gradients(*opts, seed=10 + step)
        for opt in opts:
            opt.step()
    set_gradients(*opts, seed=20)
    return opts


def set_gradients(*opts: Any, seed: int = 0, scale: float = 1.0) -> None:
    for opt in opts:
        for i, p in enumerate(parameters(opt)):
            p.grad = (new(*p.shape, seed=100 * seed + i) * scale).to(p.dtype)


def gradients(opt: Any) -> list[Any]:
    return [p.grad for p in parameters(opt)]


def raw(tensor: Any) -> Any:
    """A tensor in bits, as what can be compared."""
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape), bits(tensor).numpy().tobytes())


def gradient_bits(opt: Any) -> list[Any]:
    return [raw(g) for g in gradients(opt)]


def numbers(opt: Any) -> Any:
    """All that a step may change in an optimizer, in bits. Counts of state that no step has used are no state."""
    result = []
    for p in parameters(opt):
        state = {k: raw(v) if isinstance(v, torch.Tensor) else v for k, v in opt.state.get(p, {}).items()}
        result.append((raw(p), state if float(opt.state.get(p, {}).get("step", 1)) else {}))
    return result, [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


def as_array(x: Any) -> Any:
    """A tensor, or an array, as an array; short types as float32."""
    if isinstance(x, torch.Tensor):
        x = x.detach().resolve_neg()
        return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
    return np.asarray(x)


def arrays(opt: Any) -> list[Any]:
    return [as_array(p) for p in parameters(opt)]


def average_numbers(*averages: Any) -> Any:
    """All of an average, in bits."""
    saved = [average.state_dict() for average in averages]
    return [{**s, "averages": [raw(torch.as_tensor(a)) for a in s["averages"]]} for s in saved]


def cleared(g: Any) -> bool:
    return raw(g) == raw(torch.zeros_like(g))
