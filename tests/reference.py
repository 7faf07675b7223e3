"""The oracles: each rule as its paper and torch.optim have it, in NumPy and in the dtype of the parameter.

They share no code with pyopt: equality of bits is asked of the kernels. An oracle takes the parameter and the state and
gives the new ones; it never writes into what it is given.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
State = dict[str, Any]


def lerp(a: Array, b: Array, weight: float) -> Array:
    """torch.lerp: from the nearer end."""
    w = a.dtype.type(weight)
    return a + w * (b - a) if w < 0.5 else b - (1 - w) * (b - a)


def signed(g: Array, h: State) -> Array:
    return -g if h["maximize"] else g


def penalized(g: Array, p: Array, h: State) -> Array:
    return g if h["weight_decay"] == 0 else g + p.dtype.type(h["weight_decay"]) * p


def sgd(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    g = penalized(signed(g, h), p, h)
    if h["momentum"] == 0:
        return p - f(h["lr"]) * g, {}
    b = f(h["momentum"]) * s["momentum_buffer"] + f(1 - h["dampening"]) * g if s else g
    g = g + f(h["momentum"]) * b if h["nesterov"] else b
    return p - f(h["lr"]) * g, {"momentum_buffer": b}


def lion(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    beta1, beta2 = h["betas"]
    g = signed(g, h)
    m = s["exp_avg"] if s else np.zeros_like(p)
    c = f(beta1) * m + f(1 - beta1) * g
    return p * f(1 - h["lr"] * h["weight_decay"]) - f(h["lr"]) * np.sign(c), {
        "exp_avg": f(beta2) * m + f(1 - beta2) * g
    }


def adagrad(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    t = s["step"] + 1 if s else 1
    total = s["sum"] if s else np.full_like(p, h["initial_accumulator_value"])
    g = penalized(signed(g, h), p, h)
    total = total + g * g
    lr = h["lr"] / (1 + (t - 1) * h["lr_decay"])
    return p - f(lr) * g / (np.sqrt(total) + f(h["eps"])), {"step": t, "sum": total}


def rmsprop(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    alpha = h["alpha"]
    g = penalized(signed(g, h), p, h)
    new: State = {"step": s["step"] + 1 if s else 1}
    new["square_avg"] = f(alpha) * (s["square_avg"] if s else np.zeros_like(p)) + f(1 - alpha) * g * g
    d = new["square_avg"]
    if h["centered"]:
        new["grad_avg"] = lerp(s["grad_avg"] if s else np.zeros_like(p), g, 1 - alpha)
        d = d - new["grad_avg"] * new["grad_avg"]
    d = np.sqrt(d) + f(h["eps"])
    if h["momentum"] == 0:
        return p - f(h["lr"]) * g / d, new
    new["momentum_buffer"] = f(h["momentum"]) * (s["momentum_buffer"] if s else np.zeros_like(p)) + g / d
    return p - f(h["lr"]) * new["momentum_buffer"], new


def adam(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    beta1, beta2 = h["betas"]
    t = s["step"] + 1 if s else 1
    g = signed(g, h)
    if h["decoupled_weight_decay"]:
        p = p * f(1 - h["lr"] * h["weight_decay"])
    else:
        g = penalized(g, p, h)
    m = lerp(s["exp_avg"] if s else np.zeros_like(p), g, 1 - beta1)
    v = f(beta2) * (s["exp_avg_sq"] if s else np.zeros_like(p)) + f(1 - beta2) * g * g
    new = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    u = v
    if h["amsgrad"]:
        u = new["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], v) if s else v
    d = np.sqrt(u) * f(1 / math.sqrt(1 - beta2**t)) + f(h["eps"])
    return p - f(h["lr"] / (1 - beta1**t)) * m / d, new
