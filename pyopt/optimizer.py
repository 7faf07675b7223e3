"""Who is updated and when: groups, state, step, zero_grad, state_dict. No maths and no pointers here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np

from pyopt import checks
from pyopt._engine import Rule
from pyopt._options import LATER, check_declaration, check_options
from pyopt._table import Table
from pyopt.hooks import Hooks, RemovableHandle
from pyopt.parameter import (
    Parameter,
    apart_from,
    as_parameters,
    check_gradient,
    check_no_overlap,
    check_state_values,
    label,
    parameter_ranges,
)

Group = dict[str, Any]
StateDict = dict[str, Any]

# Keys that schedulers leave in a group.
SCHEDULER_KEYS = frozenset({"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"})

_global_step_pre_hooks = Hooks()
_global_step_post_hooks = Hooks()


def register_optimizer_step_pre_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Run hook(optimizer, args, kwargs) before every step of every optimizer, ahead of its own hooks."""
    return _global_step_pre_hooks.register(hook)


def register_optimizer_step_post_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Run hook(optimizer, args, kwargs) after every step of every optimizer, behind its own hooks."""
    return _global_step_post_hooks.register(hook)


def _check_type(what: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, str):
        raise TypeError(f"{what} is a {type(value).__name__}, must be a {'dict' if kind is Mapping else 'list'}")


class Optimizer:
    """Base of all optimizers: parameter groups, state, hooks and checkpoints.

    A subclass declares either a compiled rule (`rule`, `state_names`, `counts_steps` and the method `scalars`: see
    pyopt/optimizers), or overrides `update` in plain NumPy. Options with a usual name (lr, betas, eps, ...) are checked
    by it; `checks` adds to that.

    Args:
        params: iterable of Parameter or ndarray, of (name, Parameter or ndarray), or of dicts: groups with the key
            "params" and any of the hyper-parameters.
        defaults: hyper-parameters of groups that do not give their own.

    Raises:
        TypeError, ValueError: no parameters, a parameter that cannot be updated (see Parameter), twice the same or
            overlapping ones, an unknown key, or a hyper-parameter out of its bounds.

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
    # Numbers of the state, one per parameter: `scalars` finds those before the step in the group, by their names, and
    # returns those after it under the same names, beside the numbers of the rule.
    scalar_states: ClassVar[tuple[str, ...]] = ()
    # Whether the state holds "step", the number of steps of the parameter.
    counts_steps: ClassVar[bool] = False
    # Checks of options that the class has alone, or means otherwise than _options.CHECKS, where the usual ones stand.
    checks: ClassVar[Mapping[str, checks.Check]] = {}
    # Options that checkpoints of older torch lack, and what they mean there.
    later: ClassVar[Mapping[str, Any]] = LATER

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("rule") is not None:
            check_declaration(cls, cls.checks)
        if cls.rule is not None and tuple(cls.state_names) != cls.rule.states:  # they are tied by their order
            raise TypeError(
                f"{cls.__name__}: state_names is {tuple(cls.state_names)}, must be those of the rule "
                f"{cls.rule.name!r}, in its order: {cls.rule.states}"
            )

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        if isinstance(params, (np.ndarray, Parameter, str, Mapping, Set)) or not isinstance(params, Iterable):
            raise TypeError(f"params is a {type(params).__name__}, must be an ordered iterable of arrays or of dicts")
        self.check_group({"params": [], **defaults})
        self.defaults = defaults
        self.state: defaultdict[Parameter, dict[str, Any]] = defaultdict(dict)
        self.param_groups: list[Group] = []
        self._step_pre_hooks = Hooks()
        self._step_post_hooks = Hooks()
        self._state_dict_pre_hooks = Hooks()
        self._state_dict_post_hooks = Hooks()
        self._load_state_dict_pre_hooks = Hooks()
        self._load_state_dict_post_hooks = Hooks()
        self._table = Table()
        groups = list(params)
        if not groups:
            raise ValueError("params is empty, must hold at least one parameter")
        if not isinstance(groups[0], Mapping):
            groups = [{"params": groups}]
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
            raise KeyError(f"param_group has no 'params', only {sorted(param_group)}")
        first = sum(len(group["params"]) for group in self.param_groups)
        params, names = as_parameters(param_group["params"], first)
        group = {"params": params, **{k: v for k, v in param_group.items() if k != "params"}}
        if names is not None:
            group["param_names"] = names
        for key, value in self.defaults.items():
            group.setdefault(key, value)
        if self.param_groups and ("param_names" in group) != ("param_names" in self.param_groups[0]):
            raise ValueError("either all param groups have parameter names or none")
        self.check_group(group)
        check_no_overlap(parameter_ranges([*self._parameters(), *params]))
        self.param_groups.append(group)

    def check_group(self, group: Group) -> None:
        """Raise unless the keys and hyper-parameters of a group are valid; overriders call this first."""
        defaults = getattr(self, "defaults", group)
        if missing := sorted({"params", *defaults} - set(group)):
            raise KeyError(f"a param group has no {missing[0]!r}")
        if unknown := sorted(set(group) - {"params", "param_names", *defaults} - SCHEDULER_KEYS):
            raise ValueError(f"unknown key {unknown[0]!r} in a param group, must be one of {sorted(defaults)}")
        params = group["params"]
        if not isinstance(params, list) or not all(isinstance(p, Parameter) for p in params):
            raise TypeError(f"'params' of a param group is {type(params).__name__}, must be a list of Parameters")
        check_options({key: group[key] for key in defaults}, self.checks)

    def _parameters(self) -> list[Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None, *, grads: Iterable[Any] | None = None) -> Any:
        """Update every parameter that has a gradient, once.

        All or nothing: every parameter, gradient, state and hyper-parameter is checked before anything changes.

        Args:
            closure: computes the loss and the gradients; called first.
            grads: gradients to use in place of the parameters' own: one per parameter, in the order of the groups,
                None for a parameter to be left alone. Not stored.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: a gradient of another shape or dtype than its parameter; anything else that has
                become invalid since the constructor.
            RuntimeError: another thread is in step() of this optimizer.
        """
        hooks = (_global_step_pre_hooks, self._step_pre_hooks, self._step_post_hooks, _global_step_post_hooks)
        if not any(hooks):
            return self._step(closure, grads=grads)
        # As in torch, hooks see the arguments of the call with the optimizer in front.
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {} if grads is None else {"grads": grads}
        for hook in (*_global_step_pre_hooks.values(), *self._step_pre_hooks.values()):
            changed = hook(self, args, kwargs)
            if changed is not None:
                if not (isinstance(changed, tuple) and len(changed) == 2):
                    raise RuntimeError(f"{hook} returned {changed!r}, must return None or (new_args, new_kwargs)")
                args, kwargs = changed
        loss = self._step(*args[1:], **kwargs)
        for hook in (*self._step_post_hooks.values(), *_global_step_post_hooks.values()):
            hook(self, args, kwargs)
        return loss

    def _step(self, closure: Callable[[], Any] | None = None, *, grads: Iterable[Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        if grads is not None:
            if not isinstance(grads, Iterable):
                raise TypeError(f"grads is a {type(grads).__name__}, must be an iterable: one gradient per parameter")
            grads = list(grads)
            expected = len(self._parameters())
            if len(grads) != expected:
                raise ValueError(f"grads has {len(grads)} items, must have {expected}: one per parameter")
        if self.rule is not None:
            self._table.step(self, grads)
        else:
            self._step_in_numpy(grads)
        return loss

    def _step_in_numpy(self, grads: list[Any] | None) -> None:
        """The step of an optimizer that overrides `update`."""
        rows = []
        for group in self.param_groups:
            self.check_group(group)
            for p in group["params"]:
                rows.append((group, p, p.grad))
        if grads is not None:
            rows = [(group, p, grad) for (group, p, _), grad in zip(rows, grads, strict=True)]
        ranges = check_no_overlap(parameter_ranges(p for _, p, _ in rows))
        rows = [
            (group, p, apart_from(ranges, check_gradient(label(i, p), p.data, grad)))
            for i, (group, p, grad) in enumerate(rows)
            if grad is not None
        ]
        for group, p, grad in rows:
            self.update(p.data, grad, self.state[p], group)

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

    def scalars(self, group: Group, step: int) -> dict[str, float]:
        """The numbers of the rule, in double: the fields of its struct in _rules.pxd.

        Args:
            group: the hyper-parameters.
            step: the number of this step of a parameter, from 1; without `counts_steps` 2 for all but the first.
        """
        raise TypeError(f"{type(self).__name__} has a compiled rule and must override `scalars`")

    def initial_value(self, name: str, group: Group) -> float:
        """What a state array is filled with at first, and what a number of the state is."""
        return 0.0

    def state_streams(self, group: Group) -> tuple[str | None, ...]:
        """Per stream of the rule: the state array behind it, or None where the options of the group need none."""
        names = [name if option is None or group[option] else None for name, option in self.state_names.items()]
        return (*names, None, None, None, None)[:4]

    def new_state(self, p: Parameter, group: Group) -> dict[str, Any]:
        """The state of a parameter before its first step."""
        state: dict[str, Any] = {"step": 0} if self.counts_steps else {}
        for name in self.scalar_states:
            state[name] = float(self.initial_value(name, group))
        for name in filter(None, self.state_streams(group)):
            state[name] = np.full_like(p.data, self.initial_value(name, group))
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
            elif isinstance(p.grad, np.ndarray) and p.grad.flags.writeable:
                p.grad.fill(0)
            elif p.grad is not None:  # a NumPy scalar, or an array of another library
                p.grad = np.zeros_like(p.data)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self, *, copy: bool = True) -> StateDict:
        """The state of the optimizer as plain dicts, lists, numbers and arrays, with torch's keys.

        Args:
            copy: True takes a snapshot that later steps do not change; False gives the live arrays.

        Returns:
            {"state": {index: {...}}, "param_groups": [{..., "params": [index, ...]}]}, parameters numbered over all
            groups.
        """
        for hook in self._state_dict_pre_hooks.values():
            hook(self)
        indices = {p: i for i, p in enumerate(self._parameters())}
        groups = []
        for group in self.param_groups:
            packed = {key: value for key, value in group.items() if key != "params"}
            groups.append({**packed, "params": [indices[p] for p in group["params"]]})
        state = {indices[p]: dict(entry) for p, entry in self.state.items() if p in indices and entry}
        result: StateDict = {"state": state, "param_groups": groups}
        if copy:
            result = deepcopy(result)
        for hook in self._state_dict_post_hooks.values():
            changed = hook(self, result)
            if changed is not None:
                result = changed
        return result

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from what `state_dict` returned, with parameters in the same order.

        The arrays are copied into the optimizer's own; nothing is shared with `state_dict`. Groups may lack `maximize`
        and `decoupled_weight_decay`, as those of older torch do.

        Raises:
            TypeError, KeyError, ValueError: a state of another optimizer, other parameters, shapes, dtypes or names;
                nothing has changed then.
        """
        _check_type("state_dict", state_dict, Mapping)
        state_dict = dict(state_dict)
        for hook in self._load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        groups = self._checked_groups(state_dict)
        states = self._checked_states(state_dict, groups)
        for live, group in zip(self.param_groups, groups, strict=True):
            live.clear()
            live.update(group)
        for p in self._parameters():
            self._adopt_state(p, states.get(p))
        for hook in self._load_state_dict_post_hooks.values():
            hook(self)

    def _checked_groups(self, state_dict: StateDict) -> list[Group]:
        """The saved groups, with the live parameters."""
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise KeyError(f"state_dict has no {key!r}, only {sorted(map(str, state_dict))}")
        saved_groups = state_dict["param_groups"]
        _check_type("state_dict: param_groups", saved_groups, Sequence)
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(f"state_dict has {len(saved_groups)} param groups, must have {len(self.param_groups)}")
        groups = []
        first = 0
        for i, (live, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            end = first + len(live["params"])
            _check_type(f"state_dict: param group {i}", saved, Mapping)
            if "params" not in saved:
                raise KeyError(f"state_dict: param group {i} has no 'params', only {sorted(saved)}")
            _check_type(f"state_dict: 'params' of param group {i}", saved["params"], Sequence)
            if list(saved["params"]) != list(range(first, end)):
                raise ValueError(
                    f"state_dict: param group {i} has parameters {saved['params']}, must have {list(range(first, end))}"
                )
            first = end
            if "param_names" in saved and "param_names" in live and saved["param_names"] != live["param_names"]:
                raise ValueError(
                    f"state_dict: param group {i} has param_names {saved['param_names']}, must have "
                    f"{live['param_names']}"
                )
            names = {k: live[k] for k in ("param_names",) if k in live}
            later = {k: v for k, v in self.later.items() if k in self.defaults and k not in saved}
            group = {**deepcopy({**saved, "params": None}), **later, **names, "params": live["params"]}
            try:
                self.check_group(group)
            except (KeyError, TypeError, ValueError) as error:
                raise type(error)(f"state_dict of another optimizer, or damaged: {error.args[0]}") from None
            groups.append(group)
        return groups

    def _checked_states(self, state_dict: StateDict, groups: Sequence[Group]) -> dict[Parameter, dict[str, Any]]:
        """The saved state by live parameter."""
        params = [(p, group) for group in groups for p in group["params"]]
        states = {}
        _check_type("state_dict: state", state_dict["state"], Mapping)
        for index, saved in state_dict["state"].items():
            if not isinstance(index, (int, np.integer)) or not 0 <= index < len(params):
                raise ValueError(
                    f"state_dict has state of parameter {index!r}, must be an int from 0 to {len(params) - 1}"
                )
            index = int(index)
            p, group = params[index]
            _check_type(f"state_dict: state of {label(index, p)}", saved, Mapping)
            self._check_saved_state(label(index, p), saved, p, group)
            states[p] = saved
        return states

    def _check_saved_state(self, what: str, saved: dict[str, Any], p: Parameter, group: Group) -> None:
        """Raise unless a saved state is one that this optimizer could have made for the parameter."""
        if self.rule is None:  # a rule in NumPy may keep what it likes
            return
        counter = {"step"} if self.counts_steps else set()
        if unknown := sorted(set(saved) - set(self.state_names) - counter):
            raise ValueError(f"{what}: state_dict has {unknown[0]!r}, of which {type(self).__name__} knows nothing")
        if self.counts_steps:
            if "step" not in saved:
                raise KeyError(f"{what}: state_dict has no 'step', only {sorted(saved)}")
            checks.count(f"{what}: state_dict: step", saved["step"])
        for name in {*saved, *filter(None, self.state_streams(group))} - counter:
            check_state_values(what, name, saved, p.data)

    def _adopt_state(self, p: Parameter, saved: dict[str, Any] | None) -> None:
        """Copy a checked state into the optimizer's own arrays."""
        if not saved:
            self.state.pop(p, None)
            return
        live = self.state[p]
        for name in set(live) - set(saved):
            del live[name]
        for name, value in saved.items():
            if not isinstance(value, np.ndarray):
                live[name] = deepcopy(value)
            elif isinstance(live.get(name), np.ndarray) and live[name].shape == value.shape:
                live[name][...] = value
            else:  # in the parameter's memory order, whatever the saved array's
                live[name] = np.empty_like(p.data if value.shape == p.data.shape else value, dtype=value.dtype)
                live[name][...] = value

    # --- hooks --------------------------------------------------------------------------------------------------------

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Run hook(optimizer, args, kwargs) before each step; it may return new (args, kwargs)."""
        return self._step_pre_hooks.register(hook)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Run hook(optimizer, args, kwargs) after each step."""
        return self._step_post_hooks.register(hook)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Run hook(optimizer) before `state_dict`."""
        return self._state_dict_pre_hooks.register(hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Run hook(optimizer, state_dict) after `state_dict`; it may return a replacement."""
        return self._state_dict_post_hooks.register(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Run hook(optimizer, state_dict) before `load_state_dict`; it may return a replacement."""
        return self._load_state_dict_pre_hooks.register(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Run hook(optimizer) after `load_state_dict`."""
        return self._load_state_dict_post_hooks.register(hook, prepend)

    # --- copies and print -------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._table = Table()

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines += [f"Parameter Group {i}"] if i == 0 else ["", f"Parameter Group {i}"]
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"]
        return "\n".join([*lines, ")"])
