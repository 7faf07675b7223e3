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


# A walk of a whole tensor, for what has norms: the parameter's first values and the gradients give all later ones.
Tensor = np.ndarray[Any, Any]


def stable_adamw(p: Tensor, gradients: list[Tensor], lr: float, weight_decay: float) -> Iterator[Tensor]:
    """Wortsman et al., algorithm 2, with its debiased betas. optax has none; optimi's has other defaults."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in (beta1, beta2))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rate = lr / max(1, math.sqrt(np.mean(g**2 / np.maximum(v, eps**2))))
        p = p - rate * weight_decay * p - rate * m / (np.sqrt(v) + eps)
        yield p


def cautious_adamw(p: Tensor, gradients: list[Tensor], lr: float, weight_decay: float) -> Iterator[Tensor]:
    """Liang et al., algorithm 1, on AdamW, with the scale of timm: 1 / max(mean of the mask, 1e-3).

    The paper has n / (sum of the mask + 1), and no limit. optax has none.
    """
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        u = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
        mask = u * g > 0
        p = p - lr * weight_decay * p - lr * u * mask / max(mask.mean(), 1e-3)
        yield p


def lamb(p: Tensor, gradients: list[Tensor], lr: float, weight_decay: float) -> Iterator[Tensor]:
    """You et al. 2019, algorithm 2, phi the identity. optax.lamb: the same."""
    beta1, beta2, eps = 0.9, 0.999, 1e-6
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        u = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * p
        p = p - lr * np.linalg.norm(p) / np.linalg.norm(u) * u
        yield p


def lars(p: Tensor, gradients: list[Tensor], lr: float, weight_decay: float) -> Iterator[Tensor]:
    """You et al. 2017, algorithm 1.

    optax.lars: the same, without decay; with it, another one, which divides by the norm of g + weight_decay * p.
    """
    v = np.zeros_like(p)
    for g in gradients:
        local = 0.001 * np.linalg.norm(p) / (np.linalg.norm(g) + weight_decay * np.linalg.norm(p))
        v = 0.9 * v + lr * local * (g + weight_decay * p)
        p = p - v
        yield p


def prodigy(p: Tensor, gradients: list[Tensor], lr: float, weight_decay: float) -> Iterator[Tensor]:
    """Mishchenko and Defazio, algorithm 4, the decay of AdamW, and eps times the new d, as in their package.

    Its sums of all steps are weighted by powers of beta3. optax.contrib.prodigy: the same, with the bias correction.
    """
    beta1, beta2, eps, d = 0.9, 0.999, 1e-8, 1e-6
    beta3 = math.sqrt(beta2)
    start, m, v = p, np.zeros_like(p), np.zeros_like(p)
    along: list[float] = []
    moved: list[Tensor] = []
    for t, g in enumerate(gradients):
        m, v = beta1 * m + (1 - beta1) * d * g, beta2 * v + (1 - beta2) * d**2 * g**2
        along.append(lr * d**2 * float(g @ (start - p)))
        moved.append(lr * d**2 * g)
        ages = beta3 ** np.arange(t, -1, -1)
        after = max(d, float(ages @ np.array(along)) / np.abs(ages @ np.array(moved)).sum())
        p = p - lr * d * weight_decay * p - lr * d * m / (np.sqrt(v) + after * eps)
        d = after
        yield p


TENSORS: list[tuple[type[pyopt.Optimizer], Callable[..., Iterator[Tensor]], dict[str, Any]]] = [
    (pyopt.AdamW, stable_adamw, {"update_clip": True}),
    (pyopt.AdamW, cautious_adamw, {"cautious": True}),
    (pyopt.LAMB, lamb, {}),
    (pyopt.LARS, lars, {}),
    (pyopt.Prodigy, prodigy, {}),
]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("optimizer, walk, more", TENSORS, ids=[row[1].__name__ for row in TENSORS])
def test_of_whole_tensors_as_printed(
    optimizer: type[pyopt.Optimizer], walk: Any, more: dict[str, Any], maximize: bool
) -> None:
    rng = np.random.default_rng(7)
    start = rng.standard_normal(50)
    gradients = rng.standard_normal((STEPS, 50)) * rng.uniform(0.1, 10, (STEPS, 1)) + 0.3
    lr = 1.0 if optimizer is pyopt.Prodigy else 0.02
    p = pyopt.Parameter(start.copy())
    ours = optimizer([p], lr=lr, weight_decay=0.1, **more, maximize=maximize)
    sign = -1 if maximize else 1
    for step, expected in enumerate(walk(start, [sign * g for g in gradients], lr=lr, weight_decay=0.1)):
        ours.step(grads=[gradients[step]])
        np.testing.assert_allclose(p.data, expected, rtol=1e-9, atol=1e-12, err_msg=f"step {step + 1}")
    assert step == STEPS - 1


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
