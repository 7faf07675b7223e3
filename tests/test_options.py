"""The table of usual options: each name has its bounds, and a declaration with a kernel has no option without."""

import numpy as np
import pytest

import pyopt
from pyopt import checks
from pyopt._options import CHECKS, check_options

NAN = float("nan")
# name: (values that are right, values that are wrong)
BOUNDS = {
    "lr": ([0, 1e9], [-1e-9, NAN, np.inf]),
    "betas": ([(0, 0.999), [0.5, 0.5]], [(0.9, 1), (-0.1, 0.9), (NAN, 0.9)]),
    "eps": ([0, 1], [-1]),
    "weight_decay": ([0, 1], [-1]),
    "momentum": ([0, 2], [-1]),
    "dampening": ([-1, 0, 2], [NAN]),
    "alpha": ([0, 1], [-0.1, 1.1]),
    "rho": ([0, 1], [-0.1, 1.1]),
    "lr_decay": ([0, 1], [-1]),
    "initial_accumulator_value": ([0, 1], [-1]),
    "momentum_decay": ([0, 1], [-1]),
    "lambd": ([0, 1], [-1]),
    "t0": ([0, 1e6], [-1]),
    "etas": ([(0.5, 1.2)], [(0, 1.2), (1, 1.2), (0.5, 1), (1.2, 0.5), (0.5, np.inf), (NAN, 2)]),
    "step_sizes": ([(1e-6, 50), (1, 1)], [(0, 50), (50, 1e-6), (-1, 1), (1, np.inf), (NAN, NAN)]),
    "maximize": ([True, np.False_], []),
    "nesterov": ([True], []),
    "centered": ([True], []),
    "amsgrad": ([True], []),
    "update_clip": ([True], []),
    "cautious": ([True], []),
    "trust_ratio": ([False], []),
    "trust_coefficient": ([0, 2.5], [-0.1]),
    "decoupled_weight_decay": ([True], []),
}


@pytest.mark.parametrize("name", sorted(CHECKS.keys() | BOUNDS.keys()))
def test_usual_option(name):
    right, wrong = BOUNDS[name]
    for value in right:
        check_options({name: value}, {})
    for value in wrong:
        with pytest.raises(ValueError, match=name):
            check_options({name: value}, {})
    for value in ("0.1", None, 1j, (0.5,), (0.1, 0.2, 0.3)):
        with pytest.raises(TypeError, match=name):
            check_options({name: value}, {})


def test_own_check_stands_before_the_usual_one():
    check_options({"alpha": 2}, {"alpha": checks.non_negative})
    with pytest.raises(ValueError, match="alpha"):
        check_options({"alpha": -2}, {"alpha": checks.non_negative})


def test_option_without_a_check():
    """Refused where the class is made, if it has a kernel; a rule in NumPy may have what it likes."""
    tied = {"rule": pyopt.SGD.rule, "state_names": pyopt.SGD.state_names}
    body = {**tied, "__init__": lambda self, params, lr, foo: None}
    with pytest.raises(TypeError, match="'foo'"):
        type("New", (pyopt.Optimizer,), body)
    type("New", (pyopt.Optimizer,), body | {"checks": {"foo": checks.flag}})
    type("New", (pyopt.Optimizer,), {"__init__": body["__init__"]})
    type("New", (pyopt.SGD,), {"__init__": lambda self, model, verbose: None})
