"""AdamW on tables whose rows are brought up to date when they are touched."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from pyopt import _state_dict
from pyopt._asked import Asked
from pyopt._isa import kernels
from pyopt._lazy import RowWrites, coalesce, step_rows
from pyopt._matrix import Writes, check_scalars
from pyopt.checks import MOST_STEPS, plain
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers.adamw import AdamW
from pyopt.parameter import (
    Parameter,
    apart_from,
    check_c_order,
    check_data,
    check_gradient,
    check_no_overlap,
    check_state,
    check_state_is_dict,
    check_state_values,
    label,
    memory_ranges,
    parameter_ranges,
)
from pyopt.sparse import RowSparse, check_rows

Array = np.ndarray[Any, Any]
State = dict[str, Any]
OPTIONS = ("lr", "beta1", "beta2", "eps", "weight_decay")
CHUNK = 1 << 14  # rows that are brought up to date together
MOST_CHANGES = 4096  # of the options, kept until all rows are brought up to date


class LazyAdamW(Optimizer):
    """AdamW, bit for bit what dense training makes of a table, at the cost of the rows that are touched.

        m, v, p = what AdamW makes of the row in the steps it has missed, each with a gradient of zero
        m, v, p = what AdamW makes of it in this step, with its gradient

    in the touched rows. The others stay behind: a row is right when it was touched in the last step, or after
    `catch_up`. Call `catch_up(table, rows)` before rows are read in training, where the gradients shall be those of
    dense training too, and `catch_up()` before the tables are read as a whole: to evaluate or to save them. What a row
    missed is made up for step by step, until nothing of its momentum is left; the rest is a product.

    Args:
        params: parameters or groups of them, float32 or float64 (see Optimizer), in C order. Gradients are row-sparse
            (see RowSparse) or arrays; an array touches all rows.
        lr: learning rate, >= 0.
        betas: decay of the two moving means, each >= 0 and < 1.
        eps: added to the root, >= 0.
        weight_decay: decay of the parameters, >= 0: each step takes away the share lr * weight_decay; 0 is Adam.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_avg_sq" (v) per parameter, "row_step", the last step of each row, and
    "history": from which step on lr, both betas, eps and weight_decay were what.

    Raises:
        TypeError, ValueError: see Optimizer; a parameter that is not in C order.
        IndexError: at the step, for an index beyond the table.

    Example:
        >>> import numpy as np
        >>> from pyopt import LazyAdamW, RowSparse
        >>> table = np.ones((3, 2))
        >>> optimizer = LazyAdamW([table], lr=0.5, weight_decay=0.5)
        >>> optimizer.step(grads=[RowSparse([1], np.array([[4.0, -0.25]]), (3, 2))])
        >>> table.round(6).tolist()
        [[1.0, 1.0], [0.25, 1.25], [1.0, 1.0]]
        >>> optimizer.catch_up()
        >>> table.round(6).tolist()
        [[0.75, 0.75], [0.25, 1.25], [0.75, 0.75]]

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2; on rows as the
    "lazy global" update of HugeCTR. TensorFlow Addons' LazyAdam is another thing, SparseAdam here: its moments rest
    while a row does. Averages go with dense gradients alone. Not in torch.
    """

    state_names = {"exp_avg": None, "exp_avg_sq": None}
    counts_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize))

    def takes_rows(self, group: Group) -> bool:
        return True

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        return AdamW.scalars(self, {**group, "amsgrad": False, "decoupled_weight_decay": True}, step)  # type: ignore

    # --- the step -----------------------------------------------------------------------------------------------------

    def _move(self, grads: list[Any] | None, what: Asked | None) -> None:
        self._workspace.step_by(self._prepare, self, grads, what)

    def _prepare(self, grads: list[Any] | None, factor: float) -> Writes:
        """What a step writes, computed aside."""
        params = self._checked()
        given = [p.grad for _, p, _ in params] if grads is None else grads
        ranges = parameter_ranges(p for _, p, _ in params)
        found = []
        for i, ((group, p, entry), grad) in enumerate(zip(params, given, strict=True)):
            if grad is None:
                continue
            what, data = label(i, p), check_data(label(i, p), p.data)
            check_c_order(what, data)
            state = _state_of(what, entry, data)
            for name in ("exp_avg", "exp_avg_sq"):
                ranges += [(b, e, f"{what}: state {name!r}", -1) for b, e, _, _ in memory_ranges([state[name]])]
            if isinstance(grad, RowSparse):
                rows, grad = coalesce(what, grad, *check_rows(what, data, grad))
            else:
                rows, grad = np.arange(len(state["row_step"])), check_gradient(what, data, grad)
            found.append((group, data, entry, state, rows, grad))
        ranges = check_no_overlap(ranges)
        writes = RowWrites()
        for group, data, entry, state, rows, grad in found:
            self._add(writes, group, data, entry, state, rows, np.ascontiguousarray(apart_from(ranges, grad)), factor)
        return writes

    def _add(
        self,
        writes: RowWrites,
        group: Group,
        data: Array,
        entry: State,
        state: State,
        rows: Array,
        grad: Array,
        factor: float,
    ) -> None:
        """Add the step of some rows of a table, each once, with their gradients."""
        step = min(state["step"] + 1, MOST_STEPS)
        scalars = self.scalars(group, step)
        scalars["gradient_factor"] *= factor
        check_scalars(data.dtype, scalars)
        history = _with(state["history"], step, group)
        if len(history) > MOST_CHANGES:  # none of them is needed when all rows are at this step
            rows, grad = _with_zeros(rows, grad, data)
            history = history[-1:]
        if len(rows) == len(state["row_step"]) and (state["row_step"] == step - 1).all():
            writes.add_rule(kernels.adam, scalars, data, grad, state["exp_avg"], state["exp_avg_sq"])
        else:
            block = self._caught_up(group, data, state, rows, step - 1)
            step_rows(kernels.adam, scalars, 0, len(rows), block[0], grad, *block[1:])
            for table, numbers in zip((data, state["exp_avg"], state["exp_avg_sq"]), block, strict=True):
                writes.add_rows(table, rows, numbers)
        writes.add_rows(state["row_step"], rows, np.full(len(rows), step))
        writes.add_entry(entry, {**state, "step": step, "history": history})

    def _checked(self) -> list[tuple[Group, Parameter, State]]:
        """Group, parameter and state of each parameter."""
        result: list[tuple[Group, Parameter, State]] = []
        for live in self.param_groups:
            self.check_group(live)
            for p in live["params"]:
                entry = self.state[p]
                check_state_is_dict(label(len(result), p), entry)
                result.append((plain(live), p, entry))
        return result

    # --- rows that have missed steps ----------------------------------------------------------------------------------

    def catch_up(self, param: Any = None, rows: Any = None) -> None:
        """Bring rows to the last step, as if each step had stepped them.

        Args:
            param: a Parameter of the optimizer, or its array; None for all.
            rows: their indices, integers; None for all of them. Repetitions count once.

        Raises:
            ValueError: param is none of the optimizer.
            IndexError: a row that is not of the table.
        """
        with self._workspace:
            found = False
            for i, (group, p, entry) in enumerate(self._checked()):
                if param is not None and param is not p and param is not p.data:
                    continue
                found = True
                if not entry.keys().isdisjoint(("step", "row_step")):
                    self._catch_up(label(i, p), group, check_data(label(i, p), p.data), entry, rows)
            if not found:
                raise ValueError("param is no parameter of this optimizer")

    def _catch_up(self, what: str, group: Group, data: Array, entry: State, rows: Any) -> None:
        check_c_order(what, data)
        state = _state_of(what, entry, data)
        step = state["step"]
        if rows is None:
            behind = np.flatnonzero(state["row_step"] < step)
        else:
            behind = np.unique(np.asarray(rows).astype(np.int64, casting="safe"))
            if len(behind) and not 0 <= behind[0] <= behind[-1] < len(state["row_step"]):
                wrong = behind[0] if behind[0] < 0 else behind[-1]
                raise IndexError(f"{what}: rows has {int(wrong)}, must be 0 to {len(state['row_step']) - 1}")
            behind = behind[state["row_step"][behind] < step]
        for begin in range(0, len(behind), CHUNK):
            some = behind[begin : begin + CHUNK]
            writes = RowWrites()
            block = self._caught_up(group, data, state, some, step)
            for table, numbers in zip((data, state["exp_avg"], state["exp_avg_sq"]), block, strict=True):
                writes.add_rows(table, some, numbers)
            writes.add_rows(state["row_step"], some, np.full(len(some), step))
            writes.apply()
        if rows is None:
            entry["history"] = state["history"][-1:]

    def _caught_up(self, group: Group, data: Array, state: State, rows: Array, until: int) -> list[Array]:
        """Copies of p, m and v of some rows as they are after the step `until`."""
        last = state["row_step"][rows]
        order = np.argsort(last, kind="stable")
        last = last[order]
        tables = [table.reshape(len(state["row_step"]), -1) for table in (data, state["exp_avg"], state["exp_avg_sq"])]
        block = [np.ascontiguousarray(table[rows[order]]) for table in tables]
        history = state["history"]
        window = _window(history, data.dtype)
        zeros = np.zeros_like(block[0])
        step = int(last[0]) + 1 if len(last) else until + 1
        while step <= until:  # rows that were last touched in [step - window, step) take this step
            first, end = np.searchsorted(last, [step - window, step])
            if first == end:
                if end == len(last):
                    break
                step = int(last[end]) + 1
                continue
            scalars = self.scalars(_options(history, step, group), step)
            step_rows(kernels.adam, scalars, int(first), int(end), block[0], zeros, *block[1:])
            step += 1
        late = last < until - window
        if late.any():
            for array, factor in zip(block, _factors(history, last[late] + window, until), strict=True):
                array[late] *= factor[:, None].astype(data.dtype)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return [array[back].reshape(len(rows), *data.shape[1:]) for array in block]

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _check_entry(self, what: str, entry: State, p: Parameter, group: Group) -> None:
        if entry.keys().isdisjoint(("step", "exp_avg", "exp_avg_sq", "row_step", "history")):
            return
        for name in ("step", "exp_avg", "exp_avg_sq", "row_step", "history"):
            if name not in entry:
                raise KeyError(f"{what}: state_dict has no {name!r}, only {sorted(map(str, entry))}")
        entry["step"] = _state_dict.saved_count(f"{what}: state_dict: step", entry["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            check_state_values(what, name, entry, p.data)
        _check_rows_of_state(what, entry, p.data)


def _state_of(what: str, entry: State, data: Array) -> State:
    """The state of a parameter, a new one at first."""
    rows = data.shape[:1] if data.ndim else (1,)
    if entry.keys().isdisjoint(("step", "exp_avg", "exp_avg_sq", "row_step", "history")):
        zeros = [np.zeros_like(data, subok=False) for _ in range(2)]
        none = np.empty((0, 1 + len(OPTIONS)))
        new = {"exp_avg": zeros[0], "exp_avg_sq": zeros[1], "row_step": np.zeros(rows, np.int64), "history": none}
        return {"step": 0, **new}
    for name in ("step", "row_step", "history"):
        if name not in entry:
            raise KeyError(f"{what}: state has no {name!r}, only {sorted(map(str, entry))}")
    for name in ("exp_avg", "exp_avg_sq"):
        check_state(what, name, entry, data)
    _check_rows_of_state(what, entry, data)
    step = _state_dict.saved_count(f"{what}: state 'step'", entry["step"])
    return {**{name: entry[name] for name in ("exp_avg", "exp_avg_sq", "row_step", "history")}, "step": step}


def _check_rows_of_state(what: str, entry: State, data: Array) -> None:
    """Raise unless the last steps of the rows, and the options since, are what they should be."""
    rows = data.shape[:1] if data.ndim else (1,)
    last, history = entry["row_step"], entry["history"]
    if not isinstance(last, np.ndarray) or last.dtype != np.int64 or last.shape != rows or not last.flags.c_contiguous:
        raise ValueError(
            f"{what}: state 'row_step' must be an array of int64 of shape {rows}: the last step of each row"
        )
    if not isinstance(history, np.ndarray) or history.dtype != np.float64 or history.shape[1:] != (1 + len(OPTIONS),):
        raise ValueError(f"{what}: state 'history' must be an array of float64 of shape (n, {1 + len(OPTIONS)})")


def _with(history: Array, step: int, group: Group) -> Array:
    """The history of the options, with a row more where they are not what they were."""
    now = [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]
    if len(history) and history[-1, 1:].tolist() == now:
        return history
    return np.concatenate([history, [[step, *now]]])


def _options(history: Array, step: int, group: Group) -> Group:
    """The options in an earlier step."""
    i = max(int(np.searchsorted(history[:, 0], step, "right")) - 1, 0)
    lr, beta1, beta2, eps, weight_decay = history[i, 1:].tolist()
    return {**group, "lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}


def _window(history: Array, dtype: Any) -> int:
    """After how many steps without a gradient nothing is left of a row's momentum, in this type and with some to spare.

    Each such step moves a row by beta1 / sqrt(beta2) of what the one before did, at most.
    """
    if not len(history):
        return 1
    with np.errstate(divide="ignore"):
        shrinks = float(np.max(history[:, 2] / np.sqrt(np.minimum(history[:, 3], 1)), initial=0))
    decays = history[:, 1] * history[:, 5]
    if not shrinks < 1 - 1e-6 or not (decays < 1).all():
        return MOST_STEPS
    if shrinks == 0:
        return 1
    bits = np.finfo(dtype).nmant + 28
    return math.ceil((bits * math.log(2) - math.log1p(-shrinks)) / -math.log(shrinks))


def _factors(history: Array, since: Array, until: int) -> list[Array]:
    """What p, m and v are multiplied with in the steps behind `since`, up to `until`."""
    ends = np.append(history[1:, 0] - 1, until)
    with np.errstate(divide="ignore"):
        rates = [np.log1p(-history[:, 1] * history[:, 5]), np.log(history[:, 2]), np.log(history[:, 3])]
    # Steps of each stretch of equal options that lie behind `since`.
    steps = np.clip(ends[None, :] - np.maximum(since[:, None], history[None, :, 0] - 1), 0, None)
    with np.errstate(invalid="ignore"):
        return [np.exp(np.where(steps > 0, steps * rate[None, :], 0).sum(1)) for rate in rates]


def _with_zeros(rows: Array, grad: Array, data: Array) -> tuple[Array, Array]:
    """All rows of a table, those without a gradient with one of zero."""
    whole = np.zeros_like(data)
    whole.reshape(-1, *grad.shape[1:])[rows] = grad
    return np.arange(len(whole)), whole
