"""Clipping, looking, clearing and averaging in any order, beside all else that is done to an optimizer.

PYOPT_EXAMPLES is the number of walks (of up to 40 actions).
"""

from __future__ import annotations

import copy
import math
import os
import pickle
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import pyopt
from extras import Beside, average_numbers, cleared, clip_factor, exact_norm, scaled
from whole_steps import KINDS, advance, isolated, params_of, random, snapshot, values

EXAMPLES = int(os.environ.get("PYOPT_EXAMPLES", "60"))
SHAPES = st.sampled_from([(), (1,), (5,), (3, 4), (2, 3, 4), (0,), (17,), (40, 50)])
INDEX = st.integers(0, 30)
# The gradient, of a fresh array, its parameter and all parameters; whether zeros in place, None, or either comes of it.
GRADIENTS: dict[str, tuple[Any, str]] = {
    "plain": (lambda g, p, all_: g, "zeros"),
    "kept": (lambda g, p, all_: p.grad, "either"),
    "none": (lambda g, p, all_: None, "None"),
    "F": (lambda g, p, all_: np.array(g, order="F"), "zeros"),
    "reversed": (lambda g, p, all_: np.flip(g.copy()), "zeros"),
    "every other": (lambda g, p, all_: np.repeat(g, 2, axis=-1)[..., ::2] if g.ndim else g, "zeros"),
    "read-only": (lambda g, p, all_: np.frombuffer(g.tobytes(), g.dtype).reshape(g.shape), "either"),
    "broadcast": (lambda g, p, all_: np.broadcast_to(g.dtype.type(0.5), g.shape), "either"),
    "its parameter": (lambda g, p, all_: np.flip(p.data), "either"),
    "another's": (lambda g, p, all_: next((q.grad for q in all_ if same_kind(q.grad, g)), g), "either"),
    "huge": (lambda g, p, all_: g * g.dtype.type(1e15), "zeros"),
    "nan": (lambda g, p, all_: spoiled(g, math.nan), "zeros"),
    "inf": (lambda g, p, all_: spoiled(g, -math.inf), "zeros"),
}
GOOD = [name for name in GRADIENTS if name not in ("nan", "inf")]
AVERAGES: list[tuple[str, dict[str, Any]]] = [
    ("EMA", {"decay": 0.9}),
    ("EMA", {"decay": 0.3, "every": 2}),
    ("EMA", {"decay": 0.99, "warmup": 10}),
    ("SWA", {}),
    ("SWA", {"start": 4, "every": 2}),
]


def same_kind(a: Any, b: Any) -> bool:
    return isinstance(a, np.ndarray) and (a.shape, a.dtype) == (b.shape, b.dtype)


def spoiled(g: Any, value: float) -> Any:
    g.flat[-1:] = value
    return g


def canonical(shot: Any) -> Any:
    """In bits, any NaN as good as another."""

    def one(v: Any) -> Any:
        if not isinstance(v, np.ndarray):
            return type(v), v
        return v.dtype, v.shape, np.where(np.isnan(v), np.nan, v).astype(v.dtype).tobytes()

    return [(one(data), {k: one(v) for k, v in state.items()}) for _, data, state in shot]


DONE = {"steps": 0, "clipped": 0, "skipped": 0, "raised": 0, "cleared": 0, "averaged": 0, "swapped": 0}


