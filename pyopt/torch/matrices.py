"""The optimizers of matrices on tensors: computed aside and written at once; what cannot be takes torch's step."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

import pyopt
from pyopt._asked import Asked
from pyopt._matrix import Writes
from pyopt._options import check_options
from pyopt.checks import MOST_STEPS, plain
from pyopt.optimizers._prepared import Array, PreparedOptimizer, in_order
from pyopt.optimizers.muon import COEFFICIENTS, learning_rate, one_of
from pyopt.parameter import is_dense, same_order
from pyopt.torch._tensor_views import describe, extent, is_ordinary
from pyopt.torch._tensors import TensorWorkspace, raise_versions
from pyopt.torch.own import OwnOptimizer, constructor_of
from pyopt.torch.step import KernelStepMixin, Side, workspace_of

Tensor = torch.Tensor
Group = dict[str, Any]


class PreparedWorkspace(TensorWorkspace):
    """The steps of one optimizer of matrices."""

    def step(
        self,
        optimizer: Any,
        grads: list[Any] | None = None,
        asked: Asked | None = None,
        gradient_factor: float = 1,
    ) -> None:
        self.step_by(partial(self._prepare_all, optimizer), optimizer, grads, asked, gradient_factor)

    @torch.no_grad()
    def _prepare_all(self, side: Side, grads: None, factor: float) -> Writes:
        rows: list[tuple[int, Tensor]] = []
        left: list[tuple[int, Tensor]] = []
        for index, p, reason in self._rows(side):
            if p.grad is not None:
                (rows if reason is None else left).append((index, p))
        entered = [p for _, p in rows if p not in side.state]
        try:
            return self._prepare_rows(side, factor, rows, left)
        except BaseException:
            for p in entered:
                if not side.state[p]:
                    del side.state[p]
            raise

    @staticmethod
    def _prepare_rows(
        side: Side, factor: float, rows: list[tuple[int, Tensor]], left: list[tuple[int, Tensor]]
    ) -> Writes:
        core: type[PreparedOptimizer] = side.core  # type: ignore[assignment]
        writes = Writes()
        touched = []
        for index, p in rows:
            assert p.grad is not None
            group = {**core.later, **plain(side.param_groups[index])}
            shape, entry = tuple(p.shape), side.state[p]
            core.check_shape(f"a parameter of group {index}", group, shape)
            made = side.new_state(p, group) if "step" not in entry and not has_state(core, entry) else {}
            state = {name: (made or entry)[name] for name in core.state_shapes(group, shape)}
            step = 0
            if core.counts(group, shape):
                count = (made or entry)["step"]
                step = min(int(count) + 1, MOST_STEPS)
                writes.add_copy(count.numpy(), np.array(step, count.numpy().dtype))
                touched.append(count)
            data = p.detach().numpy()
            g = in_order(data, (p.grad.detach() if factor == 1 else p.grad.detach() * factor).numpy())
            core.prepare(writes, group, step, data, g, {name: each.numpy() for name, each in state.items()})
            touched += [p, *state.values()]
            if made:
                writes.add_entry(entry, made)
        if left:
            side.step_by_torch(left, factor)
        raise_versions(touched)
        return writes

    def explain(self, optimizer: Any) -> list[tuple[int, Tensor, str | None]]:
        """Per row (group, parameter, why the next step leaves it to torch or None); nothing is changed."""
        with self:
            return self._rows(optimizer)

    def _rows(self, side: Side) -> list[tuple[int, Tensor, str | None]]:
        core: type[PreparedOptimizer] = side.core  # type: ignore[assignment]
        rows: list[tuple[int, Tensor, str | None]] = []
        written, read = [], []
        for index, live in enumerate(side.param_groups):
            group = {**core.later, **plain(live)}
            for p in live["params"]:
                entry = side.state.get(p) or {}
                rows.append((index, p, reason_for(core, side, group, p, entry)))
                if p.grad is not None:
                    written += [p, *(each for each in entry.values() if isinstance(each, Tensor))]
                    read.append(p.grad)
        if shares(written, read):  # the order of the updates matters: torch goes one by one
            rows = [(i, p, reason or "memory is shared by parameters, gradients or state") for i, p, reason in rows]
        return rows


def has_state(core: type[PreparedOptimizer], entry: Any) -> bool:
    """Whether an entry of the state is one of the optimizer's, not the user's own alone."""
    return not core.state_names.keys().isdisjoint(entry)


def reason_for(core: type[PreparedOptimizer], side: Side, group: Group, p: Any, entry: Any) -> str | None:
    """Why a parameter is left to torch, None if it is not."""
    if (reason := why_not("it", p)) or (p.grad is not None and (reason := why_not("its gradient", p.grad))):
        return reason
    if not is_dense(p.shape, p.stride(), 1):
        return f"its elements do not lie side by side: shape {tuple(p.shape)}, strides {p.stride()}"
    if p.grad is not None and (p.grad.dtype != p.dtype or p.grad.shape != p.shape):
        return f"its gradient is {p.grad.dtype} of shape {tuple(p.grad.shape)}"
    if not isinstance(entry, dict) or not ("step" in entry or has_state(core, entry)):
        return None
    shape = tuple(p.shape)
    for name, expected in core.state_shapes(group, shape).items():
        each = entry.get(name)
        if (
            not isinstance(each, Tensor)
            or why_not("it", each)
            or each.dtype != p.dtype
            or tuple(each.shape) != expected
        ):
            return f"its state {name!r} is missing, or of another kind, dtype or shape"
        if not (each.is_contiguous() if expected != shape else same_order(p.shape, each.stride(), p.stride())):
            return f"its state {name!r} is of another memory order"
    if core.counts(group, shape):
        count = entry.get("step")
        if not isinstance(count, Tensor) or why_not("it", count) or count.numel() != 1:
            return "its state 'step' is no single float on the CPU"
        if not (0 <= float(count) <= MOST_STEPS and float(count).is_integer()):
            return f"its state 'step' is {float(count)}"
    return None


LONG = (torch.float32, torch.float64)


def why_not(what: str, tensor: Any, dtypes: tuple[torch.dtype, ...] = LONG) -> str | None:
    """Why NumPy cannot look at a tensor, None if it can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"{what} is a {type(tensor).__name__}, not a plain tensor"
    if not is_ordinary(tensor) or tensor.dtype not in dtypes:
        taken = "float32 and float64" if dtypes is LONG else "floats"
        return f"{what} is a {describe(tensor)} tensor; pyopt steps dense {taken} on the CPU"
    if tensor.is_neg():
        return f"{what} has its negative bit set"
    if tensor.is_inference():
        return f"{what} is an inference tensor"
    if tensor.numel() and (not tensor.data_ptr() or tensor.data_ptr() % tensor.element_size()):
        return f"{what} has no aligned memory"
    return None


