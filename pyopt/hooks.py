"""Hooks: ordered callables with handles that remove them, as in torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import ref

_ids = count(1)

Hook = Callable[..., Any]
# hook(optimizer, args, kwargs), hook(optimizer, state_dict) and hook(optimizer).
StepHook = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
StateDictHook = Callable[[Any, dict[str, Any]], Any]
OptimizerHook = Callable[[Any], Any]


class Hooks(dict[int, Hook]):
    """Callables, which run in the order of their keys."""

    def register(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        """Add a hook, at the front with prepend=True."""
        if not callable(hook):
            raise TypeError(f"hook == {hook!r}, must be callable")
        place = next(_ids)
        handle = RemovableHandle(self, -place if prepend else place)
        self[handle.id] = hook
        return handle

    def in_order(self) -> list[Hook]:
        """Those of now, whatever they or other threads add or remove while they run."""
        return [hook for _, hook in sorted(self.items())]


class RemovableHandle:
    """What a registration returns: remove() ends it; as a context manager, at the end of the block."""

    def __init__(self, hooks: Hooks, id: int) -> None:
        self.hooks: ref[Hooks] = ref(hooks)
        self.id: int = id

    def remove(self) -> None:
        """Take the hook away; a second call does nothing."""
        hooks = self.hooks()
        if hooks is not None:
            hooks.pop(self.id, None)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


global_step_pre_hooks: Hooks = Hooks()
global_step_post_hooks: Hooks = Hooks()


def register_optimizer_step_pre_hook(hook: StepHook) -> RemovableHandle:
    """Run hook(optimizer, args, kwargs) before every step of every optimizer, ahead of its own hooks."""
    return global_step_pre_hooks.register(hook)


def register_optimizer_step_post_hook(hook: StepHook) -> RemovableHandle:
    """Run hook(optimizer, args, kwargs) after every step of every optimizer, behind its own hooks."""
    return global_step_post_hooks.register(hook)


class Hooked:
    """The hooks of an optimizer. They are left behind in copies, as in torch."""

    def _begin_hooks(self) -> None:
        self._step_pre_hooks = Hooks()
        self._step_post_hooks = Hooks()
        self._state_dict_pre_hooks = Hooks()
        self._state_dict_post_hooks = Hooks()
        self._load_state_dict_pre_hooks = Hooks()
        self._load_state_dict_post_hooks = Hooks()

    def _step_with_hooks(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """step(*args, **kwargs) between the hooks, which see its arguments with the optimizer in front, as in torch."""
        args = (self, *args)
        for hook in (*global_step_pre_hooks.in_order(), *self._step_pre_hooks.in_order()):
            changed = hook(self, args, kwargs)
            if changed is not None:
                if not (isinstance(changed, tuple) and len(changed) == 2):
                    raise RuntimeError(f"{hook} returned {changed!r}, must return None or (new_args, new_kwargs)")
                args, kwargs = changed
        loss = step(*args[1:], **kwargs)
        for hook in (*self._step_post_hooks.in_order(), *global_step_post_hooks.in_order()):
            hook(self, args, kwargs)
        return loss

    def register_step_pre_hook(self, hook: StepHook) -> RemovableHandle:
        """Run hook(optimizer, args, kwargs) before each step; it may return new (args, kwargs)."""
        return self._step_pre_hooks.register(hook)

    def register_step_post_hook(self, hook: StepHook) -> RemovableHandle:
        """Run hook(optimizer, args, kwargs) after each step."""
        return self._step_post_hooks.register(hook)

    def register_state_dict_pre_hook(self, hook: OptimizerHook, prepend: bool = False) -> RemovableHandle:
        """Run hook(optimizer) before `state_dict`."""
        return self._state_dict_pre_hooks.register(hook, prepend)

    def register_state_dict_post_hook(self, hook: StateDictHook, prepend: bool = False) -> RemovableHandle:
        """Run hook(optimizer, state_dict) after `state_dict`; it may return a replacement."""
        return self._state_dict_post_hooks.register(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: StateDictHook, prepend: bool = False) -> RemovableHandle:
        """Run hook(optimizer, state_dict) before `load_state_dict`; it may return a replacement."""
        return self._load_state_dict_pre_hooks.register(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: OptimizerHook, prepend: bool = False) -> RemovableHandle:
        """Run hook(optimizer) after `load_state_dict`."""
        return self._load_state_dict_post_hooks.register(hook, prepend)