class Walk(RuleBasedStateMachine):
    """An optimizer, its averages, and what the oracles say of both."""

    opt: Any = None
    seed = 0

    def fresh(self, shape: Any) -> Any:
        self.seed += 1
        return random(shape, self.dtype, self.seed)

    @initialize(
        kind=st.sampled_from(KINDS),
        shapes=st.lists(SHAPES, min_size=1, max_size=4),
        dtype=st.sampled_from(["float32", "float64"]),
    )
    def begin(self, kind: Any, shapes: Any, dtype: str) -> None:
        cls, options = kind
        self.dtype = dtype
        params = [pyopt.Parameter(self.fresh(shape)) for shape in shapes]
        self.opt = cls(
            [{"params": params[:2]}, {"params": params[2:], "lr": 0.25}] if params[2:] else params, **options
        )
        self.beside: list[Beside] = []
        self.skipped = 0

    # --- steps

    def set_gradients(self, kinds: list[str]) -> list[str]:
        params = params_of(self.opt)
        chosen = [kinds[i % len(kinds)] for i in range(len(params))]
        for kind, p in zip(chosen, params, strict=True):
            p.grad = GRADIENTS[kind][0](self.fresh(p.shape), p, params)
        return chosen

    @rule(
        kinds=st.lists(st.sampled_from(GOOD), min_size=1, max_size=5),
        bad=st.sampled_from(["", "", "", "nan", "inf"]),
        max_norm=st.sampled_from([None, 0.1, 1.0, 1e9]),
        nonfinite=st.sampled_from(["apply", "skip", "skip", "raise"]),
        zero_grad=st.sampled_from([False, True, True, "set_to_none"]),
        given=st.booleans(),
        times=st.integers(1, 2),
    )
    def step(
        self, kinds: Any, bad: str, max_norm: Any, nonfinite: str, zero_grad: Any, given: bool, times: int
    ) -> None:
        for _ in range(times):
            chosen = self.set_gradients([*kinds, bad] if bad else kinds)
            with np.errstate(all="ignore"):
                self.one_step(chosen, max_norm, nonfinite, zero_grad, given)

    def one_step(self, chosen: list[str], max_norm: Any, nonfinite: str, zero_grad: Any, given: bool) -> None:
        opt, params = self.opt, params_of(self.opt)
        extras = {"max_norm": max_norm, "nonfinite": nonfinite}
        if given and not zero_grad:
            extras["grads"] = [p.grad for p in params]
        else:
            extras["zero_grad"] = zero_grad
        arrays = [p.grad for p in params]
        grads = [None if g is None else np.array(g) for g in arrays]
        before, noted, averages = snapshot(opt), values(opt), average_numbers(*(b.average for b in self.beside))
        norm = exact_norm(grads)
        looked = nonfinite != "apply" and not math.isfinite(norm)
        if looked and nonfinite == "raise":
            try:
                opt.step(**extras)
            except ValueError as error:
                first = next(i for i, g in enumerate(grads) if g is not None and not np.isfinite(g).all())
                assert f"parameter {first}" in str(error)
            else:
                raise AssertionError(f"a norm of {norm} must be refused")
            DONE["raised"] += 1
        else:
            opt.step(**extras)
            self.check_norm(norm, max_norm is not None or nonfinite != "apply")
        if looked:
            self.skipped += nonfinite == "skip"
            DONE["skipped"] += nonfinite == "skip"
            assert values(opt) == noted and average_numbers(*(b.average for b in self.beside)) == averages
        else:
            if max_norm is not None:
                grads = [scaled(g, clip_factor(max_norm, opt.last_grad_norm)) for g in grads]
                DONE["clipped"] += 1
            assert canonical(snapshot(opt)) == canonical(advance(opt, before, grads))
            self.averages_follow()
            DONE["steps"] += 1
        assert opt.skipped_steps == self.skipped
        cleared_ones = zero_grad if "zero_grad" in extras and not (looked and nonfinite == "raise") else False
        self.check_gradients(chosen, arrays, cleared_ones)

    def check_norm(self, norm: float, computed: bool) -> None:
        found = self.opt.last_grad_norm
        assert (found is not None) == computed
        if computed:
            assert math.isclose(found, norm, rel_tol=1e-12) or (math.isnan(found) and math.isnan(norm))

    def check_gradients(self, chosen: list[str], arrays: list[Any], zero_grad: Any) -> None:
        params = params_of(self.opt)
        for kind, p, g in zip(chosen, params, arrays, strict=True):
            if not zero_grad:
                assert p.grad is g
            elif zero_grad == "set_to_none" or g is None:
                assert p.grad is None
            else:
                assert p.grad is None or (p.grad is g and cleared(g))
                # Whether others share it is asked in test_step_extras.
                alone = sum(np.may_share_memory(g, other) for other in arrays if other is not None) == (g.size > 0)
                assert p.grad is g or GRADIENTS[kind][1] == "either" or not alone, kind
                DONE["cleared"] += 1

    def averages_follow(self) -> None:
        for each in self.beside:
            each.follow([p.data for p in params_of(self.opt)])
            found = [np.where(np.isnan(a), np.nan, a).tobytes() for a in each.average.averages]
            forms = [[np.where(np.isnan(a), np.nan, a).tobytes() for a in form.averages] for form in each.forms]
            assert each.average.n_averaged == each.forms[0].n
            assert not each.forms[0].n or found[: len(forms[0])] in forms, "the average is not the formula's"
            DONE["averaged"] += 1

    # --- averages

    @rule(kind=st.sampled_from(AVERAGES))
    def attach(self, kind: Any) -> None:
        if len(self.beside) < 3:
            name, options = kind
            self.beside.append(Beside(getattr(pyopt.averaging, name)(self.opt, **options), name, **options))

    @precondition(lambda self: self.beside)
    @rule(i=INDEX)
    def detach(self, i: int) -> None:
        each = self.beside.pop(i % len(self.beside))
        each.average.detach()

    @precondition(lambda self: self.beside)
    @rule(i=INDEX, error=st.booleans())
    def swapped(self, i: int, error: bool) -> None:
        average = self.beside[i % len(self.beside)].average
        before, averages = values(self.opt), average_numbers(average)
        try:
            with average.swapped():
                inside = [p.data.tobytes() for p in params_of(self.opt)]
                assert inside == [a[2] for a in averages[0]["averages"]]
                if error:
                    self.opt.step()
        except RuntimeError as found:
            assert error and "swapped" in str(found)
        else:
            assert not error
        assert values(self.opt) == before and average_numbers(average) == averages
        DONE["swapped"] += 1

    @precondition(lambda self: self.beside)
    @rule(i=INDEX)
    def save_and_load(self, i: int) -> None:
        """The state of an average, there and back."""
        average = self.beside[i % len(self.beside)].average
        saved, before = pickle.loads(pickle.dumps(average.state_dict())), average_numbers(average)
        for array in average.averages:
            if average.n_averaged:
                array += 1
        average.load_state_dict(saved)
        assert average_numbers(average) == before

    # --- the rest

    @rule(shapes=st.lists(SHAPES, min_size=1, max_size=2), lr=st.sampled_from([0.1, 0.5]))
    def add_group(self, shapes: Any, lr: float) -> None:
        late = any(each.forms[0].kind == "SWA" or each.forms[0].warmup for each in self.beside)
        if len(params_of(self.opt)) < 8 and not late:  # those have counts of their own
            self.opt.add_param_group({"params": [pyopt.Parameter(self.fresh(s)) for s in shapes], "lr": lr})

    @rule(i=INDEX, lr=st.sampled_from([0.0, 0.01, 0.1, 1]), maximize=st.booleans())
    def change_options(self, i: int, lr: float, maximize: bool) -> None:
        group = self.opt.param_groups[i % len(self.opt.param_groups)]
        group["lr"], group["maximize"] = lr, maximize

    @rule(i=INDEX, kind=st.sampled_from(["new array", "other order", "in place"]))
    def change_data(self, i: int, kind: str) -> None:
        params = params_of(self.opt)
        p = params[i % len(params)]
        if kind == "in place":
            p.data *= p.dtype.type(0.5)
        elif kind == "new array":
            p.data = p.data.copy("K")
        elif not self.opt.state.get(p) and not any(p in each.average.arrays for each in self.beside):
            p.data = np.asfortranarray(p.data)

    @rule(
        name=st.sampled_from(["max_norm", "nonfinite", "zero_grad"]), value=st.sampled_from([-1.0, math.nan, "other"])
    )
    def wrong_argument(self, name: str, value: Any) -> None:
        before = values(self.opt), average_numbers(*(b.average for b in self.beside))
        try:
            self.opt.step(**{name: value})
        except (TypeError, ValueError) as error:
            assert f"{name} == {value!r}, must be" in str(error)
        else:
            raise AssertionError(f"{name} == {value!r} is taken")
        assert (values(self.opt), average_numbers(*(b.average for b in self.beside))) == before

    @rule(how=st.sampled_from(["deepcopy", "pickle", "state_dict"]))
    def copies(self, how: str) -> None:
        """A copy has the count and leaves the averages alone; loading leaves both."""
        before = values(self.opt), average_numbers(*(b.average for b in self.beside))
        if how == "state_dict":
            self.opt.load_state_dict(self.opt.state_dict())
        else:
            other = copy.deepcopy(self.opt) if how == "deepcopy" else pickle.loads(pickle.dumps(self.opt))
            assert values(other) == before[0] and other.skipped_steps == self.skipped
            other.step(grads=[np.ones_like(p.data) for p in params_of(other)])
        assert (values(self.opt), average_numbers(*(b.average for b in self.beside))) == before

    @rule(n=st.integers(1, 3))
    def set_threads(self, n: int) -> None:
        pyopt.set_num_threads(n)


def play() -> None:
    pyopt._engine.set_parallel_cost(0)
    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            derandomize=EXAMPLES <= 60,
            database=None,
            phases=[Phase.generate, Phase.shrink] if os.environ.get("PYOPT_SHRINK") else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    seldom = {"skipped", "raised"}  # which of the two comes is chance
    assert all(n for what, n in DONE.items() if what not in seldom) and DONE["skipped"] + DONE["raised"], DONE
    print(DONE)


def test_whatever_is_done_in_any_order() -> None:
    isolated(play, 120 if EXAMPLES <= 60 else 36_000)()
