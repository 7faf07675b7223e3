"""What torch lacks against the papers: each algorithm as printed there, number by number in double.

The transcriptions share no form with the kernels: the averages are kept where the kernels derive them, sums are sums of
all steps, and the betas are the papers'. Beside each stands how others define the name; "the same" in optax 0.2.8 has
been run side by side in double, 30 steps, with differences of at most 1e-15.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import pyopt

STEPS = 30
# A walk of one number: the parameter's first value and the gradients give its value after every step.
Walk = Iterator[float]


def lion(p: float, gradients: list[float], lr: float, weight_decay: float) -> Walk:
    """Chen et al., algorithm 2. optax.lion: the same."""
    beta1, beta2, m = 0.9, 0.99, 0.0
    for g in gradients:
        c = beta1 * m + (1 - beta1) * g
        p = p - lr * (math.copysign(1, c) + weight_decay * p)
        m = beta2 * m + (1 - beta2) * g
        yield p


def adabelief(p: float, gradients: list[float], lr: float, weight_decay: float) -> Walk:
    """Zhuang et al., algorithm 2, decay decoupled as in their package.

    optax.adabelief: the same, without decay. The package of the authors rectifies as RAdam by default.
    """
    beta1, beta2, eps = 0.9, 0.999, 1e-16
    m = s = 0.0
    for t, g in enumerate(gradients, 1):
        p -= lr * weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        s = beta2 * s + (1 - beta2) * (g - m) ** 2 + eps
        p -= lr * (m / (1 - beta1**t)) / (math.sqrt(s / (1 - beta2**t)) + eps)
        yield p


def adopt(p: float, gradients: list[float], lr: float, weight_decay: float) -> Walk:
    """Taniguchi et al., algorithm 2: v_0 = g_0**2, then t from 1 with the clip t**(1/4). L2 decay.

    optax.contrib.adopt: the same, without decay. The authors' package, later: no clip, and a floor of the root that
    falls from 1 to eps.
    """
    beta1, beta2, eps = 0.9, 0.9999, 1e-6
    m, v = 0.0, (gradients[0] + weight_decay * p) ** 2
    yield p
    for t, g in enumerate(gradients[1:], 1):
        g += weight_decay * p
        m = beta1 * m + (1 - beta1) * min(max(g / max(math.sqrt(v), eps), -(t**0.25)), t**0.25)
        p -= lr * m
        v = beta2 * v + (1 - beta2) * g**2
        yield p


def ademamix(p: float, gradients: list[float], lr: float, weight_decay: float) -> Walk:
    """Pagliardini et al., algorithm 1 with the schedulers of section 3.

    optax.contrib.ademamix: the same, with schedules of the caller's, and alpha 5 by default. pytorch_optimizer divides
    the slow mean by 1 - beta1**t, too. The authors add 1e-8 to the betas inside the logarithms of the scheduler.
    """
    beta1, beta2, beta3, alpha, eps, warmup = 0.9, 0.999, 0.9999, 2.0, 1e-8, 20
    m1 = m2 = v = 0.0
    for t, g in enumerate(gradients, 1):
        share = min(t / warmup, 1)
        b1, b3 = math.log(beta1), math.log(beta3)
        b = min(math.exp(b1 * b3 / ((1 - share) * b3 + share * b1)), beta3)
        m1 = beta1 * m1 + (1 - beta1) * g
        m2 = b * m2 + (1 - b) * g
        v = beta2 * v + (1 - beta2) * g**2
        direction = (m1 / (1 - beta1**t) + min(t * alpha / warmup, alpha) * m2) / (math.sqrt(v / (1 - beta2**t)) + eps)
        p -= lr * (direction + weight_decay * p)
        yield p


def adan(p: float, gradients: list[float], lr: float, weight_decay: float) -> Walk:
    """Xie et al., algorithm 1 with the paper's betas, and the bias corrections of the authors' package.

    optax.adan: another one. It counts the betas as the package and takes 1 - beta2 of the change all the same, 0.08 of
    it instead of 0.92; eps also stands inside the root, and the decay is added to the direction.
    """
    beta1, beta2, beta3, eps = 0.02, 0.08, 0.01, 1e-8
    m = v = n = 0.0
    last = gradients[0]
    for t, g in enumerate(gradients, 1):
        m = (1 - beta1) * m + beta1 * g
        v = (1 - beta2) * v + beta2 * (g - last)
        n = (1 - beta3) * n + beta3 * (g + (1 - beta2) * (g - last)) ** 2
        m_hat, v_hat, n_hat = (x / (1 - (1 - b) ** t) for x, b in ((m, beta1), (v, beta2), (n, beta3)))
        p = (p - lr / (math.sqrt(n_hat) + eps) * (m_hat + (1 - beta2) * v_hat)) / (1 + lr * weight_decay)
        last = g
        yield p


def ftrl(p: float, gradients: list[float], lr: float, l1: float, l2: float, beta: float) -> Walk:
    """McMahan et al., equation 1: argmin of g . w + sum of sigma / 2 * (w - w_s)**2 + l1 * abs(w) + l2 / 2 * w**2, with
    1 / eta_t = (beta + sqrt(0.1 + sum of g**2)) / lr for its learning rate; w_0 counts with 0.

    Keras' l2 is half of this; TensorFlow also knows other powers than the root, and a shrinkage. optax has none.
    """
    squares, total, pulled = 0.1, 0.0, 0.0
    for g in gradients:
        sigma = (math.sqrt(squares + g**2) - math.sqrt(squares)) / lr
        squares += g**2
        total, pulled = total + g, pulled + sigma * p
        slope, curvature = total - pulled, (beta + math.sqrt(squares)) / lr + l2
        p = 0.0 if abs(slope) <= l1 else -(slope - math.copysign(l1, slope)) / curvature
        yield p


def sgd_schedule_free(p: float, gradients: list[float], lr: float, weight_decay: float) -> Walk:
    """Defazio et al., equations 3 to 5: y between x and z, z descends, x averages; gives y. optax.contrib.schedule_free
    around sgd: the same, with b1 for momentum, without decay and warm-up."""
    beta, weights = 0.9, []
    x = z = p
    for t, g in enumerate(gradients, 1):
        y = (1 - beta) * z + beta * x
        rate = lr * min(1, t / 10)
        z -= rate * (g + weight_decay * y)
        weights.append(max([rate, *weights]))
        c = weights[-1] ** 2 / sum(w**2 for w in weights)
        x = (1 - c) * x + c * z
        yield (1 - beta) * z + beta * x


def adamw_schedule_free(p: float, gradients: list[float], lr: float, weight_decay: float) -> Walk:
    """Defazio et al., algorithm 1, the bias of v corrected in the root. Their first package corrects the rate instead,
    as does the paper. optax.contrib.schedule_free_adamw: the same; its warm-up begins at 0, a step later."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    x = z = p
    v = total = 0.0
    for t, g in enumerate(gradients, 1):
        y = (1 - beta1) * z + beta1 * x
        v = beta2 * v + (1 - beta2) * g**2
        rate = lr * min(1, t / 10)
        z -= rate * (g / (math.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * y)
        total += rate**2
        x = (1 - rate**2 / total) * x + rate**2 / total * z
        yield (1 - beta1) * z + beta1 * x


DECAY = {"lr": 0.02, "weight_decay": 0.1}
PAPERS: list[tuple[type[pyopt.Optimizer], Callable[..., Walk], dict[str, Any], dict[str, Any]]] = [
    (pyopt.Lion, lion, DECAY, {}),
    (pyopt.AdaBelief, adabelief, DECAY, {}),
    (pyopt.ADOPT, adopt, DECAY, {}),
    (pyopt.AdEMAMix, ademamix, DECAY, {"alpha_warmup": 20, "beta3_warmup": 20}),
    (pyopt.Adan, adan, DECAY, {}),
    (pyopt.FTRL, ftrl, {"lr": 0.1, "l1": 1.5, "l2": 0.3, "beta": 1.0}, {}),
    (pyopt.SGDScheduleFree, sgd_schedule_free, DECAY, {"warmup_steps": 10}),
    (pyopt.AdamWScheduleFree, adamw_schedule_free, DECAY, {"warmup_steps": 10}),
]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("optimizer, walk, options, more", PAPERS, ids=[row[1].__name__ for row in PAPERS])
def test_as_printed(
    optimizer: type[pyopt.Optimizer], walk: Any, options: dict[str, Any], more: dict[str, Any], maximize: bool
) -> None:
    rng = np.random.default_rng(7)
    start = rng.standard_normal(5)
    gradients = rng.standard_normal((STEPS, 5)) + 0.3
    p = pyopt.Parameter(start.copy())
    ours = optimizer([p], **options, **more, maximize=maximize)
    sign = -1 if maximize else 1
    walks = [
        walk(float(x), [sign * float(g) for g in column], **options)
        for x, column in zip(start, gradients.T, strict=True)
    ]
    for step, expected in enumerate(zip(*walks, strict=True)):
        ours.step(grads=[gradients[step]])
        np.testing.assert_allclose(p.data, expected, rtol=1e-9, atol=1e-12, err_msg=f"step {step + 1}")
    assert step == STEPS - 1
