"""Optimizers for CPUs at the speed of memory: what torch.optim is, on NumPy arrays."""

try:
    from pyopt._engine import get_flush_denormal as get_flush_denormal
    from pyopt._engine import set_flush_denormal as set_flush_denormal
except ModuleNotFoundError as error:
    if error.name == "pyopt._engine":
        error.msg += ": this copy of pyopt is not built; in a clone run `pip install -e .`, or leave its folder"
    raise
from pyopt import averaging as averaging
from pyopt import lr_scheduler as lr_scheduler
from pyopt._door import c_api_v1 as c_api_v1
from pyopt._door import get_include as get_include
from pyopt.clipping import clip_grad_norm_ as clip_grad_norm_
from pyopt.clipping import clip_grad_value_ as clip_grad_value_
from pyopt.clipping import clip_grads_with_norm_ as clip_grads_with_norm_
from pyopt.clipping import get_total_norm as get_total_norm
from pyopt.config import show_config as show_config
from pyopt.decay import no_decay as no_decay
from pyopt.files import load as load
from pyopt.files import save as save
from pyopt.optimizer import Optimizer as Optimizer
from pyopt.optimizers.adabelief import AdaBelief as AdaBelief
from pyopt.optimizers.adadelta import Adadelta as Adadelta
from pyopt.optimizers.adafactor import Adafactor as Adafactor
from pyopt.optimizers.adagrad import Adagrad as Adagrad
from pyopt.optimizers.adam import Adam as Adam
from pyopt.optimizers.adamax import Adamax as Adamax
from pyopt.optimizers.adamw import AdamW as AdamW
from pyopt.optimizers.adan import Adan as Adan
from pyopt.optimizers.ademamix import AdEMAMix as AdEMAMix
from pyopt.optimizers.adopt import ADOPT as ADOPT
from pyopt.optimizers.asgd import ASGD as ASGD
from pyopt.optimizers.ftrl import FTRL as FTRL
from pyopt.optimizers.lamb import LAMB as LAMB
from pyopt.optimizers.lars import LARS as LARS
from pyopt.optimizers.lazy_adamw import LazyAdamW as LazyAdamW
from pyopt.optimizers.lbfgs import LBFGS as LBFGS
from pyopt.optimizers.lion import Lion as Lion
from pyopt.optimizers.muon import Muon as Muon
from pyopt.optimizers.muon import MuonAdamW as MuonAdamW
from pyopt.optimizers.nadam import NAdam as NAdam
from pyopt.optimizers.prodigy import Prodigy as Prodigy
from pyopt.optimizers.radam import RAdam as RAdam
from pyopt.optimizers.rmsprop import RMSprop as RMSprop
from pyopt.optimizers.rowwise_adagrad import RowwiseAdagrad as RowwiseAdagrad
from pyopt.optimizers.rprop import Rprop as Rprop
from pyopt.optimizers.schedule_free import AdamWScheduleFree as AdamWScheduleFree
from pyopt.optimizers.schedule_free import SGDScheduleFree as SGDScheduleFree
from pyopt.optimizers.sgd import SGD as SGD
from pyopt.optimizers.sparse_adam import SparseAdam as SparseAdam
from pyopt.parameter import Parameter as Parameter
from pyopt.sparse import RowSparse as RowSparse
from pyopt.storage import Storage as Storage
from pyopt.threads import get_num_threads as get_num_threads
from pyopt.threads import num_threads as num_threads
from pyopt.threads import set_num_threads as set_num_threads

__version__ = "0.1.0"
