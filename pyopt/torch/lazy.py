"""LazyAdamW on tensors: the tables of pyopt.LazyAdamW in the memory of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

import pyopt
from pyopt._asked import Asked
from pyopt._lazy import RowWrites
from pyopt._options import check_options
from pyopt.checks import plain
from pyopt.optimizers.lazy_adamw import STATE, Table, is_begun, prepare
from pyopt.parameter import check_state_is_dict, label
from pyopt.sparse import RowSparse
from pyopt.torch._tensor_views import FLOATS, describe, extent
from pyopt.torch._tensors import TensorWorkspace, raise_versions
from pyopt.torch.files import as_array, as_tensor
from pyopt.torch.matrices import why_not
from pyopt.torch.own import OwnOptimizer, constructor_of, wide
from pyopt.torch.step import Side, workspace_of

Tensor = torch.Tensor
Group = dict[str, Any]
Row = tuple[str, int, Tensor]  # what messages call a parameter, the index of its group, itself


class LazyWorkspace(TensorWorkspace):
    """The steps of one LazyAdamW."""

    def step(
        self,
        optimizer: Any,
        grads: list[Any] | None = None,
        asked: Asked | None = None,
        gradient_factor: float = 1,
    ) -> None:
        averages = [each for each in optimizer._averages if each.is_due(each.steps + 1)]
        for what, _, p in rows_of(optimizer) if averages else ():
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(f"{what}: gradient is sparse, which goes with no average: that would move all rows")
        self.step_by(partial(self._prepare_all, optimizer), optimizer, grads, asked, gradient_factor)

    @torch.no_grad()
    def _prepare_all(self, side: Side, grads: None, factor: float) -> RowWrites:
        """What a step writes, computed aside."""
        rows = list(rows_of(side))
        tables, touched = [], []
        for what, index, p in rows:
            if p.grad is not None:
                entry = side.state.get(p, {})
                tables.append((table_of(side, what, index, p), gradient_of(what, p.grad)))
                touched += [p, *(entry[name] for name in STATE if name in entry)]
        parameters = [(*extent(p), what, i) for i, (what, _, p) in enumerate(rows)]
        writes, news = prepare(tables, parameters, factor)
        stepped = [p for _, _, p in rows if p.grad is not None]
        for p, (table, _), new in zip(stepped, tables, news, strict=True):
            items = items_of(side.state.get(p, {}), table, new, writes)
            writes.add_entry(side.state[p], items)
        raise_versions(touched)
        return writes

    def explain(self, optimizer: Any) -> list[tuple[int, Tensor, str | None]]:
        """Per row (group, parameter, why the next step refuses it or None); nothing is changed."""
        with self:
            rows = [(index, p) for _, index, p in rows_of(optimizer)]
            return [(index, p, why_not("it", p, FLOATS) or why_not_gradient(p.grad)) for index, p in rows]


def rows_of(optimizer: Any) -> Iterator[Row]:
    """All parameters."""
    place = 0
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            yield label(place, p), index, p
            place += 1


def table_of(optimizer: Any, what: str, index: int, p: Tensor) -> Table:
    """A parameter and its state as arrays in the same memory."""
    core: type[pyopt.LazyAdamW] = pyopt.LazyAdamW
    if reason := why_not("it", p, FLOATS):
        raise TypeError(f"{what}: LazyAdamW cannot step it: {reason}")
    group = plain(optimizer.param_groups[index])
    check_options({name: group[name] for name in optimizer.defaults if name in group}, core.checks)
    entry = optimizer.state.get(p, {})
    check_state_is_dict(what, entry)
    arrays = {}
    for name in STATE:
        if isinstance(entry.get(name), Tensor):
            arrays[name] = as_array(f"{what}: state {name!r}", entry[name])
        elif name in entry:
            raise TypeError(f"{what}: state {name!r} is a {type(entry[name]).__name__}, must be a tensor")
    scalars = partial(core.scalars, None)  # type: ignore[arg-type]
    return Table(what, group, as_array(what, p), arrays, scalars)


def why_not_gradient(grad: Tensor | None) -> str | None:
    """Why a gradient is none that a step takes, None if it is."""
    if grad is None or grad.layout is not torch.sparse_coo:
        return None if grad is None else why_not("its gradient", grad, FLOATS)
    if type(grad) is not Tensor or grad.device.type != "cpu" or grad.sparse_dim() != 1:
        return f"its gradient is a {describe(grad)} tensor, sparse along {grad.sparse_dim()} axes"
    return None


def gradient_of(what: str, grad: Tensor) -> Any:
    """A gradient as an array or a RowSparse."""
    if reason := why_not_gradient(grad):
        raise TypeError(f"{what}: LazyAdamW cannot take it: {reason}")
    grad = grad.detach()
    if grad.layout is torch.strided:
        return as_array(f"{what}: gradient", wide(grad))
    indices = as_array(f"{what}: gradient", grad._indices()[0].contiguous())
    return RowSparse(indices, as_array(f"{what}: gradient", wide(grad._values())), tuple(grad.shape))


def items_of(entry: dict[str, Any], table: Table, new: dict[str, Any], writes: RowWrites) -> dict[str, Any]:
    """The new items of an entry as tensors; the step is written into the one there is."""
    items = {}
    for name in ("exp_avg", "exp_avg_sq", "row_step", "history"):
        if name not in entry or new[name] is not table.state[name]:
            items[name] = as_tensor(new[name])
    if "step" in entry:
        count = entry["step"].numpy()
        writes.add_copy(count, np.array(new["step"], count.dtype))
    else:
        items["step"] = torch.tensor(float(new["step"]), dtype=step_type())
    return items


def step_type() -> torch.dtype:
    """The type of a step count, as torch has it."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class LazyAdamW(OwnOptimizer, core=pyopt.LazyAdamW):
    """pyopt.LazyAdamW for tensors: arguments, state and errors are its; gradients are sparse ones of rows, or dense.

    Tables are dense tensors on the CPU; there is no formula for others. "step" is a tensor, as torch keeps it.

    Args:
        params: as for every torch optimizer.
        lr, betas, eps, weight_decay, maximize: as for pyopt.LazyAdamW.

    Raises:
        TypeError, ValueError: a hyper-parameter out of its bounds; at the step, a parameter or gradient of another
            kind.
        IndexError: at the step, for an index beyond the table.

    Example:
        >>> import torch
        >>> import pyopt.torch as optim
        >>> table = torch.nn.Embedding(3, 2, sparse=True)
        >>> optimizer = optim.LazyAdamW(table.parameters(), lr=0.5)
        >>> rows = torch.tensor([1, 1])
        >>> optimizer.catch_up(table.weight, rows)
        >>> table(rows).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[table.weight]["row_step"]
        tensor([0, 1, 0])
    """

    _workspace_type = LazyWorkspace

    @constructor_of(pyopt.LazyAdamW)
    def __init__(self) -> None: ...

    @torch.no_grad()
    def catch_up(self, param: Tensor | None = None, rows: Any = None) -> None:
        """Bring rows to the last step, as if each step had stepped them: see pyopt.LazyAdamW.catch_up.

        Args:
            param: a parameter of the optimizer; None for all.
            rows: their indices, a tensor, array or list of integers; None for all of them. Repetitions count once.
        """
        rows = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows
        with workspace_of(self):
            found = False
            for what, index, p in rows_of(self):
                if param is not None and param is not p:
                    continue
                found = True
                entry = self.state.get(p, {})
                if is_begun(entry):
                    table = table_of(self, what, index, p)
                    raise_versions([p, *(entry[name] for name in ("exp_avg", "exp_avg_sq", "row_step"))])
                    entry["history"] = as_tensor(table.catch_up(rows))
            if not found:
                raise ValueError("param is no parameter of this optimizer")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that the state is copied and keeps its types: that of tables of short types is float32."""
        loaded: dict[str, Any] = {}

        def look(_: Any, state_dict: dict[str, Any]) -> None:
            for index, entry in state_dict["state"].items():
                for name in STATE[1:]:
                    if is_begun(entry) and not isinstance(entry.get(name), Tensor):
                        found = type(entry.get(name)).__name__
                        raise TypeError(f"parameter {index}: state_dict: {name!r} is a {found}, must be a tensor")
            loaded.update(state_dict)

        hook = self.register_load_state_dict_pre_hook(look)  # the last, which sees what others have made of it
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in loaded["param_groups"] for index in group["params"]]
        for p, index in zip(params, saved, strict=True):
            for name in STATE:
                if isinstance(value := loaded["state"].get(index, {}).get(name), Tensor):
                    self.state[p][name] = value.detach().clone()

    def _step_by_torch(self, left: list[tuple[int, Tensor]], factor: float) -> None:
        raise RuntimeError(
            "LazyAdamW has no step in torch's operations, for a dispatch mode, a tracer or forward-mode differentiation"
        )
