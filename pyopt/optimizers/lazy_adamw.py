"""AdamW on tables whose rows are brought up to date when they are touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import numpy as np

from pyopt import _state_dict
from pyopt._asked import Asked
from pyopt._isa import kernels
from pyopt._lazy import RowWrites, coalesce, narrowed, step_rows, widened
from pyopt._matrix import Writes, check_scalars
from pyopt.checks import MOST_STEPS, plain
from pyopt.optimizer import Group, Optimizer
from pyopt.optimizers.adamw import AdamW
from pyopt.parameter import (
    Parameter,
    Range,
    apart_from,
    average_type,
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
from pyopt.storage import Storage

Array = np.ndarray[Any, Any]
State = dict[str, Any]
Scalars = Callable[[Group, int], dict[str, float]]
STATE = ("step", "exp_avg", "exp_avg_sq", "row_step", "history")
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
    missed is made up for step by step, until nothing of its momentum is left; the rest is a product. Of the options of
    pyopt.Storage it has `max_row_norm` alone, which is kept in steps, not in what is made up for.

    Args:
        params: parameters or groups of them (see Optimizer), in C order. Gradients are row-sparse (see RowSparse) or
            arrays; an array touches all rows.
        lr: learning rate, >= 0.
        betas: decay of the two moving means, each >= 0 and < 1.
        eps: added to the root, >= 0.
        weight_decay: decay of the parameters, >= 0: each step takes away the share lr * weight_decay; 0 is Adam.
        maximize: ascend instead of descend.

    State: "step" (t), "exp_avg" (m), "exp_avg_sq" (v) per parameter, "row_step", the last step of each row, and
    "history": from which step on lr, both betas, eps and weight_decay were what. Beside float16 and bfloat16 parameters
    m and v are float32; what a row has missed and its step are computed in float32, and rounded once.

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
        **storage: Unpack[Storage],
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults, **storage)

    def _check_types(self, params: list[Parameter], first: int) -> None:
        """It computes in float32 what is shorter."""

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
        tables = []
        for i, ((group, p, entry), grad) in enumerate(zip(params, given, strict=True)):
            if grad is not None:
                tables.append((entry, Table(label(i, p), group, p.data, entry, self.scalars), grad))
        ranges = parameter_ranges(p for _, p, _ in params)
        writes, news = prepare([(table, grad) for _, table, grad in tables], ranges, factor)
        for (entry, _, _), new in zip(tables, news, strict=True):
            writes.add_entry(entry, new)
        return writes

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
            TypeError: rows that are no integers.
            IndexError: a row that is not of the table.
        """
        with self._workspace:
            found = False
            for i, (group, p, entry) in enumerate(self._checked()):
                if param is not None and param is not p and param is not p.data:
                    continue
                found = True
                if is_begun(entry):
                    table = Table(label(i, p), group, p.data, entry, self.scalars)
                    entry["history"] = table.catch_up(rows)
            if not found:
                raise ValueError("param is no parameter of this optimizer")

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _check_entry(self, what: str, entry: State, p: Parameter, group: Group) -> None:
        if not is_begun(entry):
            return
        for name in STATE:
            if name not in entry:
                raise KeyError(f"{what}: state_dict has no {name!r}, only {sorted(map(str, entry))}")
        entry["step"] = _state_dict.saved_count(f"{what}: state_dict: step", entry["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            check_state_values(what, name, entry, p.data)
            _check_type(what, name, entry[name], p.data)
        _check_rows_of_state(what, entry, p.data)
        last = entry["row_step"]
        if last.size and not 0 <= last.min() <= last.max() <= entry["step"]:
            raise ValueError(
                f"{what}: state_dict: row_step is {last.min()} to {last.max()}, must be 0 to step == {entry['step']}"
            )


def is_begun(entry: State) -> bool:
    """Whether an entry of the state is one of the optimizer's, not the user's own alone."""
    return not entry.keys().isdisjoint(STATE)


class Table:
    """A parameter, checked, and its state as arrays, a new one at first: what a step makes of some of its rows.

    Args:
        what: begins the messages.
        group: the hyper-parameters, as Python numbers.
        data: the array of the parameter.
        entry: its state, with the step as a number; not written to.
        scalars: the numbers of the rule, of a group and a step.
    """

    def __init__(self, what: str, group: Group, data: Any, entry: State, scalars: Scalars) -> None:
        self.what, self.group, self.scalars = what, group, scalars
        self.data = check_data(what, data)
        check_c_order(what, data)
        self.state = _state_of(what, entry, data)
        self.dtype = average_type(self.data.dtype)  # that it computes in

    @property
    def moments(self) -> tuple[Array, Array]:
        return self.state["exp_avg"], self.state["exp_avg_sq"]

    def touched(self, grad: Any) -> tuple[Array, Array]:
        """The rows of a gradient, each once, and the sum of its values."""
        if isinstance(grad, RowSparse):
            indices, values = check_rows(self.what, self.data, grad)
            return coalesce(f"{self.what}: gradient", grad, indices, values.astype(self.dtype, copy=False))
        grad = check_gradient(self.what, self.data, grad)
        return np.arange(len(self.state["row_step"])), grad.astype(self.dtype, copy=False)

    def add_step(self, writes: RowWrites, rows: Array, grad: Array, factor: float) -> State:
        """Add the step of some rows, each once, with their gradients; the state behind it."""
        data, state = self.data, self.state
        step = min(state["step"] + 1, MOST_STEPS)
        scalars = dict(self.scalars(self.group, step))
        scalars["gradient_factor"] *= factor
        check_scalars(self.dtype, scalars)
        history = _with(state["history"], step, self.group)
        if len(history) > MOST_CHANGES:  # none of them is needed when all rows are at this step
            rows, grad = _with_zeros(rows, grad, data.shape)
            history = history[-1:]
        is_plain, most = data.dtype == self.dtype, self.group.get("max_row_norm") or 0
        if is_plain and not most and len(rows) == len(state["row_step"]) and (state["row_step"] == step - 1).all():
            writes.add_rule(kernels.adam, scalars, data, grad, *self.moments)
        else:
            block = self._caught_up(rows, step - 1)
            step_rows(kernels.adam, scalars, 0, len(rows), block[0], grad, *block[1:], max_row_norm=most)
            self._add_block(writes, rows, block)
        writes.add_rows(state["row_step"], rows, np.full(len(rows), step))
        return {**state, "step": step, "history": history}

    def catch_up(self, rows: Any) -> Array:
        """Bring some rows to the last step, None for all of them; the history behind it."""
        state, step = self.state, self.state["step"]
        behind = self._behind(rows)
        for begin in range(0, len(behind), CHUNK):
            some = behind[begin : begin + CHUNK]
            writes = RowWrites()
            self._add_block(writes, some, self._caught_up(some, step))
            writes.add_rows(state["row_step"], some, np.full(len(some), step))
            writes.apply()
        history: Array = state["history"]
        return history[-1:] if rows is None else history

    def _add_block(self, writes: RowWrites, rows: Array, block: list[Array]) -> None:
        """Add new numbers of p, m and v of some rows."""
        if self.data.dtype != self.dtype:
            block = [narrowed(kernels.adam, block[0], self.data.dtype), *block[1:]]
        for table, numbers in zip((self.data, *self.moments), block, strict=True):
            writes.add_rows(table, rows, numbers)

    def _behind(self, rows: Any) -> Array:
        """Those of some rows that have missed steps, None for all, each once and in order."""
        last, step = self.state["row_step"], self.state["step"]
        if rows is None:
            return np.flatnonzero(last < step)
        rows = np.asarray(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise TypeError(f"{self.what}: rows has dtype {rows.dtype}, must be of integers")
        if rows.size and not 0 <= rows.min() <= rows.max() < len(last):
            wrong = rows.min() if rows.min() < 0 else rows.max()
            raise IndexError(f"{self.what}: rows has {int(wrong)}, must be 0 to {len(last) - 1}")
        unique: Array = np.unique(rows.astype(np.int64))
        behind: Array = unique[last[unique] < step]
        return behind

    def _caught_up(self, rows: Array, until: int) -> list[Array]:
        """Copies of p, m and v of some rows as they are after the step `until`, of the type that is computed in."""
        data, state = self.data, self.state
        last = state["row_step"][rows]
        order = np.argsort(last, kind="stable")
        last = last[order]
        tables = [table.reshape(len(state["row_step"]), -1) for table in (data, *self.moments)]
        block = [np.ascontiguousarray(table[rows[order]]) for table in tables]
        if data.dtype != self.dtype:
            block[0] = widened(kernels.adam, block[0])
        history = state["history"]
        window = _window(history, self.dtype)
        zeros = np.zeros_like(block[0])
        step = int(last[0]) + 1 if len(last) else until + 1
        while step <= until:  # rows that were last touched in [step - window, step) take this step
            first, end = np.searchsorted(last, [step - window, step])
            if first == end:
                if end == len(last):
                    break
                step = int(last[end]) + 1
                continue
            scalars = self.scalars(_options(history, step, self.group), step)
            step_rows(kernels.adam, scalars, int(first), int(end), block[0], zeros, *block[1:])
            step += 1
        late = last < until - window
        if late.any():
            for array, factor in zip(block, _factors(history, last[late] + window, until), strict=True):
                array[late] *= factor[:, None].astype(self.dtype)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return [array[back].reshape(len(rows), *data.shape[1:]) for array in block]


def prepare(
    tables: Sequence[tuple[Table, Any]], parameters: Iterable[Range], factor: float
) -> tuple[RowWrites, list[State]]:
    """What a step writes, and the state of each table behind it; nothing is written here.

    Args:
        tables: with their gradients.
        parameters: where all parameters lie in memory.
        factor: what the gradients count times.
    """
    ranges = list(parameters)
    found = []
    for table, grad in tables:
        for name in ("exp_avg", "exp_avg_sq", "row_step"):
            ranges += [(b, e, f"{table.what}: state {name!r}", -1) for b, e, _, _ in memory_ranges([table.state[name]])]
        found.append((table, *table.touched(grad)))
    ranges = check_no_overlap(ranges)
    writes = RowWrites()
    news = []
    for table, rows, grad in found:
        grad = np.ascontiguousarray(apart_from(ranges, grad))
        news.append(table.add_step(writes, rows, grad, factor))
    return writes, news


def _state_of(what: str, entry: State, data: Array) -> State:
    """The state of a parameter, a new one at first."""
    rows = data.shape[:1] if data.ndim else (1,)
    if not is_begun(entry):
        zeros = [np.zeros_like(data, average_type(data.dtype), subok=False) for _ in range(2)]
        none = np.empty((0, 1 + len(OPTIONS)))
        new = {"exp_avg": zeros[0], "exp_avg_sq": zeros[1], "row_step": np.zeros(rows, np.int64), "history": none}
        return {"step": 0, **new}
    for name in STATE:
        if name not in entry:
            raise KeyError(f"{what}: state has no {name!r}, only {sorted(map(str, entry))}")
    for name in ("exp_avg", "exp_avg_sq"):
        check_state(what, name, entry, data)
        _check_type(what, name, entry[name], data)
    _check_rows_of_state(what, entry, data)
    step = _state_dict.saved_count(f"{what}: state 'step'", entry["step"])
    return {**{name: entry[name] for name in STATE}, "step": step}


def _check_type(what: str, name: str, array: Array, data: Array) -> None:
    """Raise unless a state is of the type that its parameter is computed in."""
    if array.dtype != (expected := average_type(data.dtype)):
        raise TypeError(f"{what}: state {name!r} has dtype {array.dtype}, must be {expected}")


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


def _with_zeros(rows: Array, grad: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """All rows of a table, those without a gradient with one of zero."""
    whole = np.zeros(shape, grad.dtype)
    whole.reshape(-1, *grad.shape[1:])[rows] = grad
    return np.arange(len(whole)), whole
