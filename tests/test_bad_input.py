"""Bad input gives the right error, a message that names what is wrong, and leaves everything as it was."""

import copy
import itertools
from functools import partial

import numpy as np
import pytest

import pyopt
from pyopt import SGD, Adagrad, Adam, AdamW, Lion, Optimizer, Parameter, RMSprop

CLASSES = [SGD, Adam, AdamW, RMSprop, Adagrad, Lion]
DTYPES = ["float32", "float64"]
OTHER = {"float32": "float64", "float64": "float32"}
# One option set with all state that the optimizer can have, and the names of its arrays.
CASES = [
    (SGD, {"momentum": 0.9}, ["momentum_buffer"]),
    (Adam, {"amsgrad": True, "weight_decay": 0.1}, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
    (AdamW, {}, ["exp_avg", "exp_avg_sq"]),
    (RMSprop, {"momentum": 0.9, "centered": True}, ["square_avg", "momentum_buffer", "grad_avg"]),
    (Adagrad, {"lr_decay": 0.1}, ["sum"]),
    (Lion, {"weight_decay": 0.1}, ["exp_avg"]),
]
ENTRIES = [pytest.param(c, o, k, id=f"{c.__name__}-{k}") for c, o, names in CASES for k in names]
IDS = [c.__name__ for c, *_ in CASES]
COUNTING = [pytest.param(c, o, id=c.__name__) for c, o, _ in CASES if c not in (SGD, Lion)]


def freeze(x):
    """All that can be seen of x: bits, layout and identity of arrays, order of dicts."""
    if isinstance(x, np.ndarray):
        return id(x), x.dtype.str, x.shape, x.strides, x.tobytes()
    if isinstance(x, Parameter):
        return id(x), x.name, freeze(x.data), freeze(x.grad)
    if isinstance(x, Optimizer):
        return freeze([x.defaults, x.param_groups, x.state])
    if isinstance(x, dict):
        return id(x), [(freeze(k), freeze(v)) for k, v in x.items()]
    if isinstance(x, (list, tuple)):
        return type(x), [freeze(v) for v in x]
    return (type(x), repr(x)) if isinstance(x, (int, float, complex, str)) else id(x)


def refuses(error, words, things, *actions):
    """The actions raise `error` with all `words` in its message, and the one that raises leaves `things` unchanged."""
    with pytest.raises(error) as info:
        for action in actions:
            before = freeze(things)
            action()
    errors = error if isinstance(error, tuple) else (error,)
    assert type(info.value) in errors, repr(info.value)
    missing = [word for word in words if word not in str(info.value)]
    assert not missing, f"{missing} not in {info.value!r}"
    assert freeze(things) == before


def random(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make(cls=Adam, dtype="float32", named=False, steps=2, **options):
    """An optimizer of parameters 0, 1 in group 0 and 2 in group 1, in mid-run, with a gradient for the next step."""
    names = ["w0", "w1", "w2"] if named else [None] * 3
    shapes = enumerate([(3, 4), (), (5, 3)])
    params = [Parameter(random(s, dtype, i), random(s, dtype, 9 + i), names[i]) for i, s in shapes]
    items = list(zip(names, params, strict=True)) if named else params
    opt = cls([{"params": items[:2]}, {"params": items[2:], "lr": 0.5}], **options)
    for _ in range(steps):
        opt.step()
    return opt, params


def contents(opt):
    """Values without identities, to compare two optimizers."""
    sd = opt.state_dict()
    arrays = [p.data for group in opt.param_groups for p in group["params"]]
    arrays += [v for state in sd["state"].values() for v in state.values() if isinstance(v, np.ndarray)]
    steps = [state.get("step") for state in sd["state"].values()]
    return [(a.dtype, a.shape, a.tobytes()) for a in arrays], steps, sd["param_groups"]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def misaligned(x):
    out = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


# What is done to a state array of shape (5, 3): (change, error, words).
BAD_ENTRIES = {
    "shape": (lambda v: np.ones((5, 4), v.dtype), ValueError, ["(5, 4)", "(5, 3)"]),
    "flat": (lambda v: v.ravel(), ValueError, ["(15,)", "(5, 3)"]),
    "transposed": (lambda v: v.T, ValueError, ["(3, 5)", "(5, 3)"]),
    "dtype": (lambda v: v.astype(OTHER[v.dtype.name]), TypeError, ["float32", "float64"]),
    "int": (lambda v: v.astype(int), TypeError, ["int64"]),
    "big-endian": (lambda v: v.astype(v.dtype.newbyteorder()), TypeError, [">f"]),
    "list": (lambda v: v.tolist(), TypeError, ["list"]),
    "None": (lambda v: None, TypeError, ["None"]),
    "number": (lambda v: 0.0, TypeError, ["float"]),
    "str": (lambda v: "abc", TypeError, ["str"]),
}


# ---------------------------------------------------------------------------------------------------------- parameters

NO_PARAMETERS = {
    "empty list": ([], ValueError, "params"),
    "empty generator": (iter(()), ValueError, "params"),
    "array": (np.ones(3), TypeError, "ndarray"),
    "Parameter": (Parameter(np.ones(3)), TypeError, "Parameter"),
    "set": ({Parameter(np.ones(3))}, TypeError, "set"),
    "frozenset": (frozenset({Parameter(np.ones(3))}), TypeError, "set"),
    "set in a group": ([{"params": {Parameter(np.ones(3))}}], TypeError, "set"),
    "bare dict": ({"params": [np.ones(3)]}, TypeError, "dict"),
    "string": ("ab", TypeError, "str"),
    "None": (None, TypeError, "None"),
    "int": (3, TypeError, "int"),
    "array after a dict": ([{"params": [np.ones(3)]}, np.ones(3)], TypeError, "ndarray"),
    "dict after an array": ([np.ones(3), {"params": [np.ones(3)]}], TypeError, "parameter 1"),
    "group without params": ([{"params": [np.ones(3)]}, {"lr": 0.1}], KeyError, "params"),
    "mixed names": ([("a", np.ones(3)), np.ones(3)], ValueError, "names"),
    "mixed names over groups": ([{"params": [("a", np.ones(3))]}, {"params": [np.ones(3)]}], ValueError, "names"),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("params, error, word", NO_PARAMETERS.values(), ids=NO_PARAMETERS)
def test_no_parameters(cls, params, error, word):
    refuses(error, [word], [params], lambda: cls(params))


@pytest.mark.parametrize(
    "group, error, word",
    [
        ([np.ones(3)], TypeError, "list"),
        (np.ones(3), TypeError, "ndarray"),
        (None, TypeError, "None"),
        ({}, KeyError, "params"),
        ({"lr": 0.1}, KeyError, "params"),
        ({"params": {Parameter(np.ones(3))}}, TypeError, "set"),
        ({"params": [("a", np.ones(3))]}, ValueError, "names"),
    ],
    ids=["list", "array", "None", "empty", "no params", "set", "named"],
)
def test_add_param_group(group, error, word):
    opt, _ = make()
    refuses(error, [word], [opt, group], lambda: opt.add_param_group(group))


def test_add_unnamed_group_to_named():
    opt, _ = make(named=True)
    group = {"params": [np.ones(3, np.float32)]}
    refuses(ValueError, ["names"], [opt, group], lambda: opt.add_param_group(group))


def bad_arrays(dtype):
    """name: (no parameter, error, words)"""
    x = random((4, 6), dtype)
    table = {name: (x.astype(name), TypeError, [name, "float32", "float64"]) for name in ("int32", "complex64", "bool")}
    table |= {name: (x.astype(name), TypeError, [name]) for name in ("uint8", "object")}
    swapped = x.astype(x.dtype.newbyteorder())
    return table | {
        "big-endian": (swapped, TypeError, [swapped.dtype.str]),
        "read-only": (read_only(x), ValueError, ["read-only"]),
        "misaligned": (misaligned(x), ValueError, ["misaligned"]),
        "rows": (x[::2], ValueError, ["dense", str(x[::2].strides)]),
        "columns": (x[:, ::2], ValueError, ["dense"]),
        "one column": (x[:, 0], ValueError, ["dense"]),
        "block": (x[1:3, 1:3], ValueError, ["dense"]),
        "reversed": (x[::-1], ValueError, ["dense"]),
        "reversed columns": (x[:, ::-1], ValueError, ["dense"]),
        "list": ([1.0, 2.0], TypeError, ["list", "ndarray"]),
        "int": (3, TypeError, ["int", "ndarray"]),
        "float": (3.0, TypeError, ["float", "ndarray"]),
        "str": ("abc", TypeError, ["str", "ndarray"]),
        "None": (None, TypeError, ["None", "ndarray"]),
        "numpy scalar": (np.float32(3), TypeError, ["float32", "ndarray"]),
    }


WAYS_IN = {
    "Parameter": ("'w'", lambda x, a, b, opt: Parameter(x, name="w")),
    "constructor": ("parameter 2", lambda x, a, b, opt: Adam([a, b, x])),
    "named": ("'w'", lambda x, a, b, opt: Adam([("a", a), ("b", b), ("w", x)])),
    "groups": ("parameter 2", lambda x, a, b, opt: Adam([{"params": [a]}, {"params": [b, x]}])),
    "single in a group": ("parameter 1", lambda x, a, b, opt: Adam([{"params": a}, {"params": [x]}])),
    "add_param_group": ("parameter 4", lambda x, a, b, opt: opt.add_param_group({"params": [a, x]})),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", bad_arrays("float32"))
@pytest.mark.parametrize("way", WAYS_IN)
def test_bad_array(kind, way, dtype):
    x, error, words = bad_arrays(dtype)[kind]
    where, build = WAYS_IN[way]
    opt, _ = make(dtype=dtype)
    a, b = np.ones(3, dtype), np.ones((2, 2), dtype)
    refuses(error, [where, *words], [x, a, b, opt], lambda: build(x, a, b, opt))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", bad_arrays("float32"))
def test_bad_array_rebound(kind, dtype):
    """Caught when it is assigned, or else at the next step. With a gradient and without."""
    x, error, words = bad_arrays(dtype)[kind]
    for named, grad in itertools.product([False, True], repeat=2):
        opt, (*_, p) = make(dtype=dtype, named=named)
        p.grad = p.grad if grad else None
        refuses(error, ["'w2'" if named else "parameter", *words], [opt, x], partial(setattr, p, "data", x), opt.step)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", ["transposed", "flat", "dtype"])
@pytest.mark.parametrize("cls, options, _", CASES, ids=IDS)
def test_rebound_to_another_shape_or_dtype(cls, options, _, kind, steps):
    """Than that of the gradient and, once there is any, of the state."""
    change, error, _ = BAD_ENTRIES[kind]
    for named in False, True:
        opt, (*_, p) = make(cls, named=named, steps=steps, **options)
        x = change(random((5, 3)))
        words = ["'w2'" if named else "parameter 2"]
        refuses(error, words, [opt, x], partial(setattr, p, "data", x), opt.step)
        if steps:
            p.grad = np.ones_like(x)
            refuses(error, words, [opt, x], opt.step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_names_of_pairs(dtype):
    """The name given beside a parameter is as good as its own."""
    p, q = (Parameter(np.ones(3, dtype), np.ones(4, dtype)) for _ in range(2))
    opt = SGD([("first", p), ("second", q)])
    refuses(ValueError, ["'first'"], opt, opt.step)
    refuses(ValueError, ["'second'"], opt, lambda: opt.step(grads=[None, np.ones(5, dtype)]))
    refuses(ValueError, ["'first'", "the same array"], p, lambda: SGD([("first", p), ("second", p)]))


# Of an array `x` of 16 elements: parameters `a` and `b` that share memory.
SHARED = {
    "same array": lambda x: (x, x),
    "same Parameter": lambda x: (p := Parameter(x), p),
    "two Parameters of one array": lambda x: (Parameter(x), Parameter(x)),
    "two views of one array": lambda x: (x[:], x[:]),
    "overlap by one": lambda x: (x[:5], x[4:]),
    "overlap by one, other way round": lambda x: (x[4:], x[:5]),
    "inside": lambda x: (x, x[7:8]),
    "another shape": lambda x: (x, x.reshape(4, 4)),
    "transposed": lambda x: (x.reshape(4, 4), x.reshape(4, 4).T),
    "another dtype": lambda x: (x, x.view(OTHER[x.dtype.name])),
    "0-dim": lambda x: (x, x[15:].reshape(())),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["one group", "two groups", "named", "add_param_group"])
@pytest.mark.parametrize("kind", SHARED)
def test_shared_memory(kind, how, dtype):
    x, between = random(16, dtype), np.ones(3, dtype)
    a, b = SHARED[kind](x)
    words = ["parameter 0", "parameter 2"]
    if how == "one group":
        refuses(ValueError, words, [x, between], lambda: Adam([a, between, b]))
    elif how == "two groups":
        refuses(ValueError, words, [x, between], lambda: Adam([{"params": [a, between]}, {"params": [b]}]))
    elif how == "named":
        a, b = (p if isinstance(p, Parameter) else Parameter(p) for p in (a, b))
        a.name, b.name = ("third", "third") if a is b else ("first", "third")
        pairs = [(a.name, a), ("second", between), ("third", b)] if a is not b else [a, between, b]
        refuses(ValueError, [repr(a.name), repr(b.name)], [x, between], lambda: Adam(pairs))
    else:
        opt, group = Adam([a, between]), {"params": [b]}
        refuses(ValueError, words, [opt, x, group], lambda: opt.add_param_group(group))


@pytest.mark.parametrize("grads", ["both", "first", "second"])
@pytest.mark.parametrize("kind", [k for k in SHARED if k != "same Parameter"])
def test_shared_memory_rebound(kind, grads):
    a, b = (s.data if isinstance(s, Parameter) else s for s in SHARED[kind](random(16)))
    p, q = Parameter(a), Parameter(np.ones_like(b), np.ones_like(b))
    opt = SGD([p, np.ones(3, np.float32), q], lr=0.1, momentum=0.9)
    p.grad = np.ones_like(a)
    opt.step()
    p.grad, q.grad = (p.grad, None) if grads == "first" else (None if grads == "second" else p.grad, q.grad)
    refuses(ValueError, ["parameter 0", "parameter 2"], [opt, a, b], lambda: setattr(q, "data", b), opt.step)


# ---------------------------------------------------------------------------------------------------- hyper-parameters

NO_NUMBERS = [("0.1", TypeError), (None, TypeError), (True, TypeError), (False, TypeError), ([0.1], TypeError)]
NUMBER = [*NO_NUMBERS, (np.nan, ValueError), (np.inf, ValueError), (-np.inf, ValueError)]
NON_NEGATIVE = [*NUMBER, (-1, ValueError), (-1e-9, ValueError), (np.float32(-0.5), ValueError)]
FRACTION = [*NON_NEGATIVE, (1.0001, ValueError), (2, ValueError)]
FLAG = [(1, TypeError), (0, TypeError), (0.0, TypeError), (None, TypeError), ("yes", TypeError), ([True], TypeError)]
BETA = [*NON_NEGATIVE, (1.0, ValueError), (1, ValueError)]
BETAS = [((b, 0.9), e) for b, e in BETA] + [((0.9, b), e) for b, e in BETA]
BETAS += [(0.9, TypeError), (None, TypeError), (True, TypeError), ("ab", TypeError)]
BETAS += [((), (TypeError, ValueError)), ((0.9,), (TypeError, ValueError)), ((0.9, 0.9, 0.9), (TypeError, ValueError))]

ALL = ["constructor", "group", "add_param_group", "later"]
ADAM = {"lr": NON_NEGATIVE, "betas": BETAS, "eps": NON_NEGATIVE, "weight_decay": NON_NEGATIVE}
ADAM |= {"amsgrad": FLAG, "maximize": FLAG}
RULES = {
    SGD: {
        "lr": NON_NEGATIVE,
        "momentum": NON_NEGATIVE,
        "dampening": NUMBER,
        "weight_decay": NON_NEGATIVE,
        "nesterov": FLAG,
        "maximize": FLAG,
    },
    Adam: ADAM | {"decoupled_weight_decay": FLAG},
    AdamW: ADAM,
    RMSprop: {
        "lr": NON_NEGATIVE,
        "alpha": FRACTION,
        "eps": NON_NEGATIVE,
        "weight_decay": NON_NEGATIVE,
        "momentum": NON_NEGATIVE,
        "centered": FLAG,
        "maximize": FLAG,
    },
    Adagrad: {
        "lr": NON_NEGATIVE,
        "lr_decay": NON_NEGATIVE,
        "weight_decay": NON_NEGATIVE,
        "initial_accumulator_value": NON_NEGATIVE,
        "eps": NON_NEGATIVE,
        "maximize": FLAG,
    },
    Lion: {"lr": NON_NEGATIVE, "betas": BETAS, "weight_decay": NON_NEGATIVE, "maximize": FLAG},
}
HYPER = [
    pytest.param(cls, name, value, error, id=f"{cls.__name__}-{name}={value!r}"[:60])
    for cls, names in RULES.items()
    for name, bad in names.items()
    for value, error in bad
]


def refuses_group(cls, options, error, words, where):
    """`options` are bad in a constructor, in a group of it, in add_param_group or when set later, as `where` says."""
    a, b = random(3), random(4)
    group = {"params": [b], **options}
    if where == "constructor":
        refuses(error, words, [a], lambda: cls([a], **options))
    elif where == "group":
        refuses(error, words, [a, group], lambda: cls([{"params": [a]}, group]))
    elif where == "add_param_group":
        opt, _ = make(cls)
        refuses(error, words, [opt, group], lambda: opt.add_param_group(group))
    else:
        opt, _ = make(cls)
        twin, _ = make(cls)
        good = {k: opt.param_groups[1][k] for k in options if k in opt.param_groups[1]}
        opt.param_groups[1].update(options)
        refuses(error, words, opt, opt.step)
        refuses(error, words, opt, lambda: opt.step(grads=[p.grad for g in opt.param_groups for p in g["params"]]))
        for k in options:
            del opt.param_groups[1][k]
        opt.param_groups[1].update(good)
        opt.step()
        twin.step()
        assert contents(opt)[:2] == contents(twin)[:2]


@pytest.mark.parametrize("cls, name, value, error", HYPER)
def test_hyper_parameter(cls, name, value, error):
    bad = value[int(value[0] == 0.9)] if isinstance(value, tuple) and len(value) == 2 else value
    for where in ALL:
        refuses_group(cls, {name: value}, error, [name, repr(bad)], where)


@pytest.mark.parametrize("where", ALL)
@pytest.mark.parametrize("cls, name", [(cls, name) for cls in CLASSES for name in ("lr", "weight_decay")])
def test_integer_beyond_float(cls, name, where):
    refuses_group(cls, {name: 10**400}, ValueError, [name], where)


@pytest.mark.parametrize("cls", [Adam, AdamW, Lion])
def test_betas_changed_in_place(cls):
    """A list is no less checked for being the same list."""
    opt, _ = make(cls, betas=[0.9, 0.99])
    opt.param_groups[1]["betas"][1] = 1.5
    refuses(ValueError, ["betas", "1.5"], opt, opt.step)


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_default(cls):
    """The defaults are checked even where every group has values of its own: groups to come may not."""
    groups = [{"params": [random(3)], "lr": 0.1}]
    refuses(ValueError, ["lr", "-1"], groups, lambda: cls(groups, lr=-1))


OPTIONS = [
    (SGD, {"nesterov": True}, ["nesterov", "momentum"]),
    (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ["nesterov", "dampening"]),
    (SGD, {"nesterov": True, "momentum": 0.9, "dampening": -0.1}, ["nesterov", "dampening"]),
]
MISSPELT = {
    "wieght_decay": "weight_decay",
    "weight-decay": "weight_decay",
    "weightdecay": "weight_decay",
    "maximise": "maximize",
    "Lr": "lr",
    "lr_": "lr",
    "learning_rate": "lr",
}
IN_GROUPS = [
    *((cls, {key: 0.1}, [key, option]) for cls in CLASSES for key, option in MISSPELT.items()),
    *((cls, {"epsilon": 0.1}, ["epsilon", "'eps'"]) for cls in (Adam, RMSprop)),
    (Adam, {"esp": 0.1}, ["esp", "'eps'"]),
    (Adam, {"beta": (0.9, 0.99)}, ["'beta'", "'betas'"]),
    (RMSprop, {"aplha": 0.1}, ["aplha", "'alpha'"]),
    (SGD, {"momentun": 0.1}, ["momentun", "'momentum'"]),
    (AdamW, {"decoupled_weight_decay": False}, ["decoupled_weight_decay", "False"]),
]


@pytest.mark.parametrize("where", ALL)
@pytest.mark.parametrize("cls, options, words", OPTIONS)
def test_combination(cls, options, words, where):
    refuses_group(cls, options, ValueError, words, where)


@pytest.mark.parametrize("where", ALL[1:])
@pytest.mark.parametrize("cls, options, words", IN_GROUPS)
def test_group_key(cls, options, words, where):
    refuses_group(cls, options, ValueError, words, where)


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_keyword(cls):
    refuses(TypeError, ["learning_rate"], [], lambda: cls([np.ones(3)], learning_rate=0.1))


@pytest.mark.parametrize("cls, name", [(cls, name) for cls, names in RULES.items() for name in [*names, "params"]])
def test_group_key_deleted(cls, name):
    opt, _ = make(cls)
    del opt.param_groups[1][name]
    refuses(KeyError, [name], opt, opt.step)


@pytest.mark.parametrize(
    "cls, option, entry",
    [(Adam, "amsgrad", "max_exp_avg_sq"), (AdamW, "amsgrad", "max_exp_avg_sq"), (RMSprop, "centered", "grad_avg")],
)
def test_option_turned_on_later(cls, option, entry):
    """As in torch: state is only made when a parameter has none."""
    opt, _ = make(cls)
    opt.param_groups[1][option] = True
    refuses(KeyError, ["parameter 2", entry], opt, opt.step)


@pytest.mark.parametrize("value", [random(3), [random(3)], None, 3, "ab"], ids=["array", "list", "None", "int", "str"])
def test_params_of_a_group_replaced(value):
    opt, _ = make()
    opt.param_groups[1]["params"] = value
    refuses((TypeError, ValueError), ["param"], opt, opt.step)


# ----------------------------------------------------------------------------------------------------------- gradients

BAD_GRADS = {
    "shape": (lambda g: g[:, :2], ValueError, ["(5, 2)", "(5, 3)"]),
    "transposed": (lambda g: g.T, ValueError, ["(3, 5)", "(5, 3)"]),
    "flat": (lambda g: g.ravel(), ValueError, ["(15,)", "(5, 3)"]),
    "one element": (lambda g: g[:1, :1], ValueError, ["(1, 1)", "(5, 3)"]),
    "0-dim": (lambda g: g[0, 0, ...], ValueError, ["()", "(5, 3)"]),
    "broadcastable": (lambda g: g[:1], ValueError, ["(1, 3)", "(5, 3)"]),
    "extra axis": (lambda g: g[None], ValueError, ["(1, 5, 3)", "(5, 3)"]),
    "size 0": (lambda g: g[:0], ValueError, ["(0, 3)", "(5, 3)"]),
    "other float": (lambda g: g.astype(OTHER[g.dtype.name]), TypeError, ["float32", "float64"]),
    "uint8": (lambda g: g.astype("uint8"), TypeError, ["uint8"]),
    "int": (lambda g: g.astype("int64"), TypeError, ["int64"]),
    "same size int": (lambda g: g.view(f"int{8 * g.itemsize}"), TypeError, ["int"]),
    "complex": (lambda g: g.astype("complex64"), TypeError, ["complex64"]),
    "big-endian": (lambda g: g.astype(g.dtype.newbyteorder()), TypeError, [">f"]),
    "list": (lambda g: g.tolist(), TypeError, ["list"]),
    "scalar": (lambda g: 1.0, TypeError, ["float"]),
    "str": (lambda g: "abc", TypeError, ["str"]),
    "object": (lambda g: object(), TypeError, ["object"]),
}


@pytest.mark.parametrize("kind", BAD_GRADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls, options, _", CASES, ids=IDS)
def test_bad_gradient(cls, options, _, dtype, kind):
    """Of the last parameter; once it is mended all goes on as if nothing had been."""
    spoil, error, words = BAD_GRADS[kind]
    for named, steps in itertools.product([False, True], [0, 2]):
        opt, (p, q, last) = make(cls, dtype, named, steps, **options)
        twin, _ = make(cls, dtype, named, steps, **options)
        where = "'w2'" if named else "parameter 2"
        good, bad = last.grad, spoil(last.grad)
        refuses(error, [*words, where], [opt, bad], partial(opt.step, grads=[p.grad, q.grad, bad]))
        refuses(error, [*words, where], [opt, bad], partial(setattr, last, "grad", bad), opt.step)
        last.grad = good
        opt.step()
        twin.step()
        assert contents(opt) == contents(twin)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("cls", CLASSES)
def test_grads_argument(cls, steps):
    opt, params = make(cls, steps=steps)
    g = [p.grad for p in params]
    for grads in ([], g[:2], [*g, g[0]], [None] * 4, iter(g[:2])):
        refuses(ValueError, ["grads", "3"], opt, partial(opt.step, grads=grads))
    for grads in (3, 1.5, object()):
        refuses(TypeError, ["grads"], opt, partial(opt.step, grads=grads))


@pytest.mark.parametrize("cls", CLASSES)
def test_closure_fails(cls):
    opt, _ = make(cls)
    refuses(ZeroDivisionError, [], opt, lambda: opt.step(lambda: 1 / 0))


# ------------------------------------------------------------------------------------------------- state and state_dict

BAD_LIVE_ENTRIES = BAD_ENTRIES | {
    "memory order": (lambda v: np.asfortranarray(v), ValueError, ["strides"]),
    "strided": (lambda v: np.repeat(v, 2, axis=1)[:, ::2], ValueError, ["strides"]),
    "reversed": (lambda v: v[::-1, ::-1], ValueError, ["strides"]),
    "broadcast": (lambda v: np.broadcast_to(v[:1], v.shape), ValueError, ["read-only"]),
    "read-only": (read_only, ValueError, ["read-only"]),
    "misaligned": (misaligned, ValueError, ["misaligned"]),
}
BAD_STEPS = {
    "negative": -1,
    "fraction": 1.5,
    "str": "3",
    "None": None,
    "nan": np.nan,
    "bool": True,
    "list": [3],
    "array of two": np.array([3, 3]),
    "huge": 2**70,
}


@pytest.mark.parametrize("kind", BAD_LIVE_ENTRIES)
@pytest.mark.parametrize("cls, options, key", ENTRIES)
def test_state_entry_replaced(cls, options, key, kind):
    spoil, error, words = BAD_LIVE_ENTRIES[kind]
    for named, dtype in itertools.product([False, True], DTYPES):
        opt, (*_, p) = make(cls, dtype, named, **options)
        opt.state[p][key] = spoil(opt.state[p][key])
        refuses(error, [*words, key, "'w2'" if named else "parameter 2"], opt, opt.step)


@pytest.mark.parametrize("kind", BAD_ENTRIES)
@pytest.mark.parametrize("cls, options, key", ENTRIES)
def test_state_dict_entry(cls, options, key, kind):
    spoil, error, words = BAD_ENTRIES[kind]
    for named, dtype in itertools.product([False, True], DTYPES):
        opt, _ = make(cls, dtype, named, **options)
        sd = opt.state_dict()
        sd["state"][2][key] = spoil(sd["state"][2][key])
        opt.step()
        refuses(error, [*words, key, "'w2'" if named else "parameter 2"], [opt, sd], partial(opt.load_state_dict, sd))


@pytest.mark.parametrize("where", ["live", "state_dict"])
@pytest.mark.parametrize("cls, options, key", [*ENTRIES, *(pytest.param(*c.values, "step") for c in COUNTING)])
def test_state_entry_missing(cls, options, key, where):
    opt, params = make(cls, **options)
    sd = opt.state_dict()
    if where == "live":
        del opt.state[params[2]][key]
        if opt.state[params[2]]:  # else it is new
            refuses(KeyError, [key, "parameter 2"], opt, opt.step)
    else:
        del sd["state"][2][key]
        opt.step()
        refuses(KeyError, [key, "parameter 2"], [opt, sd], lambda: opt.load_state_dict(sd))


@pytest.mark.parametrize("where", ["live", "state_dict"])
@pytest.mark.parametrize("value", BAD_STEPS.values(), ids=BAD_STEPS)
@pytest.mark.parametrize("cls, options", COUNTING)
def test_step_count(cls, options, value, where):
    opt, params = make(cls, **options)
    sd = opt.state_dict()
    state, action = (opt.state[params[2]], opt.step) if where == "live" else (sd["state"][2], opt.load_state_dict)
    state["step"] = value
    arguments = [] if where == "live" else [sd]
    refuses((TypeError, ValueError), ["step", repr(value), "parameter 2"], [opt, sd], lambda: action(*arguments))


SHARED_STATE = {
    "its parameter": lambda opt, p, q: p.data,
    "another parameter": lambda opt, p, q: q.data,
    "the same entry of another parameter": lambda opt, p, q: opt.state[q]["exp_avg"],
    "another entry": lambda opt, p, q: opt.state[p]["exp_avg_sq"],
}


@pytest.mark.parametrize("kind", SHARED_STATE)
def test_state_entry_shares_memory(kind):
    """Two arrays that a step writes may not overlap: the result would depend on the order of the elements."""
    p, q = (Parameter(random(7, seed=i), random(7, seed=9 + i)) for i in range(2))
    opt = Adam([q, p])
    opt.step()
    opt.state[p]["exp_avg"] = SHARED_STATE[kind](opt, p, q)
    refuses(ValueError, ["exp_avg", "parameter 1"], opt, opt.step)


def put(*path):
    """Set what lies at a path, path[:-1], of a state_dict to path[-1]."""

    def change(sd):
        for key in path[:-2]:
            sd = sd[key]
        sd[path[-2]] = path[-1]

    return change


def drop(*path):
    def change(sd):
        for key in path[:-1]:
            sd = sd[key]
        del sd[path[-1]]

    return change


BAD_STATE_DICTS = {
    "no state": (drop("state"), KeyError, ["state"]),
    "no param_groups": (drop("param_groups"), KeyError, ["param_groups"]),
    "state None": (put("state", None), TypeError, ["state"]),
    "state list": (put("state", [{}, {}, {}]), TypeError, ["state"]),
    "state of a parameter None": (put("state", 2, None), TypeError, ["parameter 2"]),
    "state of a parameter an array": (put("state", 2, np.ones(3)), TypeError, ["parameter 2"]),
    "state of parameter 3": (put("state", 3, {}), (KeyError, ValueError), ["3"]),
    "state of parameter -1": (put("state", -1, {}), (KeyError, ValueError), ["-1"]),
    "state twice": (put("state", "2", {}), ValueError, ["parameter 2", "twice"]),
    "state of a tuple": (put("state", (0, 1), {}), ValueError, ["(0, 1)"]),
    "param_groups None": (put("param_groups", None), TypeError, ["param_groups"]),
    "param_groups dict": (put("param_groups", {}), (TypeError, ValueError), ["group"]),
    "too few groups": (drop("param_groups", 1), ValueError, ["1", "2"]),
    "too many groups": (lambda sd: sd["param_groups"].append(sd["param_groups"][0]), ValueError, ["3", "2"]),
    "group None": (put("param_groups", 1, None), TypeError, ["group"]),
    "group list": (put("param_groups", 1, ["params"]), TypeError, ["group"]),
    "no params": (drop("param_groups", 1, "params"), KeyError, ["params"]),
    "params None": (put("param_groups", 1, "params", None), TypeError, ["params"]),
    "params int": (put("param_groups", 1, "params", 2), TypeError, ["params"]),
    "too few params": (put("param_groups", 1, "params", []), ValueError, ["group 1"]),
    "too many params": (put("param_groups", 1, "params", [2, 3]), ValueError, ["group 1"]),
    "params twice": (put("param_groups", 1, "params", [0]), ValueError, ["group 1"]),
    "misspelt key": (put("param_groups", 1, "wieght_decay", 3), ValueError, ["wieght_decay", "weight_decay"]),
    "option of another optimizer": (put("param_groups", 1, "lambd", 3), ValueError, ["another optimizer", "lambd"]),
    "learning rate": (put("param_groups", 1, "lr", -1), ValueError, ["lr", "-1"]),
    "nan": (put("param_groups", 1, "weight_decay", np.nan), ValueError, ["weight_decay", "nan"]),
    "flag": (put("param_groups", 1, "maximize", 1), (TypeError, ValueError), ["maximize", "1"]),
}


@pytest.mark.parametrize("kind", BAD_STATE_DICTS)
@pytest.mark.parametrize("cls, options, _", CASES, ids=IDS)
def test_state_dict(cls, options, _, kind):
    """Damaged ones, into an optimizer that has stepped and into one that has not."""
    change, error, words = BAD_STATE_DICTS[kind]
    sd = make(cls, **options)[0].state_dict()
    change(sd)
    for steps in 0, 2:
        opt, _ = make(cls, steps=steps, **options)
        refuses(error, words, [opt, sd], partial(opt.load_state_dict, sd))


@pytest.mark.parametrize("value", [None, 3, [], "state", np.ones(3)], ids=["None", "int", "list", "str", "array"])
def test_no_state_dict(value):
    opt, _ = make()
    refuses(TypeError, ["state_dict"], opt, lambda: opt.load_state_dict(value))


LATER = {"maximize", "decoupled_weight_decay"}  # checkpoints of older torch lack them
REQUIRED = [(cls, name) for cls, names in RULES.items() for name in names if name not in LATER]


@pytest.mark.parametrize("cls, name", REQUIRED)
def test_state_dict_group_key_missing(cls, name):
    opt, _ = make(cls)
    sd = opt.state_dict()
    del sd["param_groups"][1][name]
    refuses(KeyError, [name], [opt, sd], lambda: opt.load_state_dict(sd))


PAIRS = [pair for pair in itertools.permutations(CASES, 2) if (pair[0][0], pair[1][0]) != (AdamW, Adam)]


@pytest.mark.parametrize("saved, live", PAIRS, ids=[f"{a[0].__name__}-{b[0].__name__}" for a, b in PAIRS])
def test_state_dict_of_another_optimizer(saved, live):
    sd = make(saved[0], **saved[1])[0].state_dict()
    opt, _ = make(live[0], **live[1])
    refuses((KeyError, ValueError), [], [opt, sd], lambda: opt.load_state_dict(sd))


@pytest.mark.parametrize("cls, options, keys", CASES, ids=IDS)
def test_state_dict_of_other_parameters(cls, options, keys):
    dtype, shapes = np.dtype("float32"), [(3, 4), (5,)]

    def build(shapes, dtype):
        params = [Parameter(random(s, dtype), random(s, dtype)) for s in shapes]
        opt = cls(params, **options)
        opt.step()
        return opt

    opt = build(shapes, dtype)
    for others, other_dtype, error in [
        ([(3, 4), (6,)], dtype, ValueError),
        ([(4, 3), (5,)], dtype, ValueError),
        ([(5,), (3, 4)], dtype, ValueError),
        ([(3, 4)], dtype, ValueError),
        ([(3, 4), (5,), (2,)], dtype, ValueError),
        (shapes, np.dtype("float64"), TypeError),
    ]:
        sd = build(others, other_dtype).state_dict()
        refuses(error, ["parameter"], [opt, sd], partial(opt.load_state_dict, sd))


def test_state_dict_of_other_names():
    saved = SGD([("a", random(3)), ("b", random(3))]).state_dict()
    opt = SGD([("b", random(3)), ("a", random(3))])
    refuses(ValueError, ["'a'", "'b'"], [opt, saved], lambda: opt.load_state_dict(saved))


def test_state_dict_by_names():
    """The state belongs under numbers; a name there would hide that it is missing."""
    opt, _ = make(named=True)
    sd = opt.state_dict()
    sd["state"]["w2"] = sd["state"].pop(2)
    refuses(ValueError, ["'w2'"], [opt, sd], lambda: opt.load_state_dict(sd))


def test_state_dict_spoilt_by_a_hook():
    opt, _ = make()
    sd = opt.state_dict()

    def spoil(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        del state_dict["state"][2]["exp_avg"]
        return state_dict

    opt.register_load_state_dict_pre_hook(spoil)
    refuses(KeyError, ["exp_avg"], [opt, sd], lambda: opt.load_state_dict(sd))


@pytest.mark.parametrize("n, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)])
def test_num_threads(n, error):
    before = pyopt.get_num_threads()
    refuses(error, [], [], lambda: pyopt.set_num_threads(n))
    assert pyopt.get_num_threads() == before
