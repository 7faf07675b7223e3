"""Who is updated and when: groups, state, step, zero_grad, state_dict. No maths and no pointers here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Unpack

import numpy as np

from pyopt import _state_dict, checks
from pyopt._arrays import ArrayWorkspace, update_all
from pyopt._asked import Asked, Average, asked
from pyopt._engine import Rule
from pyopt._groups import Group as Group
from pyopt._groups import as_groups, as_parameters, check_keys, gradients_in_order
from pyopt._options import CHECKS, LATER, check_declaration, check_options
from pyopt._state_dict import StateDict
from pyopt.hooks import Hooked, Hooks, global_step_post_hooks, global_step_pre_hooks
from pyopt.hooks import register_optimizer_step_post_hook as register_optimizer_step_post_hook
from pyopt.hooks import register_optimizer_step_pre_hook as register_optimizer_step_pre_hook
from pyopt.parameter import (
    Parameter,
    apart_from,
    check_data,
    check_gradient,
    check_long,
    check_no_overlap,
    check_state_is_dict,
    label,
    parameter_ranges,
)
from pyopt.sparse import RowSparse
from pyopt.storage import USUAL as STORAGE
from pyopt.storage import Storage, check_for, in_codes, largest, master_of, state_type
from pyopt.storage import checked as checked_storage

Grads = Iterable[Any] | Mapping[str, Any]
# The arguments of a step that a hook does not see unless they are given.
USUAL = {"grads": None, "max_norm": None, "nonfinite": "apply", "zero_grad": False, "gradient_factor": 1.0}


class Optimizer(Hooked):
    """Base of all optimizers: parameter groups, state, hooks and checkpoints.

    A subclass declares either a compiled rule (`rule`, `state_names`, `counts_steps` and the method `scalars`: see
    pyopt/optimizers), or overrides `update` in plain NumPy. Options with a usual name (lr, betas, eps, ...) are checked
    by it; `checks` adds to that.

    Args:
        params: iterable of Parameter or ndarray, or of (name, Parameter or ndarray); a mapping of names to them, nested
            in dicts and lists as it may be, whose names are joined by dots ("head.b"); or an iterable of dicts: groups
            with any of these under "params", any of the hyper-parameters, and keys of your own, which are kept.
        defaults: hyper-parameters of groups that do not give their own.
        storage: how parameters and state lie in memory, where there is a compiled rule: see pyopt.Storage.

    Raises:
        TypeError, ValueError: no parameters, a parameter that cannot be updated (see Parameter), twice the same or
            overlapping ones, a key that looks like a misspelt option, or a hyper-parameter out of its bounds.

    Example:
        >>> class SignSGD(Optimizer):
        ...     def __init__(self, params, lr=1e-3):
        ...         super().__init__(params, {"lr": lr})
        ...     def update(self, p, g, state, group):
        ...         p -= group["lr"] * np.sign(g)
        >>> w = Parameter(np.ones(2), grad=np.array([3.0, -4.0]))
        >>> SignSGD([w], lr=0.5).step()
        >>> w.data
        array([0.5, 1.5])
    """

    rule: ClassVar[Rule | None] = None
    # State arrays in the order of the rule's streams, each with the option that needs it (None: always needed).
    state_names: ClassVar[Mapping[str, str | None]] = {}
    # Further numbers that the state keeps per parameter beside "step": see `next_numbers`.
    number_states: ClassVar[tuple[str, ...]] = ()
    # Whether the state holds "step", the number of steps of the parameter.
    counts_steps: ClassVar[bool] = False
    # Numbers that a rule makes of all parameters of a step together, kept in every group as options are: the first
    # fields of its struct.
    shared_numbers: ClassVar[tuple[str, ...]] = ()
    # Whether gradients must be row-sparse; whether they may be says `takes_rows`.
    needs_rows: ClassVar[bool] = False
    # Checks of options that the class has alone, or means otherwise than _options.CHECKS, where the usual ones stand.
    checks: ClassVar[Mapping[str, checks.Check]] = {}
    # Whether it steps float16 and bfloat16 too, as every compiled rule does by itself.
    short_types: ClassVar[bool] = False
    # Of those that can store state in 8 bits: the arrays that are never negative.
    unsigned_states: ClassVar[frozenset[str] | None] = None
    # Options that checkpoints of older torch lack, and what they mean there.
    later: ClassVar[Mapping[str, Any]] = LATER

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("rule") is not None:
            check_declaration(cls, cls.checks)
        if cls.rule is not None and "short_types" not in vars(cls):
            cls.short_types = cls._move is Optimizer._move
        if cls.rule is not None and tuple(cls.state_names) != cls.rule.states:  # they are tied by their order
            raise TypeError(
                f"{cls.__name__}: state_names is {tuple(cls.state_names)}, must be those of the rule "
                f"{cls.rule.name!r}, in its order: {cls.rule.states}"
            )

    def __init__(self, params: Iterable[Any], defaults: Group, **storage: Unpack[Storage]) -> None:
        if unknown := sorted(storage.keys() - STORAGE.keys()):
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}")
        groups = as_groups(params)
        self.defaults = defaults = {**defaults, **checked_storage(storage)}
        self.check_group({"params": [], **defaults})
        self.state: defaultdict[Parameter, dict[str, Any]] = defaultdict(dict)
        self.param_groups: list[Group] = []
        self._workspace = ArrayWorkspace()
        self._averages: list[Average] = []
        self._bare = False  # whether an array came without a Parameter: its gradients can only come with the step
        self._begin_hooks()
        for group in groups:
            self.add_param_group(group)

    # --- groups -------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with hyper-parameters of their own, for example layers that are unfrozen later.

        Args:
            param_group: "params" and any of the hyper-parameters; the others take the optimizer's defaults.

        Raises:
            TypeError, KeyError, ValueError: as the constructor; nothing has changed then.
        """
        if not isinstance(param_group, Mapping):
            raise TypeError(f"param_group is a {type(param_group).__name__}, must be a dict with the key 'params'")
        if "params" not in param_group:
            raise KeyError(
                f"param_group has no 'params', only {sorted(map(str, param_group))}; a list of mappings by name must "
                "stand in a mapping itself: {'layers': [...]}"
            )
        with self._workspace:  # between the steps of other threads, and their groups
            live = self._parameters()
            params, names, bare = as_parameters(param_group["params"], len(live))
            group = {"params": params, **{k: v for k, v in param_group.items() if k != "params"}}
            if names is not None:
                group["param_names"] = names
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group.update(checked_storage(group))
            if self.param_groups and ("param_names" in group) != ("param_names" in self.param_groups[0]):
                raise ValueError("either all param groups have parameter names or none")
            self.check_group(group)
            self._check_types(params, len(live))
            check_no_overlap(parameter_ranges([*live, *params]))
            for p, name in zip(params, names or (), strict=False):
                p.name = name if p.name is None else p.name
            self._bare |= bare
            self.param_groups.append(group)

    def check_group(self, group: Group) -> None:
        """Raise unless the keys and hyper-parameters of a group are valid; overriders call this first."""
        check_keys(group, self.defaults)
        # In an optimizer of the user's own, which overrides `update`, only lr means what it usually does.
        own = self.rule is None and type(self).update is not Optimizer.update
        usual = {"lr": CHECKS["lr"]} if own else CHECKS
        check_options({key: group[key] for key in self.defaults}, self.checks, usual)
        check_for(type(self).__name__, self, checked_storage(group))

    def _check_types(self, params: list[Parameter], first: int) -> None:
        for i, p in enumerate(params, first):
            if not self.short_types:
                check_long(label(i, p), p.data, type(self).__name__)

    def _parameters(self) -> list[Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads: Grads | None = None,
        max_norm: float | None = None,
        nonfinite: str = "apply",
        zero_grad: bool | str = False,
        gradient_factor: float = 1.0,
    ) -> Any:
        """Update every parameter that has a gradient, once.

        All or nothing: every parameter, gradient, state and hyper-parameter is checked before anything changes.

        Args:
            closure: computes the loss and the gradients; called first.
            grads: gradients to use in place of the parameters' own, None for a parameter to be left alone; not stored.
                One per parameter in the order of the groups, or a mapping by name, nested like the parameters'.
            max_norm: where the norm of all gradients together is larger, > 0, they count in this step times
                max_norm / (norm + 1e-6), as after `clip_grad_norm_`; they stay as they are.
            nonfinite: what a norm that is NaN or inf does: "apply" steps all the same, as torch does; "raise" is a
                ValueError that names the parameter; "skip" leaves all as it is and adds 1 to `skipped_steps`.
            zero_grad: True fills the gradients with zeros in the same pass, one that is read-only or row-sparse
                becomes None; "set_to_none" makes all of them None. After a step that was skipped too.
            gradient_factor: what every gradient counts times in this step: 1 / n for the sums of n batches.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: a gradient of another shape or dtype than its parameter; names that are missing or
                unknown; no gradient at all for parameters passed as bare arrays; an argument out of its bounds;
                `zero_grad` with `grads`; anything else that has become invalid since the constructor.
            RuntimeError: another thread is in step() of this optimizer; an average has changed places with the
                parameters.
        """
        what = asked(max_norm, nonfinite, zero_grad, gradient_factor)
        if grads is not None and zero_grad:
            raise ValueError(f"zero_grad == {zero_grad!r} clears the parameters' own gradients, but grads= were given")
        if not (self._step_pre_hooks or self._step_post_hooks or global_step_pre_hooks or global_step_post_hooks):
            return self._run(closure, grads, what)
        args = () if closure is None else (closure,)
        given = {"grads": grads, "max_norm": max_norm, "nonfinite": nonfinite, "zero_grad": zero_grad}
        given["gradient_factor"] = gradient_factor
        kwargs = {name: value for name, value in given.items() if value is not USUAL[name]}
        return self._step_with_hooks(self._step, *args, **kwargs)

    def _step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads: Grads | None = None,
        max_norm: float | None = None,
        nonfinite: str = "apply",
        zero_grad: bool | str = False,
        gradient_factor: float = 1.0,
    ) -> Any:
        return self._run(closure, grads, asked(max_norm, nonfinite, zero_grad, gradient_factor))

    def _run(self, closure: Callable[[], Any] | None, grads: Grads | None, what: Asked | None) -> Any:
        if closure is not None and not callable(closure):
            raise TypeError(f"closure is a {type(closure).__name__}, must be callable; gradients go by step(grads=...)")
        loss = None if closure is None else closure()
        if grads is not None:
            grads = gradients_in_order(grads, self.param_groups)
        had_none = self._bare and grads is None and all(p.grad is None for g in self.param_groups for p in g["params"])
        self._move(grads, what)
        if had_none:
            raise ValueError("no parameter has a gradient: for parameters passed as bare arrays, give step(grads=...)")
        return loss

    def _move(self, grads: list[Any] | None, what: Asked | None) -> None:
        """The step itself, with the gradients in order, or None for the parameters' own."""
        if self.rule is not None:
            self._workspace.step(self, grads, what)
        else:
            self._workspace.step_by(partial(update_all, self), self, grads, what)

    def _stage(self) -> tuple[ArrayWorkspace, Optimizer]:
        """The workspace of the steps, and what it asks."""
        return self._workspace, self

    @property
    def last_grad_norm(self) -> float | None:
        """The norm of all gradients in the last step that computed it, for max_norm or nonfinite; None before."""
        return self._workspace.last_grad_norm

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for a norm that was not finite; can be set."""
        return self._workspace.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, steps: int) -> None:
        checks.count("skipped_steps", steps)
        self._workspace.skipped_steps = steps

    def _rows_to_update(
        self, grads: list[Any] | None, factor: float
    ) -> list[tuple[Group, Parameter, np.ndarray[Any, Any]]]:
        """What `update` is called with, checked: per parameter with a gradient its group, it, and gradient * factor."""
        rows = []
        for group in self.param_groups:
            self.check_group(group)
            for p in group["params"]:
                rows.append((group, p, p.grad))
        if grads is not None:
            rows = [(group, p, grad) for (group, p, _), grad in zip(rows, grads, strict=True)]
        ranges = check_no_overlap(parameter_ranges(p for _, p, _ in rows))
        for i, (_, p, _) in enumerate(rows):
            check_state_is_dict(label(i, p), self.state.get(p, {}))
        result = []
        for i, (group, p, grad) in enumerate(rows):
            if grad is not None:
                data = check_long(label(i, p), check_data(label(i, p), p.data), type(self).__name__)
                g = np.asarray(check_gradient(label(i, p), data, grad), data.dtype)
                result.append(
                    (group, p, apart_from(ranges, g if factor == 1 else np.asarray(g * g.dtype.type(factor))))
                )
        return result

    def update(self, p: np.ndarray[Any, Any], g: np.ndarray[Any, Any], state: dict[str, Any], group: Group) -> None:
        """The rule of an optimizer in plain NumPy: change p and state in place; g is read only.

        Args:
            p: the parameter's array.
            g: its gradient, same shape and dtype.
            state: what the rule keeps for this parameter from step to step; empty at first.
            group: the hyper-parameters.
        """
        raise TypeError(f"{type(self).__name__} has no rule: set the class attribute `rule` or override `update`")

    # --- what a compiled rule needs -----------------------------------------------------------------------------------

    def rule_of(self, group: Group) -> Rule | None:
        """The rule for a group; options can ask for the one that needs sums over whole tensors, `rule.summing`."""
        return self.rule

    def takes_rows(self, group: Group) -> bool:
        """Whether gradients may be row-sparse (RowSparse): the rule is then run on the touched rows alone."""
        return self.needs_rows

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        """The numbers of the rule, in double: the fields of its struct in _rules.pxd.

        Of a rule with sums, those fields that are options by their name come from the group.

        Args:
            group: the hyper-parameters, and what `next_numbers` returned, by name.
            step: the number of this step of a parameter, from 1; without `counts_steps` 2 for all but the first.
        """
        raise TypeError(f"{type(self).__name__} has a compiled rule and must override `scalars`")

    def next_numbers(self, group: Group, step: int, numbers: dict[str, float]) -> dict[str, float]:
        """What the numbers of the state (`number_states`) are after a step; what else it returns is for `scalars`.

        Args:
            group: the hyper-parameters.
            step: as for `scalars`.
            numbers: what they are before the step, by name.
        """
        raise TypeError(f"{type(self).__name__} has number_states and must override `next_numbers`")

    def initial_value(self, name: str, group: Group) -> float:
        """What a state array is filled with at first, and what a number of the state is."""
        return 0.0

    def state_streams(self, group: Group) -> tuple[str | None, ...]:
        """Per stream of the rule: the state array behind it, or None where the options of the group need none."""
        names = [name if option is None or group[option] else None for name, option in self.state_names.items()]
        return tuple(names)

    def new_state(self, p: Parameter, group: Group) -> dict[str, Any]:
        """The state of a parameter before its first step."""
        storage = checked_storage(group)
        state: dict[str, Any] = {"step": 0} if self.counts_steps else {}
        for name in self.number_states:
            state[name] = float(self.initial_value(name, group))
        for name in filter(None, self.state_streams(group)):
            value = self.initial_value(name, group)
            if in_codes(p.data.size, p.data.flags.c_contiguous, p.data.dtype.name, storage):
                zero = 0 if name in (self.unsigned_states or ()) else 127
                state[name] = np.full_like(p.data, zero, np.uint8)
                state[f"{name}_absmax"] = np.zeros((p.data.size + 255) // 256, np.float32)
                continue
            dtype = state_type(p.data.dtype, storage)
            if abs(value) > largest(dtype):
                options = {key: value for key, value in group.items() if key in self.defaults}
                raise ValueError(f"state {name!r} cannot begin at {value!r} in {dtype}: {options}")
            if self.rule is not None and self.rule.by_row:
                state[name] = np.full(p.data.shape[:1], value, dtype)
            else:
                state[name] = np.full_like(p.data, value, dtype)
        if (master := master_of(p.data.dtype.name, storage)) is not None:
            state[master] = np.zeros_like(p.data, np.int16 if master == "low_bits" else None)
        return state

    # --- gradients ----------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients.

        Args:
            set_to_none: True sets them to None, so that a parameter without a new one is left alone by `step`; False
                fills them with zeros in place.
        """
        for p in self._parameters():
            if set_to_none:
                p.grad = None
            elif isinstance(p.grad, RowSparse):  # no row has a gradient
                p.grad = RowSparse(p.grad.indices[:0], p.grad.values[:0], p.grad.shape)
            elif isinstance(p.grad, np.ndarray) and p.grad.flags.writeable:
                p.grad.fill(0)
            elif p.grad is not None:  # a NumPy scalar, or an array of another library
                p.grad = np.zeros_like(p.data)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _check_entry(self, what: str, entry: dict[str, Any], p: Parameter, group: Group) -> None:
        """Raise unless the saved state of a parameter is one of this optimizer; counts become ints."""
        if self.rule is not None:  # a rule in NumPy may keep what it likes
            _state_dict.check_entry(self, what, entry, p, group)

    def state_dict(self, *, copy: bool = True) -> StateDict:
        """The state of the optimizer as plain dicts, lists, numbers and arrays, with torch's keys.

        Args:
            copy: True takes a snapshot that later steps do not change; False gives the live arrays.

        Returns:
            {"state": {index: {...}}, "param_groups": [{..., "params": [index, ...]}]}, parameters numbered over all
            groups. What the user has put into groups and state is in it too.
        """
        for hook in self._state_dict_pre_hooks.in_order():
            hook(self)
        with self._workspace:  # not in the middle of a step of another thread
            result = _state_dict.make(self, copy)
        for hook in self._state_dict_post_hooks.in_order():
            changed = hook(self, result)
            if changed is not None:
                result = changed
        return result

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from what `state_dict` returned, with parameters in the same order.

        The numbers are copied into the optimizer's arrays, or into new ones where those do not fit or are read-only;
        nothing is shared with `state_dict`. Groups may lack `maximize` and `decoupled_weight_decay`, as those of older
        torch do. What .npz and JSON make of a checkpoint is taken too: 0-d arrays, whole floats as step counts, strings
        as parameter numbers, lists for pairs.

        Raises:
            TypeError, KeyError, ValueError: a state of another optimizer, other parameters, shapes, dtypes or names;
                nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}, must be a dict")
        state_dict = dict(state_dict)
        for hook in self._load_state_dict_pre_hooks.in_order():
            changed = hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        with self._workspace:
            _state_dict.load(self, state_dict)
        for hook in self._load_state_dict_post_hooks.in_order():
            hook(self)

    # --- copies and print -------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks, as in torch, and the workspace."""
        kept = {k: value for k, value in vars(self).items() if k != "_workspace" and not isinstance(value, Hooks)}
        return {**kept, "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._workspace = ArrayWorkspace()
        self.skipped_steps = state.pop("skipped_steps", 0)
        vars(self).update(state)
        self._begin_hooks()

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines += [f"Parameter Group {i}"] if i == 0 else ["", f"Parameter Group {i}"]
            lines += [f"    {key}: {group[key]}" for key in sorted(group, key=str) if key != "params"]
        return "\n".join([*lines, ")"])