def shares(written: list[Tensor], read: list[Tensor]) -> bool:
    """Whether what is written overlaps itself or what is read."""
    ranges = sorted((*extent(each), i < len(written)) for i, each in enumerate([*written, *read]))
    end_written = end_read = 0
    for begin, end, writes in ranges:
        if begin < end:
            if begin < end_written or (writes and begin < end_read):
                return True
            if writes:
                end_written = max(end_written, end)
            else:
                end_read = max(end_read, end)
    return False


class PreparedSide(Side):
    """As Side, for the state of the optimizers of matrices."""

    __slots__ = ()

    def new_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        core: type[PreparedOptimizer] = self.core  # type: ignore[assignment]
        shape = tuple(p.shape)
        state: dict[str, Any] = {}
        if core.counts(group, shape):
            double = torch.get_default_dtype() == torch.float64
            state["step"] = torch.zeros((), dtype=torch.float64 if double else torch.float32)
        for name, each in core.state_shapes(group, shape).items():
            same = each == shape
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format) if same else p.new_zeros(each)
            state[name].requires_grad_(False)
        return state


class PreparedMixin(KernelStepMixin):
    """Mixin in front of a torch optimizer: its `step`, by the `prepare` of the pyopt optimizer `core`."""

    _workspace_type = PreparedWorkspace

    def __init_subclass__(cls, core: type[pyopt.Optimizer] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(core=core, **kwargs)
        if core is not None:
            cls._side = type("Side", (PreparedSide, cls._side), {"__slots__": ()})


# --- Newton-Schulz in torch's operations ------------------------------------------------------------------------------


def newton_schulz(u: Tensor, group: Group, eps: float) -> Tensor:
    """As pyopt.optimizers.muon.newton_schulz, in bfloat16 unless the group says otherwise."""
    a, b, c = group["ns_coefficients"]
    x = u.to(getattr(torch, group.get("ns_dtype") or "bfloat16"))
    x = x.T if u.shape[0] > u.shape[1] else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if u.shape[0] > u.shape[1] else x


def direction(group: Group, g: Any, state: dict[str, Any], eps: float) -> Any:
    """What a parameter moves along, as torch computes it; of arrays or tensors."""
    g = torch.as_tensor(g)
    m = torch.as_tensor(state["momentum_buffer"]).lerp(g, 1 - group["momentum"])
    u = g.lerp(m, group["momentum"]) if group["nesterov"] else m
    return newton_schulz(u, group, eps).to(g.dtype)


NS_DTYPES = {"ns_dtype": one_of(None, "bfloat16", "float32", "float64")}


class TensorMuon(pyopt.Muon):
    """pyopt.Muon with torch's Newton-Schulz: the core of pyopt.torch.Muon."""

    checks = {**pyopt.Muon.checks, **NS_DTYPES}

    @staticmethod
    def direction(group: Group, g: Array, state: dict[str, Array], eps: float) -> Array:
        return direction(group, g, state, eps).numpy()  # type: ignore[no-any-return]


class TensorMuonAdamW(pyopt.MuonAdamW):
    """pyopt.MuonAdamW with torch's Newton-Schulz: the core of pyopt.torch.MuonAdamW."""

    checks = {**pyopt.MuonAdamW.checks, **NS_DTYPES}
    direction = staticmethod(TensorMuon.direction)


# --- steps of single tensors, for what cannot be prepared -------------------------------------------------------------


def refuse(optimizer: Any, p: Tensor) -> None:
    """Raise for what no optimizer of matrices can step."""
    if p.grad is not None and p.grad.is_sparse:
        raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
    if p.is_complex():
        raise RuntimeError(f"{type(optimizer).__name__} does not support complex parameters")


def muon(group: Group, p: Tensor, g: Tensor, state: dict[str, Any], eps: float) -> None:
    u = direction(group, g, state, eps)
    state["momentum_buffer"].lerp_(g, 1 - group["momentum"])
    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-learning_rate(group, tuple(p.shape)))


