"""What an optimizer does around its rule: groups, gradients, closures, and optimizers of a user's own.

The rules themselves are tested elsewhere: here two ways to the same result are compared, bit for bit.
"""

import numpy as np
import pytest

from all_optimizers import (
    CASES,
    CLASSES,
    GROUP_KEYS,
    TYPES,
    WITH_OTHER,
    Own,
    bits,
    go_on,
    make,
    params_of,
    random,
    values,
)
from pyopt import (
    ADOPT,
    ASGD,
    FTRL,
    LAMB,
    LARS,
    SGD,
    AdaBelief,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AdamWScheduleFree,
    Adan,
    AdEMAMix,
    Lion,
    NAdam,
    Optimizer,
    Parameter,
    RAdam,
    RMSprop,
    RowwiseAdagrad,
    Rprop,
    SGDScheduleFree,
)

# --- groups -----------------------------------------------------------------------------------------------------------


@TYPES
@WITH_OTHER
def test_groups_with_overrides(cls, options, other, dtype):
    """A group is what an optimizer of its own with these options is."""
    opt, _ = make(cls, options, dtype)
    first, second = (make(cls, options | extra, dtype)[0] for extra in ({}, other))
    p, q, r = params_of(make(cls, options, dtype)[0])
    both = cls([{"params": [p, q]}, {"params": r, **other}], **options)
    for _ in range(3):
        for o in (first, second, both, opt):
            o.step()
    assert values(both) == values(first)[:2] + values(second)[2:]
    assert values(opt) == values(first) != values(second)
    assert [len(group["params"]) for group in both.param_groups] == [2, 1]
    assert {k: both.param_groups[0][k] for k in options} == options
    assert {k: both.param_groups[1][k] for k in options | other} == options | other
    assert both.defaults == opt.defaults


@TYPES
@WITH_OTHER
def test_add_param_group(cls, options, other, dtype):
    """In mid-run: the new parameters begin with their own step 1, and with the defaults."""
    opt, _ = make(cls, options, dtype, steps=2)
    old, _ = make(cls, options, dtype, steps=5)
    new, _ = make(cls, options | other, dtype, steps=3, shapes=[(2, 3), (4,)])
    opt.param_groups[0]["lr"] = lr = opt.defaults["lr"]
    group = {"params": iter([Parameter(random(s, dtype, i), random(s, dtype, 50 + i)) for i, s in [(0, (2, 3))]])}
    opt.add_param_group(group | other)
    opt.add_param_group({"params": Parameter(random(4, dtype, 1), random(4, dtype, 51)), **other})
    for _ in range(3):
        opt.step()
    assert values(opt) == values(old) + values(new)
    assert [group["lr"] for group in opt.param_groups] == [lr] + [(options | other).get("lr", opt.defaults["lr"])] * 2


def test_new_groups_take_the_defaults():
    opt, _ = make(SGD, {"lr": 0.1, "momentum": 0.9})
    opt.param_groups[0]["lr"] = 5
    opt.add_param_group({"params": np.ones(3)})
    assert opt.param_groups[1]["lr"] == 0.1
    assert opt.param_groups[1]["momentum"] == 0.9


DEFAULTS = {
    SGD: (1e-3, 0, 0, 0, False, False),
    Adam: (1e-3, (0.9, 0.999), 1e-8, 0, False, False, False, False, False),
    AdamW: (1e-3, (0.9, 0.999), 1e-8, 1e-2, False, False, False, False, True),
    RMSprop: (1e-2, 0, 0.99, 1e-8, False, 0, False),
    Adagrad: (1e-2, 0, 1e-10, 0, 0, False),
    Lion: (1e-4, (0.9, 0.99), 0, False),
    Adadelta: (1.0, 0.9, 1e-6, 0, False),
    Adamax: (2e-3, (0.9, 0.999), 1e-8, 0, False),
    NAdam: (2e-3, (0.9, 0.999), 1e-8, 0, 4e-3, False, False),
    RAdam: (1e-3, (0.9, 0.999), 1e-8, 0, False, False),
    ASGD: (1e-2, 1e-4, 0.75, 1e6, 0, False),
    Rprop: (1e-2, (0.5, 1.2), (1e-6, 50), False),
    AdaBelief: (1e-3, (0.9, 0.999), 1e-16, 0, False, True),
    ADOPT: (1e-3, (0.9, 0.9999), 1e-6, 0, False, False),
    AdEMAMix: (1e-3, (0.9, 0.999, 0.9999), 1e-8, 2.0, None, None, 0, False),
    Adan: (1e-3, (0.98, 0.92, 0.99), 1e-8, 0.02, False),
    FTRL: (1e-3, 0, 0, 0, 0.1, False),
    LAMB: (1e-3, (0.9, 0.999), 1e-6, 0, True, False),
    LARS: (1.0, 0.9, 0, 1e-3, False, True, False),
    RowwiseAdagrad: (1e-2, 1e-8, 0, 0, False, False),
    SGDScheduleFree: (1.0, 0.9, 0, 0, 0, 2, False, True),
    AdamWScheduleFree: (2.5e-3, (0.9, 0.999), 1e-8, 0, 0, 0, 2, False, True),
    Own: (0.1, 0.9, False),
}


