"""torch.optim on CPU at the speed of memory: `import pyopt.torch as optim` and keep everything else.

The classes are subclasses of torch's own: constructor, defaults, groups, state, state_dict, hooks and repr are torch's,
only `step` is pyopt's. See `explain` for the parameters that are left to torch's own step.
"""

from pyopt.torch.checkpoint import from_torch as from_torch
from pyopt.torch.checkpoint import to_torch as to_torch
from pyopt.torch.optimizers import SGD as SGD
from pyopt.torch.optimizers import Adagrad as Adagrad
from pyopt.torch.optimizers import Adam as Adam
from pyopt.torch.optimizers import AdamW as AdamW
from pyopt.torch.optimizers import Lion as Lion
from pyopt.torch.optimizers import RMSprop as RMSprop
from pyopt.torch.stepper import explain as explain
