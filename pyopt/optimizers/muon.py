"""Muon: momentum of a matrix, orthogonalized; and Muon for matrices beside AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from pyopt import checks
from pyopt._isa import kernels
from pyopt._matrix import Writes, check_scalars
from pyopt.optimizer import Group
from pyopt.optimizers._prepared import Array, PreparedOptimizer, Shapes, lerp
from pyopt.optimizers.adamw import AdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def _coefficients(name: str, value: Any) -> None:
    """Three numbers."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{name} == {value!r}, must be three numbers")
    for i, x in enumerate(value):
        checks.number(f"{name}[{i}]", x)


def _iterations(name: str, value: Any) -> None:
    """An integer from 0 to 99."""
    checks.count(name, value)
    checks.number(name, value, 0, 99)


def one_of(*choices: Any) -> checks.Check:
    """The check of an option that is one of these."""

    def check(name: str, value: Any) -> None:
        if not any(value is each or (isinstance(value, str) and value == each) for each in choices):
            raise ValueError(f"{name} == {value!r}, must be {' or '.join(map(repr, choices))}")

    return check


def newton_schulz(u: Array, group: Group, eps: float) -> Array:
    """Nearly U V^T of a matrix U S V^T: its singular values brought near 1 by a polynomial, ns_steps times."""
    a, b, c = group["ns_coefficients"]
    x = u.astype(group["ns_dtype"] or "float32")
    x = x.T if u.shape[0] > u.shape[1] else x
    x = x / max(float(np.linalg.norm(x)), eps)
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        square = gram @ gram.T
        square *= c
        gram *= b
        gram += square
        y = gram @ x
        x *= a
        x += y
    return x.T if u.shape[0] > u.shape[1] else x


_adjustment = one_of(None, "original", "match_rms_adamw", "spectral_unclamped")


def learning_rate(group: Group, shape: tuple[int, ...]) -> float:
    """Of an update of this shape; ValueError for an adjustment that only another version of torch knows."""
    rows, columns = shape
    adjust_lr_fn = group["adjust_lr_fn"]
    _adjustment("adjust_lr_fn", adjust_lr_fn)
    if adjust_lr_fn == "match_rms_adamw":
        return float(group["lr"] * 0.2 * math.sqrt(max(rows, columns)))
    ratio = rows / columns
    return float(group["lr"] * math.sqrt(ratio if adjust_lr_fn == "spectral_unclamped" else max(1, ratio)))


