"""Optimizers for CPUs at the speed of memory: what torch.optim is, on NumPy arrays."""

try:
    from pyopt._engine import get_flush_denormal as get_flush_denormal
    from pyopt._engine import set_flush_denormal as set_flush_denormal
except ModuleNotFoundError as error:
    if error.name == "pyopt._engine":
        error.msg += ": this copy of pyopt is not built; in a clone run `pip install -e .`, or leave its folder"
    raise
from pyopt import lr_scheduler as lr_scheduler
from pyopt.config import show_config as show_config
from pyopt.decay import no_decay as no_decay
from pyopt.files import load as load
from pyopt.files import save as save
from pyopt.optimizer import Optimizer as Optimizer
from pyopt.optimizers import ADOPT as ADOPT
from pyopt.optimizers import ASGD as ASGD
from pyopt.optimizers import FTRL as FTRL
from pyopt.optimizers import LAMB as LAMB
from pyopt.optimizers import LARS as LARS
from pyopt.optimizers import LBFGS as LBFGS
from pyopt.optimizers import SGD as SGD
from pyopt.optimizers import AdaBelief as AdaBelief
from pyopt.optimizers import Adadelta as Adadelta
from pyopt.optimizers import Adafactor as Adafactor
from pyopt.optimizers import Adagrad as Adagrad
from pyopt.optimizers import Adam as Adam
from pyopt.optimizers import Adamax as Adamax
from pyopt.optimizers import AdamW as AdamW
from pyopt.optimizers import AdamWScheduleFree as AdamWScheduleFree
from pyopt.optimizers import Adan as Adan
from pyopt.optimizers import AdEMAMix as AdEMAMix
from pyopt.optimizers import Lion as Lion
from pyopt.optimizers import Muon as Muon
from pyopt.optimizers import MuonAdamW as MuonAdamW
from pyopt.optimizers import NAdam as NAdam
from pyopt.optimizers import Prodigy as Prodigy
from pyopt.optimizers import RAdam as RAdam
from pyopt.optimizers import RMSprop as RMSprop
from pyopt.optimizers import Rprop as Rprop
from pyopt.optimizers import SGDScheduleFree as SGDScheduleFree
from pyopt.parameter import Parameter as Parameter
from pyopt.threads import get_num_threads as get_num_threads
from pyopt.threads import num_threads as num_threads
from pyopt.threads import set_num_threads as set_num_threads

__version__ = "0.1.0"
