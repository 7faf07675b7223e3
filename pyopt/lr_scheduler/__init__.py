"""Learning-rate schedules: torch.optim.lr_scheduler's names, arguments and values, each a function of the step.

lr = value(step, base lr), so that a run resumed at any step has exactly the uninterrupted values, and compositions are
functions of functions: nested as you like, resumed as you like. They work on whatever has torch's `param_groups`: the
optimizers of pyopt, of pyopt.torch and of torch. See `LRScheduler` for what they share, and for your own.
"""

from pyopt.lr_scheduler.base import LRScheduler as LRScheduler
from pyopt.lr_scheduler.composed import ChainedScheduler as ChainedScheduler
from pyopt.lr_scheduler.composed import SequentialLR as SequentialLR
from pyopt.lr_scheduler.cosine import CosineAnnealingLR as CosineAnnealingLR
from pyopt.lr_scheduler.cosine import CosineAnnealingWarmRestarts as CosineAnnealingWarmRestarts
from pyopt.lr_scheduler.cycles import CyclicLR as CyclicLR
from pyopt.lr_scheduler.cycles import OneCycleLR as OneCycleLR
from pyopt.lr_scheduler.factors import ConstantLR as ConstantLR
from pyopt.lr_scheduler.factors import ExponentialLR as ExponentialLR
from pyopt.lr_scheduler.factors import LambdaLR as LambdaLR
from pyopt.lr_scheduler.factors import LinearLR as LinearLR
from pyopt.lr_scheduler.factors import MultiplicativeLR as MultiplicativeLR
from pyopt.lr_scheduler.factors import MultiStepLR as MultiStepLR
from pyopt.lr_scheduler.factors import PolynomialLR as PolynomialLR
from pyopt.lr_scheduler.factors import StepLR as StepLR
from pyopt.lr_scheduler.plateau import ReduceLROnPlateau as ReduceLROnPlateau
from pyopt.lr_scheduler.warmup import WarmupCosineLR as WarmupCosineLR
from pyopt.lr_scheduler.warmup import WarmupLinearLR as WarmupLinearLR
