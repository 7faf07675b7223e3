"""L-BFGS: a quasi-Newton method with limited memory, and its line search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pyopt import checks
from pyopt._asked import Asked
from pyopt._isa import kernels
from pyopt._matrix import Writes, apply_rule, dot
from pyopt.checks import plain
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers._prepared import in_order
from pyopt.optimizers.muon import one_of
from pyopt.parameter import (
    Parameter,
    check_data,
    check_gradient,
    check_long,
    check_no_overlap,
    label,
    parameter_ranges,
)

Array = np.ndarray[Any, Any]
# A point on a line: how far, the loss there, the flat gradient, and its product with the direction.
Point = tuple[float, float, Array, float]


def _at_least_one(name: str, value: Any) -> None:
    """An int >= 1."""
    checks.count(name, value)
    checks.number(name, value, 1)


class LBFGS(Optimizer):
    """Quasi-Newton steps: the inverse Hessian from the last changes of parameters (s) and gradients (y).

        d = -H g                      by the two-loop recursion over the last pairs, from (s y) / (y y) on the diagonal
        p = p + t * d                 t = lr, in the very first iteration lr * min(1, 1 / sum(abs(g)))

    One step makes up to max_iter iterations and calls the closure in each; with line_search_fn="strong_wolfe" as often
    as it takes for t to satisfy the strong Wolfe conditions (with 1e-4 and 0.9).

    Args:
        params: parameters, float32 or float64 (see Optimizer); one group at most.
        lr: learning rate, >= 0.
        max_iter: the most iterations of a step, an int >= 1.
        max_eval: the most calls of the closure in a step, an int >= 1; None for max_iter * 5 // 4.
        tolerance_grad: a step ends where no element of the gradient is larger than this, >= 0.
        tolerance_change: and where neither parameters nor loss change by more than this, >= 0.
        history_size: how many pairs are kept, an int >= 1: memory of twice the parameters each.
        line_search_fn: None or "strong_wolfe".
        maximize: ascend instead of descend.

    State, of the first parameter: "func_evals", "n_iter", "d", "t", "old_dirs" (y), "old_stps" (s), "ro" (1 / (y s)),
    "H_diag", "prev_flat_grad", "prev_loss"; arrays over all parameters, one behind the other, each in C order.

    Raises:
        TypeError, ValueError: see Optimizer; a second group; step() without a closure.

    Example:
        >>> import numpy as np
        >>> from pyopt import LBFGS, Parameter
        >>> w = Parameter(np.array([-1.5, 1.0]))
        >>> def closure():
        ...     x, y = w.data.tolist()
        ...     w.grad = np.array([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)])
        ...     return 100 * (y - x**2) ** 2 + (1 - x) ** 2
        >>> LBFGS([w], max_iter=100, line_search_fn="strong_wolfe").step(closure)
        162.5
        >>> w.data.round(4)
        array([1., 1.])

    Source: Nocedal and Wright, Numerical Optimization (2006), algorithms 7.4 and 7.5; the line search, with cubic
    interpolation, is that of minFunc, as in torch. Scalars and sums are taken in double. All or nothing: if the closure
    raises, parameters and state are what they were before the step.
    """

    checks = {
        "max_iter": _at_least_one,
        "max_eval": _at_least_one,
        "tolerance_grad": checks.non_negative,
        "tolerance_change": checks.non_negative,
        "history_size": _at_least_one,
        "line_search_fn": one_of(None, "strong_wolfe"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        maximize: bool = False,
    ) -> None:
        _at_least_one("max_iter", max_iter)
        super().__init__(
            params,
            dict(
                lr=lr,
                max_iter=max_iter,
                max_eval=max(1, max_iter * 5 // 4) if max_eval is None else max_eval,
                tolerance_grad=tolerance_grad,
                tolerance_change=tolerance_change,
                history_size=history_size,
                line_search_fn=line_search_fn,
                maximize=maximize,
            ),
        )

    def add_param_group(self, param_group: Group) -> None:
        if self.param_groups:
            raise ValueError("LBFGS has one param group, must not get another: it steps along one line")
        super().add_param_group(param_group)

    def _check_entry(self, what: str, entry: dict[str, Any], p: Parameter, group: Group) -> None:
        if "n_iter" in entry:
            _check_state(f"{what}: state_dict", entry, sum(each.size for each in group["params"]))

    def _run(self, closure: Callable[[], Any] | None, grads: Any, what: Asked | None) -> Any:
        if what is not None:
            raise TypeError(
                "LBFGS takes gradients many times in a step: no max_norm, nonfinite, zero_grad and gradient_factor"
            )
        if grads is not None:
            raise TypeError("LBFGS takes gradients from the closure's parameters alone, step must not get grads=")
        if not callable(closure):
            raise TypeError(f"closure is a {type(closure).__name__}, must be callable: LBFGS calls it many times")
        losses: list[Any] = []
        self._workspace.step_by(lambda *_: losses.append(self._search(closure)), self)
        return losses[0]

    def _search(self, closure: Callable[[], Any]) -> Any:
        """A step; whatever it has changed is put back if it raises."""
        (group,) = self.param_groups
        self.check_group(group)
        params = list(group["params"])
        options = {**self.later, **plain(group)}
        line = Line(params, closure, options["maximize"])
        entry = self.state.setdefault(params[0], {})
        if "n_iter" in entry:
            _check_state(label(0, params[0]), entry, line.size)
        try:
            loss, after = iterate(line, options, entry)
        except BaseException:
            line.return_to_start()
            raise
        entry.update(after)
        return loss


def _check_state(what: str, entry: Any, size: int) -> None:
    """Raise unless an entry is one that a step has left, with parameters of so many elements."""
    if not isinstance(entry, dict):
        raise TypeError(f"{what}: its state is a {type(entry).__name__}, must be a dict")
    names = ("d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss", "func_evals")
    if entry["n_iter"] and (missing := [name for name in names if name not in entry]):
        raise KeyError(f"{what}: state has no {missing[0]!r}, only {sorted(map(str, entry))}")
    lists = [entry.get(name, []) for name in ("old_dirs", "old_stps", "ro")]
    if not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
        raise TypeError(f"{what}: state 'old_dirs', 'old_stps' and 'ro' must be lists of one length")
    arrays = [entry[name] for name in ("d", "prev_flat_grad") if name in entry] + lists[0] + lists[1]
    for array in arrays:
        shape = getattr(array, "shape", None)
        if not isinstance(array, np.ndarray) or shape != (size,) or array.dtype.kind != "f":
            raise ValueError(f"{what}: state holds an array of shape {shape}, must be floats of shape {(size,)}")


# --- the parameters as one vector -------------------------------------------------------------------------------------


class Line:
    """The parameters of an optimizer as one flat vector, and the loss over it, which is to become small."""

    def __init__(self, params: list[Parameter], closure: Callable[[], Any], maximize: bool) -> None:
        check_no_overlap(parameter_ranges(params))
        self.params, self.closure, self.maximize = params, closure, maximize
        self.arrays = [check_long(label(i, p), check_data(label(i, p), p.data), "LBFGS") for i, p in enumerate(params)]
        self.size = sum(array.size for array in self.arrays)
        self.dtype = np.result_type(*self.arrays)
        self.return_to_start = self.way_back()

    def way_back(self) -> Callable[[], None]:
        """A call that puts the parameters back to where they are now."""
        writes = Writes()
        for array in self.arrays:
            writes.add_copy(array, array.copy("K"))
        return writes.apply

    def evaluate(self) -> tuple[Any, float, Array]:
        """What the closure returns, the loss, and the flat gradient."""
        value = self.closure()
        parts = []
        for i, (p, array) in enumerate(zip(self.params, self.arrays, strict=True)):
            if p.data is not array:
                raise RuntimeError(f"{label(i, p)} got another array in the closure, must stay the same in a step")
            grad = np.zeros_like(array) if p.grad is None else check_gradient(label(i, p), array, p.grad)
            parts.append(grad.reshape(-1))
        g = np.concatenate(parts, dtype=self.dtype)
        return (value, -float(value), np.negative(g, out=g)) if self.maximize else (value, float(value), g)

    def move(self, t: float, d: Array) -> None:
        """Add t * d to the parameters."""
        writes, first = Writes(), 0
        for array in self.arrays:
            part = d[first : first + array.size].reshape(array.shape).astype(array.dtype, copy=False)
            first += array.size
            writes.add_rule(kernels.sgd, times(t), array, in_order(array, part))
        writes.apply()


def times(factor: float) -> dict[str, float]:
    """The numbers of SGD's rule with which it adds factor * g."""
    return {**_PLAIN, "lr": -factor}


