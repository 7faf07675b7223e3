"""Schedules of every class, built alike from pyopt's module and torch's, for the tests of both."""

import numpy as np

import pyopt

BASES = [0.5, 0.1]


def new_optimizer(bases=BASES):
    """With a group per base lr, momentum, and parameters that nobody steps."""
    return pyopt.SGD([{"params": [np.zeros(1)], "lr": lr} for lr in bases], momentum=0.9)


def rates_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def momenta_of(optimizer):
    return [group["betas"][0] if "betas" in group else group["momentum"] for group in optimizer.param_groups]


def wave(step):
    return 1 / (1 + step % 7)


# (module, optimizer, last_epoch=-1) -> scheduler
SINGLE = {
    "LambdaLR": lambda m, o, **k: m.LambdaLR(o, wave, **k),
    "MultiplicativeLR": lambda m, o, **k: m.MultiplicativeLR(o, lambda step: 0.9 + 0.11 * (step % 2), **k),
    "StepLR": lambda m, o, **k: m.StepLR(o, 30, 0.3, **k),
    "MultiStepLR": lambda m, o, **k: m.MultiStepLR(o, [5, 40, 40, 90], 0.5, **k),
    "ConstantLR": lambda m, o, **k: m.ConstantLR(o, 0.25, 40, **k),
    "LinearLR": lambda m, o, **k: m.LinearLR(o, 0.1, 0.7, 60, **k),
    "ExponentialLR": lambda m, o, **k: m.ExponentialLR(o, 0.97, **k),
    "PolynomialLR": lambda m, o, **k: m.PolynomialLR(o, 110, 0.9, **k),
    "CosineAnnealingLR": lambda m, o, **k: m.CosineAnnealingLR(o, 50, 0.01, **k),
    "CosineAnnealingWarmRestarts": lambda m, o, **k: m.CosineAnnealingWarmRestarts(o, 10, 2, 0.01, **k),
    "CyclicLR": lambda m, o, **k: m.CyclicLR(o, 0.1, 1.0, 12, 20, **k),
    "CyclicLR-triangular2": lambda m, o, **k: m.CyclicLR(o, 0.1, 1.0, 12, mode="triangular2", **k),
    "CyclicLR-exp_range": lambda m, o, **k: m.CyclicLR(o, 0.1, 1.0, 12, mode="exp_range", gamma=0.99, **k),
    "CyclicLR-scale_fn": lambda m, o, **k: m.CyclicLR(o, 0.1, 1.0, 9, scale_fn=wave, scale_mode="iterations", **k),
    "OneCycleLR": lambda m, o, **k: m.OneCycleLR(o, 1.0, 501, **k),
    "OneCycleLR-three_phase": lambda m, o, **k: m.OneCycleLR(o, 1.0, 501, three_phase=True, **k),
    "OneCycleLR-linear": lambda m, o, **k: m.OneCycleLR(
        o, 1.0, None, 3, 167, 0.7, "linear", False, div_factor=5.0, **k
    ),
}


def sequence(m, o, last_epoch=-1):
    parts = [m.ConstantLR(o, 0.1, 8), m.LinearLR(o, 0.1, 1.0, 9), m.ExponentialLR(o, 0.95)]
    return m.SequentialLR(o, parts, [10, 25], last_epoch)


def chain(m, o, last_epoch=-1):
    parts = [
        m.LinearLR,
        lambda o, last_epoch: m.StepLR(o, 10, 0.5, last_epoch),
        lambda o, last_epoch: m.ExponentialLR(o, 0.99, last_epoch),
    ]
    return m.ChainedScheduler([part(o, last_epoch=last_epoch) for part in parts])


def sequence_with_cycles(m, o, last_epoch=-1):
    warmup, rest = m.LinearLR(o, 0.1, 1.0, 9), m.ExponentialLR(o, 0.95)
    cycle = m.CyclicLR(o, 0.1, 1.0, 12, 20, max_momentum=0.95)
    return m.SequentialLR(o, [warmup, cycle, m.CosineAnnealingWarmRestarts(o, 7), rest], [10, 40, 80], last_epoch)


def one_cycle_in_a_sequence(m, o, last_epoch=-1):
    parts = [m.LinearLR(o, 0.1, 1.0, 9), m.OneCycleLR(o, 0.3, 50), m.ExponentialLR(o, 0.95)]
    return m.SequentialLR(o, parts, [10, 40], last_epoch)


# As in torch.
COMPOSED = {"SequentialLR": sequence, "ChainedScheduler": chain, "SequentialLR-cycles": sequence_with_cycles}


def sequence_of_chains(m, o, last_epoch=-1):
    def part(i):
        return m.ChainedScheduler([m.LinearLR(o, 0.2, 1.0, 6), m.ExponentialLR(o, 0.9 + i / 50)])

    inner = m.SequentialLR(o, [m.ConstantLR(o, 0.5, 3), SINGLE["MultiplicativeLR"](m, o)], [5])
    return m.SequentialLR(o, [part(0), inner, part(1), m.CyclicLR(o, 0.1, 1.0, 12)], [20, 45, 70], last_epoch)


def chain_of_sequences(m, o, last_epoch=-1):
    parts = [sequence_of_chains(m, o, last_epoch), sequence(m, o, last_epoch), m.CosineAnnealingWarmRestarts(o, 9, 2)]
    parts[2].last_epoch = last_epoch + 1
    return m.ChainedScheduler(parts)


# Where torch fails or is wrong, or has none.
OWN = {
    "SequentialLR-one_cycle": one_cycle_in_a_sequence,
    "SequentialLR-of-chains": sequence_of_chains,
    "ChainedScheduler-of-sequences": chain_of_sequences,
    "WarmupCosineLR": lambda m, o, **k: m.WarmupCosineLR(o, 10, 100, 0.1, **k),
    "WarmupLinearLR": lambda m, o, **k: m.WarmupLinearLR(o, 10, 100, **k),
}
SCHEDULES = {**SINGLE, **COMPOSED, **OWN}
# Those that can stand anywhere in a composition.
rising = {name: make for name, make in SINGLE.items() if not name.startswith(("CyclicLR", "OneCycleLR"))}