@pytest.mark.parametrize("cls", GROUP_KEYS)
def test_group_keys(cls):
    keys = GROUP_KEYS[cls].split()
    opt = cls([{"params": [np.ones(3)]}, {"params": [np.ones(3), np.ones(2)]}])
    expected = dict(zip(keys, DEFAULTS[cls], strict=True))
    assert opt.defaults == expected
    for group, indices in zip(opt.state_dict()["param_groups"], [[0], [1, 2]], strict=True):
        assert list(group) == [*keys, "params"]
        assert group == expected | {"params": indices}
    for group in opt.param_groups:
        assert {k: v for k, v in group.items() if k != "params"} == expected
        assert all(isinstance(p, Parameter) for p in group["params"])


def test_arguments_in_torchs_order():
    w = [np.ones(1)]
    opts = {
        SGD(w, 1, 2, 0, 4, True): (1, 2, 0, 4, True, False),
        Adam(w, 1, (0.2, 0.3), 4, 5, True): (1, (0.2, 0.3), 4, 5, True, False, False, False, False),
        AdamW(w, 1, (0.2, 0.3), 4, 5, True): (1, (0.2, 0.3), 4, 5, True, False, False, False, True),
        RMSprop(w, 1, 0.2, 3, 4, 5, True, True): (1, 5, 0.2, 3, True, 4, True),
        Adagrad(w, 1, 2, 3, 4, 5): (1, 2, 5, 3, 4, False),
        Lion(w, 1, (0.2, 0.3), 4): (1, (0.2, 0.3), 4, False),
    }
    for opt, expected in opts.items():
        assert opt.defaults == dict(zip(GROUP_KEYS[type(opt)].split(), expected, strict=True))


def test_kinds_of_params():
    """An ndarray becomes a Parameter that writes into it; generators and mixtures are taken."""
    a, p = np.ones(3), Parameter(np.ones(3))
    for params in ([a, p], (x for x in (a, p)), (a, p), {"a": a, "p": p}.values()):
        first, second = params_of(SGD(params, lr=0.5))
        assert first.data is a
        assert second is p
    SGD([a], lr=0.5).step(grads=[np.ones(3)])
    assert a.tolist() == [0.5] * 3
    big = np.ones(8, np.float32)  # neighbours, and views without elements, do not overlap
    opt = SGD([big[:3], big[3:7], big[3:3], big[7:].reshape(())], lr=0.5)
    opt.step(grads=[np.ones(3, np.float32), None, np.ones(0, np.float32), None])
    assert big.tolist() == [0.5] * 3 + [1] * 5


def test_float32_and_float64_together():
    opt, _ = make(Adam, {"lr": 0.1})
    wide, _ = make(Adam, {"lr": 0.1}, "float64")
    both = Adam([*params_of(make()[0]), *params_of(make(dtype="float64")[0])], lr=0.1)
    for o in (opt, wide, both):
        o.step()
        o.step()
    assert values(both) == values(opt) + values(wide)


# --- zero_grad, closure, grads ----------------------------------------------------------------------------------------


def test_zero_grad():
    opt, params = make()
    grads = [p.grad for p in params]
    params[2].grad = None
    opt.zero_grad(set_to_none=False)
    assert [p.grad is g for p, g in zip(params, grads, strict=True)] == [True, True, False]
    assert params[2].grad is None
    assert not any(g.any() for g in grads[:2])
    params[1].grad = np.float32(3)  # what a NumPy sum gives for a 0-dim parameter
    opt.zero_grad(False)
    assert params[1].grad == 0
    opt.zero_grad()
    assert [p.grad for p in params] == [None] * 3
    assert grads[2].any()


@CLASSES
def test_closure(cls, options):
    """It is called once, before anything is read, and its gradients are used."""
    opt, params = make(cls, options)
    twin, _ = make(cls, options)
    before, calls = values(opt), []
    grads = [p.grad for p in params]
    opt.zero_grad()

    def closure():
        calls.append(values(opt) == before)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return {"loss": 1.5}

    assert opt.step(closure) == {"loss": 1.5}
    assert twin.step() is None
    assert calls == [True]
    assert values(opt) == values(twin)
    opt.zero_grad()
    assert opt.step(closure=closure) == {"loss": 1.5}


@TYPES
@CASES
def test_step_with_grads(cls, options, dtype):
    """As stored ones, bit for bit; the stored ones are neither used nor replaced."""
    opt, params = make(cls, options, dtype)
    twin, twins = make(cls, options, dtype)
    stored = [None, params[1].grad, np.ones(5, dtype)]
    for p, g in zip(params, stored, strict=True):
        p.grad = g
    for i in range(3):
        grads = [random(p.data.shape, dtype, 10 * i + j) for j, p in enumerate(params)]
        for q, g in zip(twins, grads, strict=True):
            q.grad = g
        assert opt.step(grads=iter(grads) if i else grads) is None
        twin.step()
        assert values(opt) == values(twin)
        assert all(p.grad is g for p, g in zip(params, stored, strict=True))