class Muon(PreparedOptimizer):
    """Momentum whose matrix is replaced by the nearest orthogonal one, for the hidden layers of networks.

        m = m + (1 - momentum) * (g - m)
        u = g + momentum * (m - g), or m without nesterov
        X = u / max(norm(u), eps), transposed if it has more rows than columns
        G = X X^T; X = a * X + (b * G + c * G G) X         ns_steps times, a, b, c = ns_coefficients
        p = (1 - lr * weight_decay) * p - lr * sqrt(max(1, rows / columns)) * X

    Args:
        params: matrices or groups of them, float32 or float64 (see Optimizer).
        lr: learning rate, >= 0.
        weight_decay: decay of the parameters, >= 0: each step takes away the share lr * weight_decay.
        momentum: how much of the mean stays, >= 0 and <= 1.
        nesterov: look ahead with the gradient once more.
        ns_coefficients: the polynomial of the iteration.
        eps: the least norm that u is divided by, >= 0.
        ns_steps: iterations, an int from 0 to 99.
        adjust_lr_fn: "original" or None as above; "spectral_unclamped" has sqrt(rows / columns) instead;
            "match_rms_adamw" 0.2 * sqrt(max(rows, columns)), with which the rate and decay of AdamW fit.
        ns_dtype: the type of the iteration, "float32" or "float64"; None for "float32".

    State: "momentum_buffer" (m) per parameter.

    Raises:
        TypeError, ValueError: see Optimizer; a parameter that is no matrix.

    Example:
        >>> import numpy as np
        >>> from pyopt import Muon, Parameter
        >>> w = Parameter(np.zeros((2, 2)), grad=np.array([[3.0, 0.0], [0.0, -0.5]]))
        >>> Muon([w], lr=1.0, ns_coefficients=(1.5, -0.5, 0.0), ns_steps=20).step()
        >>> w.data.round(4) + 0
        array([[-1.,  0.],
               [ 0.,  1.]])

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024); adjust_lr_fn: Bernstein,
    Deriving Muon (2025), and Liu et al., Muon is Scalable for LLM Training (arXiv 2502.16982), section 2.2. As in
    torch, m is a moving mean, not a sum. torch iterates in bfloat16. The products are NumPy's matmul, whose bits are
    those of its BLAS and its threads.
    """

    state_names = {"momentum_buffer": None}
    checks = {
        "momentum": checks.fraction,
        "ns_coefficients": _coefficients,
        "ns_steps": _iterations,
        "adjust_lr_fn": _adjustment,
        "ns_dtype": one_of(None, "float32", "float64"),
    }
    later = {"ns_dtype": None}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
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
        super().__init__(
            params,
            dict(
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_coefficients=ns_coefficients,
                eps=eps,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
                ns_dtype=ns_dtype,
            ),
        )

    @classmethod
    def check_shape(cls, what: str, group: Group, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise ValueError(f"{what} has shape {shape}, must be a matrix for {cls.__name__}: two axes")

    @classmethod
    def state_shapes(cls, group: Group, shape: tuple[int, ...]) -> Shapes:
        return {"momentum_buffer": shape}

    @classmethod
    def prepare(cls, writes: Writes, group: Group, step: int, p: Array, g: Array, state: dict[str, Array]) -> None:
        prepare_muon(writes, group, p, g, state["momentum_buffer"], cls.direction(group, g, state, group["eps"]))

    @staticmethod
    def direction(group: Group, g: Array, state: dict[str, Array], eps: float) -> Array:
        """What a parameter moves along."""
        m = lerp(state["momentum_buffer"], g, 1 - group["momentum"])
        return newton_schulz(lerp(g, m, group["momentum"]) if group["nesterov"] else m, group, eps)


def prepare_muon(writes: Writes, group: Group, p: Array, g: Array, m: Array, direction: Array) -> None:
    """Collect the step along a direction."""
    scalars = {
        "step_size": learning_rate(group, p.shape),
        "weight": 1 - group["momentum"],
        "decay_factor": 1 - group["lr"] * group["weight_decay"],
        "gradient_factor": 1.0,
    }
    check_scalars(p.dtype, scalars)
    u = np.empty_like(p, subok=False)
    np.copyto(u, direction, casting="same_kind")
    writes.add_rule(kernels.muon, scalars, p, g, m, u)


class MuonAdamW(PreparedOptimizer):
    """Muon for matrices and AdamW for everything else, as one optimizer: one schedule, one checkpoint.

    A parameter of two axes takes the step of Muon, any other one that of AdamW. The group option `use_muon` overrides
    it: embeddings and the last layer, matrices that they are, belong in a group with use_muon=False.

    Args:
        params: parameters or groups of them, float32 or float64 (see Optimizer).
        lr: learning rate of both, >= 0.
        betas: decay of AdamW's moving means, each >= 0 and < 1.
        eps: added to AdamW's root, >= 0.
        weight_decay: decay of the parameters, >= 0: each step takes away the share lr * weight_decay.
        momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn, ns_dtype: as for Muon; adjust_lr_fn is
            "match_rms_adamw", so that one lr fits both.
        ns_eps: Muon's eps.
        use_muon: True for Muon, False for AdamW, None for Muon where there are two axes.

    State: "momentum_buffer", or "step", "exp_avg" and "exp_avg_sq".

    Raises:
        TypeError, ValueError: see Optimizer; use_muon=True for a parameter that is no matrix.

    Example:
        >>> import numpy as np
        >>> from pyopt import MuonAdamW
        >>> embedding, weight, bias = np.ones((9, 2)), np.ones((2, 2)), np.ones(2)
        >>> o = MuonAdamW([{"params": [weight, bias]}, {"params": [embedding], "use_muon": False}], lr=0.01)
        >>> o.step(grads=[np.ones((2, 2)), np.ones(2), np.ones((9, 2))])
        >>> [sorted(entry) for entry in o.state.values()]
        [['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step'], ['exp_avg', 'exp_avg_sq', 'step']]

    Source: as for Muon and AdamW, whose bits those parameters get; one lr for both: Liu et al., Muon is Scalable for
    LLM Training (arXiv 2502.16982), section 2.2. torch has no such class.
    """

    state_names = {"momentum_buffer": None, "exp_avg": None, "exp_avg_sq": None}
    checks = {**Muon.checks, "ns_eps": checks.non_negative, "use_muon": one_of(None, True, False)}
    later = {"ns_dtype": None}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        ns_eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        *,
        ns_dtype: str | None = None,
        use_muon: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_coefficients=ns_coefficients,
                ns_eps=ns_eps,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
                ns_dtype=ns_dtype,
                use_muon=use_muon,
            ),
        )

    @staticmethod
    def takes_muon(group: Group, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this shape takes the step of Muon."""
        return len(shape) == 2 if group["use_muon"] is None else bool(group["use_muon"])

    @classmethod
    def check_shape(cls, what: str, group: Group, shape: tuple[int, ...]) -> None:
        if cls.takes_muon(group, shape) and len(shape) != 2:
            raise ValueError(f"{what} has shape {shape}, must be a matrix with use_muon == True: two axes")

    @classmethod
    def counts(cls, group: Group, shape: tuple[int, ...]) -> bool:
        return not cls.takes_muon(group, shape)

    @classmethod
    def state_shapes(cls, group: Group, shape: tuple[int, ...]) -> Shapes:
        names = ("momentum_buffer",) if cls.takes_muon(group, shape) else ("exp_avg", "exp_avg_sq")
        return dict.fromkeys(names, shape)

    @classmethod
    def prepare(cls, writes: Writes, group: Group, step: int, p: Array, g: Array, state: dict[str, Array]) -> None:
        if cls.takes_muon(group, p.shape):
            direction = cls.direction(group, g, state, group["ns_eps"])
            prepare_muon(writes, group, p, g, state["momentum_buffer"], direction)
            return
        options = {**group, "amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
        scalars = AdamW.scalars(None, options, step)  # type: ignore[arg-type]
        check_scalars(p.dtype, scalars)
        writes.add_rule(kernels.adam, scalars, p, g, state["exp_avg"], state["exp_avg_sq"])

    direction = staticmethod(Muon.direction)
