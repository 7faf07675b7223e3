"""torch.optim on CPU at the speed of memory: `import pyopt.torch as optim` and keep everything else.

The classes are subclasses of torch's own: constructor, defaults, groups, state, state_dict, hooks and repr are torch's,
only `step` is pyopt's. What pyopt has none of its own for (`lr_scheduler`, `swa_utils`, `Optimizer`, the other classes)
is torch.optim's. See `explain` for whose step a parameter takes.
"""

from typing import TYPE_CHECKING, Any

import torch.optim

from pyopt.decay import no_decay as no_decay
from pyopt.torch.bitsandbytes import from_bitsandbytes as from_bitsandbytes
from pyopt.torch.bitsandbytes import to_bitsandbytes as to_bitsandbytes
from pyopt.torch.clipping import clip_grad_norm_ as clip_grad_norm_
from pyopt.torch.clipping import clip_grad_value_ as clip_grad_value_
from pyopt.torch.clipping import clip_grads_with_norm_ as clip_grads_with_norm_
from pyopt.torch.clipping import get_total_norm as get_total_norm
from pyopt.torch.convert import from_torch as from_torch
from pyopt.torch.convert import to_torch as to_torch
from pyopt.torch.explain import explain as explain
from pyopt.torch.flat import flatten as flatten
from pyopt.torch.flat import unflatten as unflatten
from pyopt.torch.lazy import LazyAdamW as LazyAdamW
from pyopt.torch.matrices import MuonAdamW as MuonAdamW
from pyopt.torch.optimizers import *  # noqa: F403
from pyopt.torch.torchao import from_torchao as from_torchao

if TYPE_CHECKING:  # what __getattr__ hands out
    from torch.optim import Optimizer as Optimizer
    from torch.optim import lr_scheduler as lr_scheduler
    from torch.optim import swa_utils as swa_utils
if hasattr(torch.optim, "Adafactor"):  # older torch has not
    from pyopt.torch.matrices import Adafactor as Adafactor
if hasattr(torch.optim, "Muon"):
    from pyopt.torch.matrices import Muon as Muon

# What stands above is pyopt's own.
_OWN = [name for name, value in globals().items() if getattr(value, "__module__", "").startswith("pyopt.")]
__all__ = sorted({*_OWN, *(name for name in dir(torch.optim) if not name.startswith("_"))})


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(torch.optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}, and torch.optim has none either")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
