"""Schedule-free SGD and AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from pyopt._isa import kernels
from pyopt.checks import betas as pair_of_betas
from pyopt.checks import count, flag, non_negative, number
from pyopt.optimizer import Group, Optimizer
from pyopt.storage import Storage

Move = tuple[Any, Any, float]  # a parameter, its z, the share of the way to z


class TrainEval:
    """The two modes: in training the parameters are y, where gradients are taken; in evaluation the average x."""

    param_groups: list[Group]
    state: Any
    _stage: Any

    def add_param_group(self, param_group: Group) -> None:
        is_given = isinstance(param_group, Mapping) and "train_mode" in param_group
        with self._stage()[0]:
            super().add_param_group(param_group)  # type: ignore[misc]
            if not is_given:  # as the others
                self.param_groups[-1]["train_mode"] = self.param_groups[0]["train_mode"]

    def train(self) -> None:
        """Put y into the parameters, for training; nothing happens in training mode."""
        with self._stage()[0]:
            self._switch(True)

    def eval(self) -> None:
        """Put the average x into the parameters, to evaluate and save the model; nothing happens in that mode."""
        with self._stage()[0]:
            self._switch(False)

    def _switch(self, train: bool) -> None:
        groups = [group for group in self.param_groups if group["train_mode"] != train]
        moves = []
        for group in groups:
            beta = group["momentum"] if "momentum" in group else group["betas"][0]
            for p in group["params"]:
                if self.state.get(p):  # before its first step x is y
                    moves.append((p, self.state[p]["z"], float(1 - beta if train else 1 - 1 / beta)))
        if moves:
            self._interpolate(moves)
        for group in groups:
            group["train_mode"] = train

    def _interpolate(self, moves: list[Move]) -> None:
        """p = p + weight * (z - p)."""
        raise NotImplementedError


class ScheduleFree(TrainEval, Optimizer):
    """What the two optimizers below have in common."""

    number_states = ("lr_max", "weight_sum")
    counts_steps = True

    def next_numbers(self, group: Group, step: int, numbers: dict[str, float]) -> dict[str, float]:
        lr = group["lr"]
        if group["warmup_steps"]:
            lr *= min(1, step / group["warmup_steps"])
        lr_max = max(lr, numbers["lr_max"])
        weight = step ** group["r"] * lr_max ** group["weight_lr_power"]
        weight_sum = numbers["weight_sum"] + weight
        c = weight / weight_sum if weight_sum else 0
        return {"lr_max": lr_max, "weight_sum": weight_sum, "lr": lr, "c": c}

    def _interpolate(self, moves: list[Move]) -> None:
        groups = [{"params": [p], "weight": weight} for p, _, weight in moves]
        _Interpolation(groups).step(grads=[z for _, z, _ in moves])


class _Interpolation(Optimizer):
    """The passage between the modes, in one sweep: z stands for the gradient."""

    rule = kernels.interpolation
    checks = {"weight": number}

    def __init__(self, params: Iterable[Any], weight: float = 0) -> None:
        super().__init__(params, dict(weight=weight))

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return {"weight": group["weight"], "gradient_factor": 1}


def _inner(name: str, value: Any) -> None:
    """A number between 0 and 1, neither of them allowed: x cannot be found from y at 0, nor y from x at 1."""
    number(name, value, above=0, below=1)


def _betas(name: str, value: Any) -> None:
    pair_of_betas(name, value)
    _inner(f"{name}[0]", value[0])


CHECKS = {"warmup_steps": count, "r": non_negative, "weight_lr_power": non_negative, "train_mode": flag}


def _average(group: Group, step: int, beta: float) -> dict[str, float]:
    """The numbers that both rules have; lr and c are those of this step, by `next_numbers`."""
    if not group["train_mode"]:
        raise RuntimeError("step() in evaluation mode, in which the parameters are the average: call train() first")
    lr, c = group["lr"], group["c"]
    return {
        "lr": lr,
        "c": c,
        "y_step_size": lr * (beta * (1 - c) - 1),
        "weight_decay": group["weight_decay"],
        "gradient_factor": -1 if group["maximize"] else 1,
        "first": step == 1,
    }


class SGDScheduleFree(ScheduleFree):
    """Gradient descent that averages as it goes, in the place of a schedule of the learning rate.

        g = g + weight_decay * y
        k = lr * min(1, t / warmup_steps)
        w = t**r * (the largest k so far)**weight_lr_power
        c = w / (the sum of all w so far)
        y = (1 - c) * y + c * z + k * (momentum * (1 - c) - 1) * g
        z = z - k * g
        x = y + (1 - 1 / momentum) * (z - y)

    The parameters hold y, where gradients are taken. `eval()` puts x there, the average that is the result: call it
    before the model is evaluated or saved, and `train()` before the next step. A checkpoint records the mode
    ("train_mode" of the groups): save and load parameters and optimizer together.

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0; larger than with a schedule.
        momentum: how near to the average gradients are taken, > 0 and < 1.
        weight_decay: factor of the L2 penalty, >= 0.
        warmup_steps: steps in which the learning rate grows to lr.
        r, weight_lr_power: powers of the step and of the learning rate in the weights of the average, >= 0.
        maximize: ascend instead of descend.

    State: "step" (t), the numbers "lr_max" and "weight_sum", and "z" per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.
        RuntimeError: a step in evaluation mode.

    Example:
        >>> import numpy as np
        >>> from pyopt import Parameter, SGDScheduleFree
        >>> w = Parameter(np.ones(2), grad=np.array([1.0, -2.0]))
        >>> optimizer = SGDScheduleFree([w], lr=0.25, momentum=0.5)
        >>> optimizer.step()
        >>> w.data
        array([0.75, 1.5 ])
        >>> optimizer.step()
        >>> optimizer.eval()
        >>> w.data
        array([0.625, 1.75 ])

    Source: Defazio et al., The Road Less Scheduled (arXiv 2405.15682), equations 3 to 5, in the authors' form that does
    not store x. They keep the sums per group, here each parameter has its own. Not in torch.
    """

    rule = kernels.sgd_schedule_free
    state_names = {"z": None}
    checks = {**CHECKS, "momentum": _inner}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0,
        weight_lr_power: float = 2,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                warmup_steps=warmup_steps,
                r=r,
                weight_lr_power=weight_lr_power,
                maximize=maximize,
                train_mode=True,
            ),
            **storage,
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return _average(group, step, group["momentum"])


class AdamWScheduleFree(ScheduleFree):
    """AdamW that averages as it goes, in the place of a schedule of the learning rate and of the first moment.

        v = betas[1] * v + (1 - betas[1]) * g**2
        d = g / (sqrt(v / (1 - betas[1]**t)) + eps) + weight_decay * y
        k = lr * min(1, t / warmup_steps)
        w = t**r * (the largest k so far)**weight_lr_power
        c = w / (the sum of all w so far)
        y = (1 - c) * y + c * z + k * (betas[0] * (1 - c) - 1) * d
        z = z - k * d
        x = y + (1 - 1 / betas[0]) * (z - y)

    The parameters hold y, where gradients are taken. `eval()` puts x there, the average that is the result: call it
    before the model is evaluated or saved, and `train()` before the next step. A checkpoint records the mode
    ("train_mode" of the groups): save and load parameters and optimizer together.

    Args:
        params: parameters or groups of them (see Optimizer).
        lr: learning rate, >= 0; one to ten times that of AdamW with a schedule.
        betas: how near to the average gradients are taken, > 0 and < 1, and the decay of the squares, >= 0 and < 1.
        eps: added to the root, >= 0.
        weight_decay: decoupled decay, taken at y, >= 0.
        warmup_steps: steps in which the learning rate grows to lr.
        r, weight_lr_power: powers of the step and of the learning rate in the weights of the average, >= 0.
        maximize: ascend instead of descend.

    State: "step" (t), the numbers "lr_max" and "weight_sum", "z", and "exp_avg_sq" (v) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer.
        RuntimeError: a step in evaluation mode.

    Example:
        >>> import numpy as np
        >>> from pyopt import AdamWScheduleFree, Parameter
        >>> w = Parameter(np.ones(2), grad=np.array([4.0, -0.25]))
        >>> optimizer = AdamWScheduleFree([w], lr=0.25, betas=(0.5, 0.75))
        >>> optimizer.step()
        >>> w.data.round(6)
        array([0.75, 1.25])
        >>> optimizer.eval()
        >>> w.data.round(6)
        array([0.75, 1.25])

    Source: Defazio et al., The Road Less Scheduled (arXiv 2405.15682), algorithm 1, in the authors' form that does not
    store x; as in their later code the bias of v is corrected in the root, not in the learning rate. They keep the sums
    per group, here each parameter has its own. Not in torch.
    """

    rule = kernels.adamw_schedule_free
    state_names = {"z": None, "exp_avg_sq": None}
    checks = {**CHECKS, "betas": _betas}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0,
        weight_lr_power: float = 2,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                warmup_steps=warmup_steps,
                r=r,
                weight_lr_power=weight_lr_power,
                maximize=maximize,
                train_mode=True,
            ),
            **storage,
        )

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            **_average(group, step, beta1),
            "beta2": beta2,
            "weight2": 1 - beta2,
            "inverse_bias_correction2": 1 / (1 - beta2**step),
            "eps": group["eps"],
        }