# --- a user's own optimizer -------------------------------------------------------------------------------------------


@TYPES
def test_own_optimizer(dtype):
    """The formula, its state, its groups, and a parameter without gradient."""
    params = [Parameter(random(s, dtype, i), random(s, dtype, 5 + i)) for i, s in enumerate([(3, 4), (2,), (3,)])]
    opt = Own([{"params": params[:1]}, {"params": params[1:], "lr": 0.5, "decay": 0.25}], lr=0.1)
    params[2].grad, start = None, params[2].data.copy()
    expected = []
    for p, lr, decay in [(params[0], 0.1, 0.9), (params[1], 0.5, 0.25)]:
        x, mean = p.data.copy(), np.zeros_like(p.data)
        for n in range(1, 4):
            mean *= decay
            mean += p.grad
            x -= 1 * lr * mean
            x -= 1 * lr / n * p.grad
        expected.append((bits(x), bits(mean)))
    for _ in range(3):
        opt.step()
    assert [(bits(p.data), bits(opt.state[p]["mean"])) for p in params[:2]] == expected
    assert [list(opt.state[p]) for p in params[:2]] == [["n", "mean"]] * 2
    assert list(opt.state_dict()["state"]) == [0, 1]
    assert bits(params[2].data) == bits(start)


def test_own_optimizer_gets_arrays():
    seen = []

    class Look(Optimizer):
        def update(self, p, g, state, group):
            seen.append((p is w, type(p), type(g), g.shape, g.dtype, bits(g), state, dict(group)))

    w, g = np.ones((2, 3)), np.asfortranarray(random((2, 3), "float64"))
    opt = Look([w], {"anything": "goes"})
    opt.step(grads=[g])
    (group,) = opt.param_groups
    assert seen == [(True, np.ndarray, np.ndarray, (2, 3), np.float64, bits(g), {}, group)]


def test_own_optimizer_cannot_write_gradients():
    class Doubles(Optimizer):
        def update(self, p, g, state, group):
            g *= 2

    g = np.ones(3)
    opt = Doubles([Parameter(np.ones(3), g)], {"lr": 0.1})
    with pytest.raises(ValueError, match="read-only"):
        opt.step()
    assert g.tolist() == [1, 1, 1]
    assert g.flags.writeable


def test_own_optimizer_fails():
    """An error in update comes through, and the optimizer can be used again."""

    class Fails(Own):
        def update(self, p, g, state, group):
            if np.isnan(g).any():
                raise ArithmeticError("gradient is NaN")
            super().update(p, g, state, group)

    opt, params = make(Fails)
    twin, _ = make(Fails)
    with pytest.raises(ArithmeticError, match="NaN"):
        opt.step(grads=[np.full_like(params[0].data, np.nan), None, None])
    go_on(opt, twin)


@pytest.mark.parametrize(
    "bad, error", [(np.ones(4, np.float32), ValueError), (np.ones(5), TypeError), ([1.0] * 5, TypeError)]
)
def test_own_optimizer_refuses_bad_gradients(bad, error):
    opt, params = make(Own, steps=1)
    before = values(opt)
    with pytest.raises(error, match="parameter 2"):
        opt.step(grads=[params[0].grad, params[1].grad, bad])
    assert values(opt) == before


def test_own_optimizer_hyper_parameters():
    with pytest.raises(ValueError, match="lr"):
        Own([np.ones(3)], lr=-1)
    with pytest.raises(ValueError, match=r"'decya'.*'decay'"):
        Own([{"params": np.ones(3), "decya": 1}])


@pytest.mark.parametrize("entry", [[1], None, 3, "state"], ids=repr)
def test_state_of_an_own_optimizer_that_is_no_dict(entry):
    """As of one with a rule: the parameter is named, and nothing has changed."""
    opt, params = make(Own)
    before = [p.data.copy() for p in params]
    opt.state[params[1]] = entry
    with pytest.raises(TypeError, match=r"parameter 1: its state is a .*, must be a dict"):
        opt.step()
    assert all((p.data == b).all() for p, b in zip(params, before, strict=True))


def test_a_class_that_declares_half_of_a_rule():
    """It says what is missing, at the first step, and leaves all as it was."""
    half = {"__init__": lambda self, params: Optimizer.__init__(self, params, {"lr": 0.1})}
    tied = {"rule": SGD.rule, "state_names": SGD.state_names, "checks": {"momentum": lambda name, value: None}}
    numbers = {"counts_steps": True, "number_states": ("n",), "scalars": lambda self, group, step: {}}
    for name, body, message in (
        ("Bare", half, "Bare has no rule: set the class attribute `rule` or override `update`"),
        ("Silent", {**half, **tied, "state_streams": lambda self, group: (None,)}, "must override `scalars`"),
        ("Mute", {**half, **tied, **numbers, "state_streams": lambda self, group: (None,)}, "override `next_numbers`"),
    ):
        p = Parameter(np.ones(3), np.ones(3))
        optimizer = type(name, (Optimizer,), body)([p])
        with pytest.raises(TypeError, match=message):
            optimizer.step()
        assert p.data.tolist() == [1, 1, 1] and not any(optimizer.state.values())
