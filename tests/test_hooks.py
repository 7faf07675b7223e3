"""Hooks around the step and the state_dict."""

import numpy as np
import pytest

from all_optimizers import Own, make, values
from pyopt import SGD, Adam
from pyopt.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def test_step_hooks():
    """global pre, own pre, closure and step, own post, global post; each in the order of registration."""
    opt, (p, *_) = make(SGD, {"lr": 0.5})
    opt.zero_grad()
    p.grad = np.ones((3, 4), np.float32)
    log, start = [], p.data.copy()

    def hook(name):
        def note(optimizer, args, kwargs):
            assert optimizer is opt
            log.append((name, args, kwargs, bool((p.data == start).all())))

        return note

    def closure():
        log.append("closure")

    with (
        opt.register_step_post_hook(hook("post 1")),
        opt.register_step_pre_hook(hook("pre 1")),
        register_optimizer_step_post_hook(hook("global post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        opt.register_step_post_hook(hook("post 2")),
        opt.register_step_pre_hook(hook("pre 2")),
    ):
        opt.step(closure)
        args = ((opt, closure), {})
        pre = [(name, *args, True) for name in ("global pre", "pre 1", "pre 2")]
        post = [(name, *args, False) for name in ("post 1", "post 2", "global post")]
        assert log == [*pre, "closure", *post]
        for arguments in [{}, {"grads": (None, None, None)}]:
            log.clear()
            opt.step(**arguments)
            assert [entry[1:3] for entry in log] == [((opt,), arguments)] * 6
    log.clear()
    opt.step()
    assert log == []


def test_global_hooks_see_every_optimizer():
    seen, opts = [], [make(cls)[0] for cls in (SGD, Adam, Own)]
    with register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append(opt)):
        for opt in opts:
            opt.step()
    opts[0].step()
    assert seen == opts


def test_pre_hook_replaces_arguments():
    opt, params = make(SGD, {"lr": 0.5})
    twin, _ = make(SGD, {"lr": 0.5})
    grads = [2 * p.grad for p in params]
    seen = []

    def replace(optimizer, args, kwargs):
        return args, {**kwargs, "grads": grads}

    def nothing(optimizer, args, kwargs):
        seen.append(kwargs.get("grads"))

    opt.register_step_pre_hook(replace)
    opt.register_step_pre_hook(nothing)
    opt.register_step_post_hook(nothing)
    with register_optimizer_step_pre_hook(lambda o, args, kwargs: ((*args, lambda: 5), kwargs)):
        assert opt.step() == 5
    twin.step(grads=grads)
    assert values(opt) == values(twin)
    assert seen == [grads, grads]


@pytest.mark.parametrize("value", [3, "ab", (), (1,), (1, 2, 3), [(), {}]], ids=repr)
def test_bad_return_of_a_pre_hook(value):
    opt, _ = make(steps=1)
    before = values(opt)
    with opt.register_step_pre_hook(lambda *_: value), pytest.raises(RuntimeError, match="None or"):
        opt.step()
    with register_optimizer_step_pre_hook(lambda *_: value), pytest.raises(RuntimeError, match="None or"):
        opt.step()
    assert values(opt) == before
    opt.step()
    assert values(opt) != before


def test_post_hooks_of_step_return_nothing_of_interest():
    opt, _ = make()
    opt.register_step_post_hook(lambda *_: 3)
    assert opt.step() is None
    assert opt.step(lambda: 4) == 4


HOOKS = {
    "step_pre": lambda opt: opt.step(),
    "step_post": lambda opt: opt.step(),
    "state_dict_pre": lambda opt: opt.state_dict(),
    "state_dict_post": lambda opt: opt.state_dict(),
    "load_state_dict_pre": lambda opt: opt.load_state_dict(opt.state_dict()),
    "load_state_dict_post": lambda opt: opt.load_state_dict(opt.state_dict()),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_registration_and_removal(kind):
    opt, _ = make()
    register, log = getattr(opt, f"register_{kind}_hook"), []

    def run(expected):
        log.clear()
        HOOKS[kind](opt)
        assert log == expected

    def hook(name):
        return lambda *args: log.append(name)

    first, second = register(hook("a")), register(hook("b"))
    run(["a", "b"])
    if not kind.startswith("step"):
        with register(hook("c"), prepend=True), register(hook("d"), prepend=True):
            run(["d", "c", "a", "b"])
    with register(hook("e")) as handle:
        run(["a", "b", "e"])
        first.remove()
        run(["b", "e"])
    handle.remove()  # a second time does no harm
    run(["b"])
    second.remove()
    second.remove()
    run([])
    once = [register(lambda *args: (log.append("once"), once[0].remove())[2:] or None)]
    run(["once"])
    run([])


def test_state_dict_hooks():
    """Arguments, and replacements one after the other."""
    opt, _ = make(steps=1)
    log = []
    opt.register_state_dict_pre_hook(lambda *args: log.append(args))
    opt.register_state_dict_post_hook(lambda o, sd: {**sd, "a": o is opt})
    opt.register_state_dict_post_hook(lambda o, sd: None)
    opt.register_state_dict_post_hook(lambda o, sd: {**sd, "b": list(sd)})
    sd = opt.state_dict()
    assert log == [(opt,)]
    assert sd["a"] is True
    assert sd["b"] == ["state", "param_groups", "a"]


def test_load_state_dict_hooks():
    opt, _ = make(Adam, {"lr": 0.1}, steps=1)
    saved = opt.state_dict()
    log = []

    def pre(optimizer, sd):
        assert optimizer is opt
        log.append(("pre", optimizer.param_groups[0]["lr"], sd["param_groups"][0]["lr"]))
        return {**sd, "param_groups": [{**group, "lr": 2 * group["lr"]} for group in sd["param_groups"]]}

    opt.register_load_state_dict_pre_hook(pre)
    opt.register_load_state_dict_pre_hook(pre)
    opt.register_load_state_dict_pre_hook(lambda o, sd: None)
    opt.register_load_state_dict_post_hook(lambda *args: log.append((*args, args[0].param_groups[0]["lr"])))
    opt.param_groups[0]["lr"] = 7
    opt.load_state_dict(saved)
    assert log == [("pre", 7, 0.1), ("pre", 7, 0.2), (opt, 0.4)]
    assert saved["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("name", [name for name in dir(SGD) if name.startswith("register_")])
def test_what_is_no_hook(name):
    opt, _ = make()
    with pytest.raises(TypeError, match="hook == 3, must be callable"):
        getattr(opt, name)(3)