def adamw(group: Group, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
    state["step"] += 1
    options = {**group, "amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
    h = pyopt.AdamW.scalars(None, options, int(state["step"]))  # type: ignore[arg-type]
    m, v = state["exp_avg"].lerp_(g, h["weight1"]), state["exp_avg_sq"].mul_(h["beta2"])
    v.addcmul_(g, g, value=h["weight2"])
    d = v.sqrt().mul_(h["inverse_sqrt_bias_correction2"]).add_(h["eps"])
    p.mul_(h["decay_factor"]).addcdiv_(m, d, value=-h["step_size"])


def adafactor(group: Group, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
    state["step"] += 1
    step, lr, eps = int(state["step"]), group["lr"], group["eps"]
    least = torch.finfo(p.dtype).eps if eps[0] is None else eps[0]
    weight = step ** group["beta2_decay"]
    rate = min(lr, step**-0.5) if group["relative_step"] else lr
    if group["scale_parameter"]:
        rate *= max(eps[1], p.double().square().mean().sqrt().item())
    g = (-g if group["maximize"] else g).double()
    if p.ndim < 2:
        moved = state["variance"].copy_(state["variance"].double().lerp(g.square(), weight)).double()
    else:
        rows, columns = state["row_var"], state["col_var"]
        rows.copy_(rows.double().lerp(g.square().mean(-1, keepdim=True), weight))
        columns.copy_(columns.double().lerp(g.square().mean(-2, keepdim=True), weight))
        moved = rows.double() * columns.double() / rows.double().mean(-2, keepdim=True).clamp(min=least)
    u = g * moved.rsqrt().clamp(max=min(1 / least, 1e300) if least else 1e300)
    scale = max(1.0, u.square().mean().sqrt().item() / group["d"])
    p.copy_(p.double() * (1 - lr * group["weight_decay"]) - rate / scale * u)


# --- the classes ------------------------------------------------------------------------------------------------------


class WithOptions(PreparedMixin):
    """Mixin for a class of torch that has options beyond torch's; a group that has none of them is torch's own."""

    beyond: ClassVar[tuple[str, ...]]

    def _add_options(self, options: dict[str, Any]) -> None:
        """Take those that are not what they are without a word."""
        options = {name: value for name, value in options.items() if value is not self._core.later[name]}
        check_options(options, self._core.checks)
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)

    def _step_by_torch(self, left: list[tuple[int, Tensor]], factor: float) -> None:
        own: list[tuple[int, Tensor]] = []
        torchs: list[tuple[int, Tensor]] = []
        for row in left:
            (own if any(name in self.param_groups[row[0]] for name in self.beyond) else torchs).append(row)
        if torchs:
            super()._step_by_torch(torchs, factor)
        step_one_by_one(self, own, factor)

    def _step_one(self, group: Group, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
        raise NotImplementedError


@torch.no_grad()
def step_one_by_one(optimizer: Any, left: list[tuple[int, Tensor]], factor: float) -> None:
    """The step of what cannot be prepared, in torch's operations."""
    side = optimizer._side(optimizer)
    for _, p in left:
        refuse(optimizer, p)
    for index, p in left:
        assert p.grad is not None
        group = {**side.core.later, **plain(optimizer.param_groups[index])}
        state = optimizer.state[p]
        if "step" not in state and not has_state(side.core, state):
            state.update(side.new_state(p, group))
        optimizer._step_one(group, p, p.grad if factor == 1 else p.grad * factor, state)


if hasattr(torch.optim, "Adafactor"):

    class Adafactor(WithOptions, torch.optim.Adafactor, core=pyopt.Adafactor):
        """torch.optim.Adafactor, its arguments, state and errors, with the step of pyopt.Adafactor.

        Args:
            relative_step, scale_parameter: as for pyopt.Adafactor; with both False the rate is lr.
        """

        beyond = ("relative_step", "scale_parameter")

        def __init__(
            self,
            params: Any,
            lr: Any = 1e-2,
            beta2_decay: float = -0.8,
            eps: tuple[float | None, float] = (None, 1e-3),
            d: float = 1.0,
            weight_decay: float = 0.0,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            relative_step: bool = True,
            scale_parameter: bool = True,
        ) -> None:
            super().__init__(params, lr, beta2_decay, eps, d, weight_decay, foreach=foreach, maximize=maximize)
            self._add_options({"relative_step": relative_step, "scale_parameter": scale_parameter})

        def _step_one(self, group: Group, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
            adafactor(group, p, g, state)


if hasattr(torch.optim, "Muon"):

    class Muon(WithOptions, torch.optim.Muon, core=TensorMuon):
        """torch.optim.Muon, its arguments, state and errors, with the momentum and update of pyopt.Muon.

        Args:
            ns_dtype: the type of the iteration: "bfloat16", "float32" or "float64"; None for bfloat16, as in torch.
        """

        beyond = ("ns_dtype",)

        def __init__(
            self,
            params: Any,
            lr: Any = 1e-3,
            weight_decay: float = 0.1,
            momentum: float = 0.95,
            nesterov: bool = True,
            ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
            eps: float = 1e-7,
            ns_steps: int = 5,
            adjust_lr_fn: str | None = None,
            *,
            ns_dtype: str | None = None,
        ) -> None:
            options = lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn
            super().__init__(params, *options)
            self._add_options({"ns_dtype": ns_dtype})

        def _step_one(self, group: Group, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
            muon(group, p, g, state, group["eps"])


class MuonAdamW(PreparedMixin, OwnOptimizer, core=TensorMuonAdamW):
    """pyopt.MuonAdamW for tensors: arguments, state and errors are its; no sparse gradients, no complex parameters.

    ns_dtype may be "bfloat16" too, which is what None stands for, as in torch's Muon.
    """

    @constructor_of(TensorMuonAdamW)
    def __init__(self) -> None: ...

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; ValueError for use_muon=True and a parameter that is no matrix."""
        with workspace_of(self):
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            try:
                for p in group["params"]:
                    TensorMuonAdamW.check_shape("a parameter", plain(group), tuple(p.shape))
            except BaseException:
                del self.param_groups[-1]
                raise

    def _step_by_torch(self, left: list[tuple[int, Tensor]], factor: float) -> None:
        step_one_by_one(self, left, factor)

    def _step_one(self, group: Group, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
        if TensorMuonAdamW.takes_muon(group, tuple(p.shape)):
            muon(group, p, g, state, group["ns_eps"])
        else:
            adamw(group, p, g, state)
