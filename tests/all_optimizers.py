"""Every optimizer with options that make each of its states, and how the numbers of optimizers are compared."""

import numpy as np
import pytest

from pyopt import (
    ADOPT,
    ASGD,
    FTRL,
    LAMB,
    LARS,
    SGD,
    AdaBelief,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AdamWScheduleFree,
    Adan,
    AdEMAMix,
    Lion,
    NAdam,
    Optimizer,
    Parameter,
    RAdam,
    RMSprop,
    RowwiseAdagrad,
    Rprop,
    SGDScheduleFree,
)

DTYPES = ["float32", "float64"]


class Own(Optimizer):
    """A user's optimizer, in plain NumPy: g is read before and after p is written."""

    def __init__(self, params, lr=0.1, decay=0.9, maximize=False):
        super().__init__(params, {"lr": lr, "decay": decay, "maximize": maximize})

    def update(self, p, g, state, group):
        if not state:
            state["n"] = 0
            state["mean"] = np.zeros_like(p)
        state["n"] += 1
        state["mean"] *= group["decay"]
        state["mean"] += g
        sign = -1 if group["maximize"] else 1
        p -= sign * group["lr"] * state["mean"]
        p -= sign * group["lr"] / state["n"] * g


# (class, options, options that differ, state after a step in the order of its keys)
TABLE = [
    (SGD, {"lr": 0.1}, {"lr": 0.3, "weight_decay": 0.1}, []),
    (SGD, {"lr": 0.1, "momentum": 0.9}, {"momentum": 0.5, "maximize": True}, ["momentum_buffer"]),
    (
        SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "maximize": True},
        {"dampening": 0.5},
        ["momentum_buffer"],
    ),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"nesterov": False}, ["momentum_buffer"]),
    (Adam, {}, {"betas": (0.8, 0.9), "eps": 0.1}, ["step", "exp_avg", "exp_avg_sq"]),
    (
        Adam,
        {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
        {"amsgrad": False},
        ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    ),
    (
        Adam,
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"decoupled_weight_decay": False},
        ["step", "exp_avg", "exp_avg_sq"],
    ),
    (AdamW, {"lr": 0.1, "update_clip": True, "cautious": True}, {"lr": 0.3}, ["step", "exp_avg", "exp_avg_sq"]),
    (AdamW, {"lr": 0.1}, {"weight_decay": 0.5, "maximize": True}, ["step", "exp_avg", "exp_avg_sq"]),
    (AdamW, {"lr": 0.1, "amsgrad": True}, {"lr": 0.2}, ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
    (RMSprop, {}, {"alpha": 0.5}, ["step", "square_avg"]),
    (RMSprop, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5}, ["step", "square_avg", "momentum_buffer"]),
    (RMSprop, {"centered": True, "maximize": True}, {"eps": 0.1}, ["step", "square_avg", "grad_avg"]),
    (
        RMSprop,
        {"momentum": 0.9, "centered": True},
        {"weight_decay": 0.1},
        ["step", "square_avg", "momentum_buffer", "grad_avg"],
    ),
    (Adagrad, {}, {"lr": 0.2}, ["step", "sum"]),
    (
        Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "maximize": True},
        {"lr_decay": 0.5, "eps": 0.1},
        ["step", "sum"],
    ),
    (Lion, {"lr": 0.1}, {"weight_decay": 0.5}, ["exp_avg"]),
    (Lion, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, {"betas": (0.5, 0.6)}, ["exp_avg"]),
    (Adadelta, {"weight_decay": 0.1}, {"rho": 0.5}, ["step", "square_avg", "acc_delta"]),
    (Adamax, {"lr": 0.1}, {"maximize": True}, ["step", "exp_avg", "exp_inf"]),
    (NAdam, {"lr": 0.1}, {"momentum_decay": 0.1}, ["step", "mu_product", "exp_avg", "exp_avg_sq"]),
    (RAdam, {"lr": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, ["step", "exp_avg", "exp_avg_sq"]),
    (ASGD, {"lr": 0.1, "t0": 1}, {"lambd": 0.1}, ["step", "eta", "mu", "ax"]),
    (Rprop, {"lr": 0.1}, {"etas": (0.4, 1.5)}, ["step", "prev", "step_size"]),
    (AdaBelief, {"lr": 0.1, "weight_decay": 0.1}, {"eps": 0.1}, ["step", "exp_avg", "exp_avg_var"]),
    (ADOPT, {"lr": 0.1}, {"betas": (0.8, 0.9)}, ["step", "exp_avg", "exp_avg_sq"]),
    (
        AdEMAMix,
        {"alpha_warmup": 9, "beta3_warmup": 9},
        {"alpha": 1.5},
        ["step", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq"],
    ),
    (Adan, {"lr": 0.1}, {"weight_decay": 0.5}, ["step", "exp_avg", "exp_avg_diff", "exp_avg_sq", "pre_grad"]),
    (FTRL, {"lr": 0.1, "l1": 0.1}, {"l2": 0.5}, ["z", "n"]),
    (SGDScheduleFree, {"lr": 0.1}, {"momentum": 0.5}, ["step", "lr_max", "weight_sum", "z"]),
    (
        AdamWScheduleFree,
        {"warmup_steps": 3},
        {"weight_decay": 0.1},
        ["step", "lr_max", "weight_sum", "z", "exp_avg_sq"],
    ),
    (RowwiseAdagrad, {"lr": 0.1, "weight_decay": 0.1}, {"eps": 0.1}, ["sum"]),
    (Own, {}, {"decay": 0.5}, ["n", "mean"]),
]
IDS = ["-".join([row[0].__name__, *row[1]]) for row in TABLE]
CASES = pytest.mark.parametrize("cls, options", [row[:2] for row in TABLE], ids=IDS)
WITH_OTHER = pytest.mark.parametrize("cls, options, other", [row[:3] for row in TABLE], ids=IDS)
WITH_KEYS = pytest.mark.parametrize("cls, options, keys", [(row[0], row[1], row[3]) for row in TABLE], ids=IDS)
# One row, the last with state, per class; of those with sums over a tensor none: they depend on its memory order.
ONE = {row[0]: pytest.param(row[0], row[1], id=row[0].__name__) for row in TABLE if row[3]}
CLASSES = pytest.mark.parametrize("cls, options", ONE.values())
TYPES = pytest.mark.parametrize("dtype", DTYPES)
GROUP_KEYS = {
    SGD: "lr momentum dampening weight_decay nesterov maximize",
    Adam: "lr betas eps weight_decay amsgrad maximize update_clip cautious decoupled_weight_decay",
    AdamW: "lr betas eps weight_decay amsgrad maximize update_clip cautious decoupled_weight_decay",
    RMSprop: "lr momentum alpha eps centered weight_decay maximize",
    Adagrad: "lr lr_decay eps weight_decay initial_accumulator_value maximize",
    Lion: "lr betas weight_decay maximize",
    Adadelta: "lr rho eps weight_decay maximize",
    Adamax: "lr betas eps weight_decay maximize",
    NAdam: "lr betas eps weight_decay momentum_decay decoupled_weight_decay maximize",
    RAdam: "lr betas eps weight_decay maximize decoupled_weight_decay",
    ASGD: "lr lambd alpha t0 weight_decay maximize",
    Rprop: "lr etas step_sizes maximize",
    AdaBelief: "lr betas eps weight_decay maximize decoupled_weight_decay",
    ADOPT: "lr betas eps weight_decay maximize decoupled_weight_decay",
    AdEMAMix: "lr betas eps alpha beta3_warmup alpha_warmup weight_decay maximize",
    Adan: "lr betas eps weight_decay maximize",
    FTRL: "lr l1 l2 beta initial_accumulator_value maximize",
    SGDScheduleFree: "lr momentum weight_decay warmup_steps r weight_lr_power maximize train_mode",
    AdamWScheduleFree: "lr betas eps weight_decay warmup_steps r weight_lr_power maximize train_mode",
    LAMB: "lr betas eps weight_decay trust_ratio maximize",
    LARS: "lr momentum weight_decay trust_coefficient nesterov trust_ratio maximize",
    RowwiseAdagrad: "lr eps weight_decay initial_accumulator_value maximize decoupled_weight_decay",
    Own: "lr decay maximize",
}
# The same values in another memory order; parameters can be those of DENSE.
LAYOUTS = {
    "C": lambda x: np.array(x, order="C"),
    "F": lambda x: np.array(x, order="F"),
    "rolled axes": lambda x: np.moveaxis(np.array(np.moveaxis(x, 0, -1), order="C"), -1, 0) if x.ndim else x,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x,
    "every third row": lambda x: np.repeat(x, 3, axis=0)[::3] if x.ndim else x,
    "reversed": lambda x: np.flip(np.array(np.flip(x), order="C")) if x.ndim else x,
    "reversed rows": lambda x: np.flip(np.array(np.flip(x, 0), order="C"), 0) if x.ndim else x,
    "part of a larger one": lambda x: np.pad(x, 1)[(..., *(slice(1, -1),) * x.ndim)],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "misaligned": lambda x: np.frombuffer(bytearray(b"x" + x.tobytes()), x.dtype, offset=1).reshape(x.shape),
}
# Fewer values than elements: gradients alone.
BROADCAST = {
    "broadcast rows": lambda x: np.broadcast_to(x[:1], x.shape) if x.ndim else x,
    "broadcast columns": lambda x: np.broadcast_to(x[..., :1], x.shape) if x.ndim else x,
    "broadcast number": lambda x: np.broadcast_to(x.flat[0], x.shape) if x.size else x,
}
DENSE = ["C", "F", "rolled axes"]


def random(shape, dtype="float32", seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def make(cls=Adam, options=None, dtype="float32", steps=0, shapes=((3, 4), (), (5,)), order="C"):
    """An optimizer of parameters with gradients, and the parameters."""
    params = []
    for i, shape in enumerate(shapes):
        params.append(Parameter(np.array(random(shape, dtype, i), order=order), random(shape, dtype, 50 + i)))
    opt = cls(params, **(options or {}))
    for _ in range(steps):
        opt.step()
    return opt, params


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def bits(x):
    """The value of an array, whatever its memory order, or of anything else."""
    return (x.dtype, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else (type(x), x)


def values(opt):
    """All numbers of an optimizer: parameters and state."""
    return [
        (bits(p.data), {k: bits(v) for k, v in opt.state[p].items()} if p in opt.state else {}) for p in params_of(opt)
    ]


def arrays(opt):
    return [a for p in params_of(opt) for a in [p.data, *opt.state.get(p, {}).values()] if isinstance(a, np.ndarray)]


def go_on(*opts, steps=3):
    """The optimizers take the same further steps and stay equal; they share no array that is written."""
    for i in range(steps):
        for opt in opts:
            for j, p in enumerate(params_of(opt)):
                p.grad = random(p.data.shape, p.data.dtype, 100 * i + j)
            opt.step()
        assert all(values(opt) == values(opts[0]) for opt in opts)
    for i, one in enumerate(opts):
        for other in opts[:i]:
            assert not any(np.may_share_memory(a, b) for a in arrays(one) for b in arrays(other) if a.size)