_PLAIN = {"momentum": 0, "one_minus_dampening": 1, "weight_decay": 0, "gradient_factor": 1, "nesterov": 0, "first": 0}


def product(x: Array, y: Array) -> float:
    """x y, in double."""
    return dot(kernels.product, x, y)


def largest(x: Array) -> float:
    """The largest magnitude; NaN if there is one."""
    return max(float(x.max()), -float(x.min())) if x.size else 0.0


# --- the iterations ---------------------------------------------------------------------------------------------------


def iterate(line: Line, group: Group, entry: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The iterations of a step: what the first call of the closure returned, and the new items of the state."""
    lr, max_iter, max_eval = group["lr"], group["max_iter"], group["max_eval"]
    tolerance_grad, tolerance_change = group["tolerance_grad"], group["tolerance_change"]
    func_evals, n_iter = int(entry.get("func_evals", 0)), int(entry.get("n_iter", 0))
    first, loss, g = line.evaluate()
    evals = 1
    if largest(g) <= tolerance_grad:
        return first, {"func_evals": func_evals + 1, "n_iter": n_iter}
    pairs = Pairs(entry, g.dtype)
    d, t, before = pairs.last
    loss_before = loss
    for i in range(1, max_iter + 1):
        n_iter += 1
        if n_iter == 1 or d is None or before is None:
            d, t = -g, min(1.0, _quotient(1.0, float(np.abs(g).sum(dtype=np.float64)))) * lr
            pairs.forget()
        else:
            pairs.append(g - before, t * d, group["history_size"])
            d, t = pairs.direction(g), lr
        before, loss_before = g, loss
        slope = product(g, d)
        if slope > -tolerance_change:
            break
        made = 0
        if group["line_search_fn"] is not None:
            loss, g, t, made = strong_wolfe(line, d, (0.0, loss, g, slope), t, max_eval - evals)
            line.move(t, d)
        else:
            line.move(t, d)
            if i != max_iter:  # at a random loss, one more would be of no use
                _, loss, g = line.evaluate()
                made = 1
        evals += made
        if (
            i == max_iter
            or evals >= max_eval
            or largest(g) <= tolerance_grad
            or abs(t) * largest(d) <= tolerance_change
            or abs(loss - loss_before) < tolerance_change
        ):
            break
    after = {"d": d, "t": t, **pairs.items(), "prev_flat_grad": before, "prev_loss": loss_before}
    return first, {"func_evals": func_evals + evals, "n_iter": n_iter, **after}


class Pairs:
    """The changes of parameters and gradients that stand for the Hessian."""

    def __init__(self, entry: dict[str, Any], dtype: Any) -> None:
        def arrays(name: str) -> list[Array]:
            return [np.ascontiguousarray(each, dtype) for each in entry.get(name, ())]

        self.y, self.s = arrays("old_dirs"), arrays("old_stps")
        self.ro = [float(each) for each in entry.get("ro", ())]
        self.diagonal = float(entry.get("H_diag", 1))
        vectors = [None if entry.get(name) is None else np.ascontiguousarray(entry[name], dtype) for name in _VECTORS]
        self.last = vectors[0], float(entry.get("t", 0)), vectors[1]

    def items(self) -> dict[str, Any]:
        return {"old_dirs": self.y, "old_stps": self.s, "ro": self.ro, "H_diag": self.diagonal}

    def forget(self) -> None:
        self.y, self.s, self.ro, self.diagonal = [], [], [], 1.0

    def append(self, y: Array, s: Array, most: int) -> None:
        """Keep a pair along which the loss is convex, in the place of the oldest where there are enough."""
        ys = product(y, s)
        if ys > 1e-10:
            keep = slice(max(0, len(self.y) - most + 1), None)
            self.y, self.s, self.ro = [*self.y[keep], y], [*self.s[keep], s], [*self.ro[keep], 1 / ys]
            self.diagonal = ys / product(y, y)

    def direction(self, g: Array) -> Array:
        """-H g."""
        q = -g
        alphas = []
        for y, s, ro in zip(reversed(self.y), reversed(self.s), reversed(self.ro), strict=True):
            alphas.append(product(s, q) * ro)
            apply_rule(kernels.sgd, times(-alphas[-1]), q, y)
        q *= self.diagonal
        for y, s, ro, alpha in zip(self.y, self.s, self.ro, reversed(alphas), strict=True):
            apply_rule(kernels.sgd, times(alpha - product(y, q) * ro), q, s)
        return q


_VECTORS = ("d", "prev_flat_grad")


# --- the line search --------------------------------------------------------------------------------------------------


def strong_wolfe(line: Line, d: Array, start: Point, t: float, most: int) -> tuple[float, Array, float, int]:
    """The loss, gradient and length of a step along d that satisfies the strong Wolfe conditions, and the calls made.

    As in minFunc: the step grows until an interval holds such a point, which is then narrowed by cubic interpolation.
    The parameters are where they were, afterwards.
    """
    decrease, curvature, tolerance_change = 1e-4, 0.9, 1e-9
    _, loss, _, slope = start
    go_back = line.way_back()

    def at(t: float) -> Point:
        line.move(t, d)
        _, value, g = line.evaluate()
        go_back()
        return t, value, g, product(g, d)

    def is_too_high(point: Point) -> bool:
        return point[1] > loss + decrease * point[0] * slope

    def is_flat(point: Point) -> bool:
        return abs(point[3]) <= -curvature * slope

    last, new = start, at(t)
    evals, tries, done = 1, 0, False
    bracket: list[Point] = []
    while tries < most:
        if is_too_high(new) or (tries > 1 and new[1] >= last[1]):
            bracket = [last, new]
            break
        if is_flat(new):
            bracket, done = [new], True
            break
        if new[3] >= 0:
            bracket = [last, new]
            break
        bounds = (new[0] + 0.01 * (new[0] - last[0]), new[0] * 10)
        last, new = new, at(minimum_of_cubic(last, new, bounds))
        evals, tries = evals + 1, tries + 1
    if tries == most:
        bracket = [start, new]
    low, high = (0, -1) if bracket[0][1] <= bracket[-1][1] else (1, 0)
    stuck = False
    reach = largest(d)
    while not done and tries < most:
        ends = sorted(point[0] for point in bracket)
        if (ends[1] - ends[0]) * reach < tolerance_change:
            break
        t = minimum_of_cubic(bracket[0], bracket[1])
        margin = 0.1 * (ends[1] - ends[0])
        if min(ends[1] - t, t - ends[0]) < margin:  # too near to an end to get on
            if stuck or t >= ends[1] or t <= ends[0]:
                t = ends[1] - margin if abs(t - ends[1]) < abs(t - ends[0]) else ends[0] + margin
                stuck = False
            else:
                stuck = True
        else:
            stuck = False
        new = at(t)
        evals, tries = evals + 1, tries + 1
        if is_too_high(new) or new[1] >= bracket[low][1]:
            bracket[high] = new
            low, high = (0, 1) if bracket[0][1] <= bracket[1][1] else (1, 0)
        else:
            if is_flat(new):
                done = True
            elif new[3] * (bracket[high][0] - bracket[low][0]) >= 0:
                bracket[high] = bracket[low]
            bracket[low] = new
    t, loss, g, _ = bracket[low]
    return loss, g, t, evals


def minimum_of_cubic(a: Point, b: Point, bounds: tuple[float, float] | None = None) -> float:
    """Where the cubic through two points with their slopes is lowest, within bounds, by default the points."""
    (x1, f1, _, g1), (x2, f2, _, g2) = (a, b) if a[0] <= b[0] else (b, a)
    low, high = bounds or (x1, x2)
    d1 = g1 + g2 - 3 * _quotient(f1 - f2, x1 - x2)
    square = d1**2 - g1 * g2
    if square >= 0:
        d2 = math.sqrt(square)
        x = x2 - (x2 - x1) * _quotient(g2 + d2 - d1, g2 - g1 + 2 * d2)
        if not math.isnan(x):
            return min(max(x, low), high)
    return (low + high) / 2


def _quotient(a: float, b: float) -> float:
    """a / b as IEEE has it: inf or NaN where b is 0."""
    return a / b if b else a * math.inf
