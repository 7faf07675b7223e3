"""The catalogue, in order of increasing complexity; each file is one declaration."""

from pyopt.optimizers.adagrad import Adagrad as Adagrad
from pyopt.optimizers.adam import Adam as Adam
from pyopt.optimizers.adamw import AdamW as AdamW
from pyopt.optimizers.lion import Lion as Lion
from pyopt.optimizers.rmsprop import RMSprop as RMSprop
from pyopt.optimizers.sgd import SGD as SGD
