"""Adafactor: second moments of a matrix by one number per row and per column."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from pyopt import checks
from pyopt._isa import kernels
from pyopt._matrix import MatrixJob, Writes, check_scalars
from pyopt.optimizer import Group
from pyopt.optimizers._prepared import Array, PreparedOptimizer, Shapes, lerp

SMALLEST = float(np.finfo(np.float64).tiny)


def _not_positive(name: str, value: Any) -> None:
    """A finite number <= 0."""
    checks.number(name, value, high=0)


def _at_least_one(name: str, value: Any) -> None:
    """A finite number >= 1."""
    checks.number(name, value, 1)


def _epsilons(name: str, value: Any) -> None:
    """A number >= 0 or None, and a number >= 0."""
    first, second = checks.pair(name, value)
    if first is not None:
        checks.non_negative(f"{name}[0]", first)
    checks.non_negative(f"{name}[1]", second)


class Adafactor(PreparedOptimizer):
    """Root-mean-square scaling with sublinear memory, a clipped update and a step relative to the parameter.

        w = t**beta2_decay
        R = R + w * (mean of g**2 along rows - R), C likewise along columns; V = R C / max(mean of R, eps[0])
        V = V + w * (g**2 - V)                                            for 0-d and 1-d parameters
        u = g / max(sqrt(V), eps[0])
        r = min(lr, 1 / sqrt(t))                                          or lr, without relative_step
        a = max(eps[1], rms(p)) * r                                       or r, without scale_parameter
        p = (1 - lr * weight_decay) * p - a * u / max(1, rms(u) / d)

    Of more than two axes the last two are those of the matrices; rms is over all elements.

    Args:
        params: parameters or groups of them, float32 or float64 (see Optimizer).
        lr: the most that a step is relative to the parameter, and the rate of the decay, >= 0.
        beta2_decay: exponent of w, <= 0.
        eps: the least of sqrt(V), >= 0, None for the distance from 1 to the next float; and of rms(p), >= 0.
        d: the rms from which an update is scaled down, >= 1.
        weight_decay: decay of the parameters, >= 0: each step takes away the share lr * weight_decay.
        maximize: ascend instead of descend.
        relative_step: bound the rate by 1 / sqrt(t).
        scale_parameter: multiply the rate by the rms of the parameter.

    With relative_step=False, scale_parameter=False and eps=(1e-30, 1e-3) it is the form with a fixed rate that trainers
    of language models use; they add eps[0] to g**2 instead, and take the decay after the step.

    State: "step" (t), "row_var" (R, shape (..., n, 1)) and "col_var" (C, shape (..., 1, m)); "variance" (V) of 0-d
    and 1-d parameters.

    Raises:
        TypeError, ValueError: see Optimizer.

    Example:
        >>> import numpy as np
        >>> from pyopt import Adafactor, Parameter
        >>> w = Parameter(np.ones((2, 2)), grad=np.array([[4.0, -0.25], [4.0, -0.25]]))
        >>> Adafactor([w], lr=0.5).step()
        >>> w.data.round(6)
        array([[0.5, 1.5],
               [0.5, 1.5]])

    Source: Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost (arXiv 1804.04235),
    algorithms 4 to 6; means and eps as in torch. Sums are taken in double, in an order that the shape and the memory
    order of an array decide. A gradient of 0 moves nothing, also where torch gets 0 / 0, with an eps whose square is 0.
    """

    state_names = {"row_var": None, "col_var": None, "variance": None}
    counts_steps = True
    checks = {"beta2_decay": _not_positive, "eps": _epsilons, "d": _at_least_one,
              "relative_step": checks.flag, "scale_parameter": checks.flag}  # fmt: skip
    later = {**PreparedOptimizer.later, "relative_step": True, "scale_parameter": True}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        relative_step: bool = True,
        scale_parameter: bool = True,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                beta2_decay=beta2_decay,
                eps=eps,
                d=d,
                weight_decay=weight_decay,
                maximize=maximize,
                relative_step=relative_step,
                scale_parameter=scale_parameter,
            ),
        )

    @classmethod
    def state_shapes(cls, group: Group, shape: tuple[int, ...]) -> Shapes:
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}

    @classmethod
    def prepare(cls, writes: Writes, group: Group, step: int, p: Array, g: Array, state: dict[str, Array]) -> None:
        lr, eps = group["lr"], group["eps"]
        info = np.finfo(p.dtype)
        least = float(info.eps) if eps[0] is None else eps[0]
        numbers = {
            "weight": float(step) ** group["beta2_decay"],
            "most": min(1 / least, float(info.max)) if least else float(info.max),
            "decay_factor": 1 - lr * group["weight_decay"],
            "gradient_factor": -1.0 if group.get("maximize") else 1.0,
        }
        rate = min(lr, step**-0.5) if group.get("relative_step", True) else lr
        check_scalars(p.dtype, {**numbers, "lr": lr})
        if p.size == 0:
            return
        move = cls._prepare_vector if p.ndim < 2 else cls._prepare_matrices

        def step_size(p_squares: float, u_squares: float) -> float:
            """Of the update, from sums of squares."""
            scale = max(eps[1], math.sqrt(p_squares / p.size)) if group.get("scale_parameter", True) else 1.0
            return float(scale * rate / max(1.0, math.sqrt(u_squares / p.size) / group["d"]))

        move(writes, numbers, least, step_size, p, g, state)

    @staticmethod
    def _prepare_vector(
        writes: Writes, numbers: dict[str, float], least: float, step_size: Any, p: Array, g: Array, state: Any
    ) -> None:
        v = state["variance"]
        with np.errstate(all="ignore"):
            wide = g.astype(np.float64)
            inverse = np.minimum(1 / np.sqrt(lerp(v.astype(np.float64), wide**2, numbers["weight"])), numbers["most"])
            size = step_size(float(np.sum(p.astype(np.float64) ** 2)), float(np.sum((wide * inverse) ** 2)))
        writes.add_rule(kernels.adafactor, {**numbers, "step_size": size}, p, g, v)

    @staticmethod
    def _prepare_matrices(
        writes: Writes, numbers: dict[str, float], least: float, step_size: Any, p: Array, g: Array, state: Any
    ) -> None:
        after, swapped = p, False
        if not p.flags.c_contiguous:
            swapped = p.swapaxes(-1, -2).flags.c_contiguous
            if not swapped:  # the axes of the matrices do not lie next to each other: on copies
                after, g = np.ascontiguousarray(p), np.ascontiguousarray(g)
        shape = (-1, *p.shape[-2:])
        if swapped:
            shape = (-1, p.shape[-1], p.shape[-2])
            job = MatrixJob(p.swapaxes(-1, -2).reshape(shape), g.swapaxes(-1, -2).reshape(shape))
        else:
            job = MatrixJob(after.reshape(shape), g.reshape(shape))
        row_sums, column_sums, p_squares = job.squares(kernels.squares)
        if swapped:
            row_sums, column_sums = column_sums, row_sums
        n, m = p.shape[-2:]
        with np.errstate(all="ignore"):
            rows = _moved(state["row_var"], row_sums / m, numbers["weight"])
            columns = _moved(state["col_var"], column_sums / n, numbers["weight"])
            wide = rows.reshape(row_sums.shape).astype(np.float64)
            mean = np.maximum(wide.mean(axis=1, keepdims=True), least or SMALLEST)  # 0 / 0 of no gradient is no NaN
            row_factors = np.sqrt(mean) / np.sqrt(wide)
            column_factors = 1 / np.sqrt(columns.reshape(column_sums.shape).astype(np.float64))
            if swapped:
                row_factors, column_factors = column_factors, row_factors
            job.set_factors(row_factors, column_factors, numbers["most"])
        size = step_size(p_squares, job.total(kernels.update_squares)) * numbers["gradient_factor"]
        if after is p:
            writes.add_update(kernels.update, job, size, numbers["decay_factor"])
        else:
            beside = Writes()
            beside.add_update(kernels.update, job, size, numbers["decay_factor"])
            beside.apply()
            in_place = np.empty_like(p, subok=False)
            in_place[...] = after
            writes.add_copy(p, in_place)
        writes.add_copy(state["row_var"], rows)
        writes.add_copy(state["col_var"], columns)


def _moved(variance: Array, mean: Array, weight: float) -> Array:
    """A moving mean after one more, in double, rounded once."""
    moved: Array = lerp(variance.astype(np.float64), mean.reshape(variance.shape), weight)
    return moved.astype(variance.dtype)
