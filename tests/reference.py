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


def between(x: Array, h: State) -> Array:
    """A state as a pass finds it that reads what was stored: the first, or the second of a rule with sums."""
    return h["stored"](x) if "stored" in h else x


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
    total = s["sum"] if s else between(np.full_like(p, h["initial_accumulator_value"]), h)
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
    g = signed(g, h) if h["decoupled_weight_decay"] else penalized(signed(g, h), p, h)
    m = lerp(s["exp_avg"] if s else np.zeros_like(p), g, 1 - beta1)
    v = f(beta2) * (s["exp_avg_sq"] if s else np.zeros_like(p)) + f(1 - beta2) * g * g
    new = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    u = v
    if h["amsgrad"]:
        u = new["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], v) if s else v
    root = np.sqrt(u) * f(1 / math.sqrt(1 - beta2**t))
    rms, mask = 1.0, f(1)
    if h["update_clip"]:
        rms = max(1.0, math.sqrt(mean(squared(g / np.maximum(root, f(h["eps"]))))), key=nan_is_largest)
    if h["cautious"]:
        agrees = m * g > 0
        mask = agrees * f(1 / max(mean(agrees), 1e-3))
    kept = 1 - h["lr"] * h["weight_decay"] if h["decoupled_weight_decay"] else 1
    kept = kept if rms == 1 else 1 - (1 - kept) / rms
    return p * f(kept) - f(h["lr"] / (1 - beta1**t) / rms) * m / (root + f(h["eps"])) * mask, new


def nan_is_largest(x: float) -> tuple[bool, float]:
    return math.isnan(x), x


def total(terms: Array) -> float:
    """The sum in double over a tensor, as it lies in memory: each block of 1024 folded to one, then block by block."""
    terms = np.array(terms, np.float64).ravel("K")
    result = 0.0
    for begin in range(0, terms.size, 1024):
        block = terms[begin : begin + 1024]
        while (n := block.size) > 1:
            half = 1 << (n - 1).bit_length() - 1
            block[: n - half] += block[half:]
            block = block[:half]
        result += float(block[0])
    return result


def mean(terms: Array) -> float:
    return total(terms) / terms.size if terms.size else 0.0


def squared(x: Array) -> Array:
    return x.astype(np.float64) ** 2


def norm(x: Array) -> float:
    return math.sqrt(total(squared(x)))


def lamb(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    beta1, beta2 = h["betas"]
    t, (m, v) = started(p, s, "exp_avg", "exp_avg_sq")
    g = signed(g, h)
    m = lerp(m, g, 1 - beta1)
    v = squares(v, g, beta2)
    d = np.sqrt(v) * f(1 / math.sqrt(1 - beta2**t)) + f(h["eps"])
    u = penalized(f(1 / (1 - beta1**t)) * m / d, p, h)
    of_p, of_u = norm(p), norm(u)
    rate = h["lr"] * (of_p / of_u if h["trust_ratio"] and of_p and of_u else 1)
    d = np.sqrt(between(v, h)) * f(1 / math.sqrt(1 - beta2**t)) + f(h["eps"])
    u = penalized(f(1 / (1 - beta1**t)) * between(m, h) / d, p, h)
    return p - f(rate) * u, {"step": t, "exp_avg": m, "exp_avg_sq": v}


def lars(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    g = signed(g, h)
    of_p, of_g = norm(p), norm(g)
    rate = h["lr"]
    if h["trust_ratio"] and of_p and of_g:
        rate *= h["trust_coefficient"] * of_p / (of_g + h["weight_decay"] * of_p)
    g = f(rate) * penalized(g, p, h)
    if h["momentum"] == 0:
        return p - g, {}
    b = f(h["momentum"]) * (s["momentum_buffer"] if s else np.zeros_like(p)) + g
    return p - (g + f(h["momentum"]) * b if h["nesterov"] else b), {"momentum_buffer": b}


def prodigy(
    params: list[tuple[Array, State]], grads: list[Array], groups: list[State]
) -> tuple[list[tuple[Array, State]], dict[str, float]]:
    """All parameters of a step together; also returns the new d and d_numerator."""
    d = d_new = groups[0]["d"]
    before = []
    numerator = denominator = 0.0
    for (p, s), g, h in zip(params, grads, groups, strict=True):
        f = p.dtype.type
        beta1, beta2 = h["betas"]
        beta3 = math.sqrt(beta2) if h["beta3"] is None else h["beta3"]
        t, (m, v, moved) = started(p, s, "exp_avg", "exp_avg_sq", "s")
        first = s["p0"] if s else p
        rate = d * h["lr"]
        if h["bias_correction"]:
            rate *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        g = signed(g, h) if h["decoupled_weight_decay"] else penalized(signed(g, h), p, h)
        m = f(beta1) * m + f((1 - beta1) * d) * g
        v = f(beta2) * v + f((1 - beta2) * d * d) * g * g
        moved = f(beta3) * moved + f(d / h["d0"] * (d if h["safeguard_warmup"] else rate)) * g
        weight = d / h["d0"] * rate  # block by block
        terms = (g.astype(float) * (first.astype(float) - p.astype(float))).ravel("K")
        blocks = 0.0  # added one by one: from Python 3.12 on the sum of floats is a compensated one
        for i in range(0, p.size, 1024):
            blocks += weight * total(terms[i : i + 1024])
        numerator += blocks
        denominator += total(np.abs(moved))
        before.append((rate, {"step": t, "exp_avg": m, "exp_avg_sq": v, "s": moved, "p0": first.copy()}))
    numerator += beta3 * groups[0]["d_numerator"]
    if denominator:
        d_new = max(d, groups[0]["d_coef"] * numerator / denominator, key=nan_is_largest)
    after = []
    for (p, _), h, (rate, s) in zip(params, groups, before, strict=True):
        f = p.dtype.type
        decay = rate * h["weight_decay"] if h["decoupled_weight_decay"] else 0
        step = f(rate) * between(s["exp_avg"], h) / (np.sqrt(between(s["exp_avg_sq"], h)) + f(h["eps"] * d_new))
        after.append((p * f(1 - decay) - step, s))
    return after, {"d": d_new, "d_numerator": numerator}


def decayed(p: Array, g: Array, h: State) -> tuple[Array, Array]:
    """Parameter and gradient after weight decay, of either kind."""
    g = signed(g, h)
    if h.get("decoupled_weight_decay"):
        return p * p.dtype.type(1 - h["lr"] * h["weight_decay"]), g
    return p, penalized(g, p, h)


def started(p: Array, s: State, *names: str) -> tuple[int, list[Array]]:
    """The number of this step, and the state before it: zeros at first."""
    return (s["step"] + 1 if s else 1), [s[name] if s else np.zeros_like(p) for name in names]


def squares(v: Array, g: Array, beta: float) -> Array:
    f = v.dtype.type
    return f(beta) * v + f(1 - beta) * g * g


def adadelta(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    t, (s2, d2) = started(p, s, "square_avg", "acc_delta")
    p, g = decayed(p, g, h)
    s2 = squares(s2, g, h["rho"])
    delta = np.sqrt(d2 + f(h["eps"])) / np.sqrt(s2 + f(h["eps"])) * g
    return p - f(h["lr"]) * delta, {"step": t, "square_avg": s2, "acc_delta": squares(d2, delta, h["rho"])}


def adamax(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    beta1, beta2 = h["betas"]
    t, (m, u) = started(p, s, "exp_avg", "exp_inf")
    p, g = decayed(p, g, h)
    m = lerp(m, g, 1 - beta1)
    u = np.maximum(f(beta2) * u, np.abs(g) + f(h["eps"]))
    return p - f(h["lr"] / (1 - beta1**t)) * m / u, {"step": t, "exp_avg": m, "exp_inf": u}


def nadam(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    beta1, beta2 = h["betas"]
    t, (m, v) = started(p, s, "exp_avg", "exp_avg_sq")
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * h["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * h["momentum_decay"]))
    product = (s["mu_product"] if s else 1.0) * mu
    p, g = decayed(p, g, h)
    m = lerp(m, g, 1 - beta1)
    v = squares(v, g, beta2)
    d = np.sqrt(v * f(1 / (1 - beta2**t))) + f(h["eps"])
    nesterov = f(h["lr"] * (1 - mu) / (1 - product)) * g + f(h["lr"] * mu_next / (1 - product * mu_next)) * m
    return p - nesterov / d, {"step": t, "mu_product": product, "exp_avg": m, "exp_avg_sq": v}


def radam(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    beta1, beta2 = h["betas"]
    t, (m, v) = started(p, s, "exp_avg", "exp_avg_sq")
    p, g = decayed(p, g, h)
    m = lerp(m, g, 1 - beta1)
    v = squares(v, g, beta2)
    new = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    rate = h["lr"] / (1 - beta1**t)
    if rho <= 5:
        return p - f(rate) * m, new
    r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return p - f(rate * math.sqrt((1 - beta2**t) * r)) * m / (np.sqrt(v) + f(h["eps"])), new


def asgd(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    t, (ax,) = started(p, s, "ax")
    eta, mu = (s["eta"], s["mu"]) if s else (h["lr"], 1.0)
    p, g = decayed(p, g, h)
    p = p * f(1 - h["lambd"] * eta) - f(eta) * g
    ax = p if mu == 1 else ax + f(mu) * (p - ax)
    eta = h["lr"] / (1 + h["lambd"] * h["lr"] * t) ** h["alpha"]
    return p, {"step": t, "eta": eta, "mu": 1 / max(1, t - h["t0"]), "ax": ax}


def rprop(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    t, (before,) = started(p, s, "prev")
    size = s["step_size"] if s else between(np.full_like(p, h["lr"]), h)
    g = signed(g, h)
    turn = np.sign(g * before)
    factor = np.select([turn > 0, turn < 0], [f(h["etas"][1]), f(h["etas"][0])], f(1))
    size = np.clip(size * factor, f(h["step_sizes"][0]), f(h["step_sizes"][1]))
    g = np.where(turn < 0, f(0), g)
    return p - np.sign(g) * size, {"step": t, "prev": g, "step_size": size}


def adabelief(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    beta1, beta2 = h["betas"]
    t, (m, var) = started(p, s, "exp_avg", "exp_avg_var")
    p, g = decayed(p, g, h)
    m = lerp(m, g, 1 - beta1)
    var = squares(var, g - m, beta2) + f(h["eps"])
    d = np.sqrt(var) * f(1 / math.sqrt(1 - beta2**t)) + f(h["eps"])
    return p - f(h["lr"] / (1 - beta1**t)) * m / d, {"step": t, "exp_avg": m, "exp_avg_var": var}


def adopt(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    t, (m, v) = started(p, s, "exp_avg", "exp_avg_sq")
    if t == 1:
        g = decayed(p, g, h)[1]
        return p.copy(), {"step": 1, "exp_avg": m, "exp_avg_sq": g * g}
    p, g = decayed(p, g, h)
    limit = f((t - 1) ** 0.25)
    m = lerp(m, np.clip(g / np.maximum(np.sqrt(v), f(h["eps"])), -limit, limit), 1 - h["betas"][0])
    return p - f(h["lr"]) * m, {"step": t, "exp_avg": m, "exp_avg_sq": squares(v, g, h["betas"][1])}


def ademamix(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    lr, alpha, (beta1, beta2, beta3) = h["lr"], h["alpha"], h["betas"]
    t, (fast, slow, v) = started(p, s, "exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    if h["alpha_warmup"]:
        alpha = alpha * min(1, t / h["alpha_warmup"])
    if h["beta3_warmup"] and t < h["beta3_warmup"]:
        share = t / h["beta3_warmup"]
        beta3 = math.exp(1 / ((1 - share) * (1 / math.log(beta1)) + share * (1 / math.log(beta3))))
    g = signed(g, h)
    fast = lerp(fast, g, 1 - beta1)
    slow = lerp(slow, g, 1 - beta3)
    v = squares(v, g, beta2)
    d = np.sqrt(v) * f(1 / math.sqrt(1 - beta2**t)) + f(h["eps"])
    p = p * f(1 - lr * h["weight_decay"]) - (f(lr / (1 - beta1**t)) * fast + f(lr * alpha) * slow) / d
    return p, {"step": t, "exp_avg_fast": fast, "exp_avg_slow": slow, "exp_avg_sq": v}


def adan(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    lr, (beta1, beta2, beta3) = h["lr"], h["betas"]
    t, (m, u, n) = started(p, s, "exp_avg", "exp_avg_diff", "exp_avg_sq")
    g = signed(g, h)
    change = g - s["pre_grad"] if s else np.zeros_like(g)
    m = lerp(m, g, 1 - beta1)
    u = lerp(u, change, 1 - beta2)
    n = squares(n, g + f(beta2) * change, beta3)
    d = np.sqrt(n) * f(1 / math.sqrt(1 - beta3**t)) + f(h["eps"])
    p = p - (f(lr / (1 - beta1**t)) * m + f(lr * beta2 / (1 - beta2**t)) * u) / d
    new = {"step": t, "exp_avg": m, "exp_avg_diff": u, "exp_avg_sq": n, "pre_grad": g}
    return p * f(1 / (1 + lr * h["weight_decay"])), new


def ftrl(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    z, n = (s["z"], s["n"]) if s else (np.zeros_like(p), between(np.full_like(p, h["initial_accumulator_value"]), h))
    g = signed(g, h)
    root = np.sqrt(n + g * g)
    z = z + (g - (root - np.sqrt(n)) * f(1 / h["lr"]) * p)
    new = {"z": z, "n": n + g * g}
    d = root * f(1 / h["lr"]) + f(h["beta"] / h["lr"] + h["l2"])
    return np.where(np.abs(z) <= f(h["l1"]), f(0), (np.sign(z) * f(h["l1"]) - z) / d), new


def average(s: State, h: State) -> tuple[float, float, State]:
    """Schedule-free: the learning rate, the weight of this step in the average, and the new sums."""
    t = s["step"] + 1 if s else 1
    lr = h["lr"]
    if h["warmup_steps"]:
        lr = lr * min(1, t / h["warmup_steps"])
    highest = max(lr, s["lr_max"]) if s else lr
    weight = t ** h["r"] * highest ** h["weight_lr_power"]
    total = (s["weight_sum"] if s else 0.0) + weight
    return lr, weight / total if total else 0.0, {"step": t, "lr_max": float(highest), "weight_sum": total}


def sgd_schedule_free(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    lr, c, new = average(s, h)
    z = s["z"] if s else p
    g = penalized(signed(g, h), p, h)
    y = lerp(p, z, c) + f(lr * (h["momentum"] * (1 - c) - 1)) * g
    return y, {**new, "z": z - f(lr) * g}


def adamw_schedule_free(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    beta1, beta2 = h["betas"]
    lr, c, new = average(s, h)
    z = s["z"] if s else p
    v = squares(s["exp_avg_sq"] if s else np.zeros_like(p), signed(g, h), beta2)
    d = np.sqrt(v * f(1 / (1 - beta2 ** new["step"]))) + f(h["eps"])
    g = penalized(signed(g, h) / d, p, h)
    y = lerp(p, z, c) + f(lr * (beta1 * (1 - c) - 1)) * g
    return y, {**new, "z": z - f(lr) * g, "exp_avg_sq": v}


# --- tables of which a gradient touches some rows ---------------------------------------------------------------------


def sparse_adam(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    beta1, beta2 = h["betas"]
    g = signed(g, h)
    t, (m, v) = started(p, s, "exp_avg", "exp_avg_sq")
    m = m + f(1 - beta1) * (g - m)
    v = v + f(1 - beta2) * (g * g - v)
    step_size = h["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    return p - f(step_size) * (m / (np.sqrt(v) + f(h["eps"]))), {"step": t, "exp_avg": m, "exp_avg_sq": v}


def rowwise_adagrad(p: Array, g: Array, s: State, h: State) -> tuple[Array, State]:
    f = p.dtype.type
    p, g = decayed(p, g, h)
    sums = np.array(s["sum"] if s else np.full(p.shape[:1], h["initial_accumulator_value"], p.dtype))
    result = np.array(p)
    for i in np.ndindex(sums.shape) if p.size else ():
        sums[i] = f(float(sums[i]) + mean(squared(np.atleast_1d(g[i]))))
        result[i] -= f(h["lr"] / (math.sqrt(sums[i]) + h["eps"])) * g[i]
    return result, {"sum": sums}


def of_rows(oracle: Any, p: Array, g: Any, s: State, h: State) -> tuple[Array, State]:
    """An oracle on the touched rows alone, each once with the sum of its values; s has the whole state already."""
    rows = np.unique(g.indices)
    sums = np.zeros((len(rows), *p.shape[1:]))
    np.add.at(sums, np.searchsorted(rows, g.indices), g.values.astype(np.float64))
    touched = {k: v[rows] if isinstance(v, np.ndarray) else v for k, v in s.items()}
    part, after = oracle(p[rows], sums.astype(p.dtype), touched, h)
    p, s = p.copy(), {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in s.items()}
    p[rows] = part
    for name, value in after.items():
        if isinstance(value, np.ndarray):
            s[name][rows] = value
        else:
            s[name] = value
    return p, s


def keep_norms(rows: Array, most: float) -> Array:
    """Rows, computed in their own type, each scaled to a 2-norm of `most` where it has a larger one."""
    flat = rows.reshape(len(rows), math.prod(rows.shape[1:])).copy()
    for row in flat:
        total = 0.0
        for begin in range(0, len(row), 1024):
            squares = row[begin : begin + 1024].astype(np.float64) ** 2
            parts = [0.0] * 8
            for i, x in enumerate(squares.tolist()):
                parts[i % 8] += x
            a, b, c, d, e, f, g, h = parts
            total += ((a + b) + (c + d)) + ((e + f) + (g + h))
        norm = math.sqrt(total)
        if norm > most:
            row *= row.dtype.type(most / (norm + 1e-7))
    return flat.reshape(rows.shape)
