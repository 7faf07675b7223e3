"""torch.optim on CPU at the speed of memory: `import pyopt.torch as optim` and keep everything else.

The classes are subclasses of torch's own: constructor, defaults, groups, state, state_dict, hooks and repr are torch's,
only `step` is pyopt's. What pyopt has none of its own for (`lr_scheduler`, `swa_utils`, `Optimizer`, the other classes)
is torch.optim's. See `explain` for whose step a parameter takes.
"""

from typing import Any

import torch.optim

from pyopt.decay import no_decay as no_decay
from pyopt.torch.convert import from_torch as from_torch
from pyopt.torch.convert import to_torch as to_torch
from pyopt.torch.explain import explain as explain
from pyopt.torch.matrices import MuonAdamW as MuonAdamW
from pyopt.torch.optimizers import ADOPT as ADOPT
from pyopt.torch.optimizers import ASGD as ASGD
from pyopt.torch.optimizers import FTRL as FTRL
from pyopt.torch.optimizers import LAMB as LAMB
from pyopt.torch.optimizers import LARS as LARS
from pyopt.torch.optimizers import SGD as SGD
from pyopt.torch.optimizers import AdaBelief as AdaBelief
from pyopt.torch.optimizers import Adadelta as Adadelta
from pyopt.torch.optimizers import Adagrad as Adagrad
from pyopt.torch.optimizers import Adam as Adam
from pyopt.torch.optimizers import Adamax as Adamax
from pyopt.torch.optimizers import AdamW as AdamW
from pyopt.torch.optimizers import AdamWScheduleFree as AdamWScheduleFree
from pyopt.torch.optimizers import Adan as Adan
from pyopt.torch.optimizers import AdEMAMix as AdEMAMix
from pyopt.torch.optimizers import Lion as Lion
from pyopt.torch.optimizers import NAdam as NAdam
from pyopt.torch.optimizers import Prodigy as Prodigy
from pyopt.torch.optimizers import RAdam as RAdam
from pyopt.torch.optimizers import RMSprop as RMSprop
from pyopt.torch.optimizers import Rprop as Rprop
from pyopt.torch.optimizers import SGDScheduleFree as SGDScheduleFree

if hasattr(torch.optim, "Adafactor"):  # older torch has not
    from pyopt.torch.matrices import Adafactor as Adafactor
if hasattr(torch.optim, "Muon"):
    from pyopt.torch.matrices import Muon as Muon

_OWN = [
    "explain",
    "from_torch",
    "no_decay",
    "to_torch",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "RMSprop",
    "Adadelta",
    "Adamax",
    "NAdam",
    "RAdam",
    "ASGD",
    "Rprop",
    "AdaBelief",
    "ADOPT",
    "AdEMAMix",
    "Adan",
    "FTRL",
    "LARS",
    "LAMB",
    "Prodigy",
    "SGDScheduleFree",
    "AdamWScheduleFree",
    "MuonAdamW",
]
__all__ = sorted({*_OWN, *(name for name in dir(torch.optim) if not name.startswith("_"))})


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(torch.optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}, and torch.optim has none either")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
