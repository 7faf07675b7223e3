"""Parameters and gradients by name: mappings, nested in dicts and lists, whose order does not matter."""

from types import MappingProxyType

import numpy as np
import pytest

from all_optimizers import CASES, bits, make, params_of, random, values
from pyopt import SGD, Adam, Parameter


def tree(seed=0, dtype="float32"):
    """Three arrays of one shape, so that a mix-up would pass every check of shapes."""
    w, b, first, second = (random(4, dtype, seed + i) for i in range(4))
    return {"w": w, "head": {"b": b, "layers": [first, (second,)]}}


NAMES = ["w", "head.b", "head.layers.0", "head.layers.1.0"]


def backwards(x):
    """The same nested mapping with its keys the other way round, as JAX may return them."""
    return {k: backwards(v) for k, v in reversed(x.items())} if isinstance(x, dict) else x


def flat(x):
    return [x["w"], x["head"]["b"], x["head"]["layers"][0], x["head"]["layers"][1][0]]


def test_names_are_joined_by_dots():
    arrays = tree()
    opt = SGD(arrays)
    assert opt.param_groups[0]["param_names"] == NAMES
    assert [p.name for p in params_of(opt)] == NAMES
    assert all(p.data is a for p, a in zip(params_of(opt), flat(arrays), strict=True))


@CASES
def test_gradients_by_name(cls, options):
    """In any order of the keys, the step is that of the list in the right order."""
    twin = cls([Parameter(a) for a in flat(tree())], **options)
    opts = [cls(form(tree()), **options) for form in (lambda t: t, backwards, MappingProxyType, lambda t: t.items())]
    by_pairs = cls(list(zip(NAMES, flat(tree()), strict=True)), **options)
    own_names = cls([Parameter(a, name=n) for n, a in zip(NAMES, flat(tree()), strict=True)], **options)
    for step in range(3):
        grads = tree(10 * step + 5)
        twin.step(grads=flat(grads))
        for opt in (*opts, by_pairs, own_names):
            opt.step(grads=backwards(grads))
    expected = dict(zip(NAMES, values(twin), strict=True))
    for opt in (*opts, by_pairs, own_names):
        assert {p.name: value for p, value in zip(params_of(opt), values(opt), strict=True)} == expected


def test_groups_of_mappings():
    arrays = tree()
    opt = SGD([{"params": {"w": arrays["w"]}, "lr": 0.5}, {"params": {"head": arrays["head"]}, "lr": 0.25}])
    grads = {name: np.ones(4, np.float32) for name in ("w", "head")}
    grads["head"] = {"b": grads["w"], "layers": [grads["w"], (None,)]}
    opt.step(grads=grads)
    assert [bits(a) for a in flat(arrays)] == [
        bits(a - x) for a, x in zip(flat(tree()), np.float32([0.5, 0.25, 0.25, 0]), strict=True)
    ]
    opt.add_param_group({"params": {"extra": random(3)}})
    assert [group["param_names"] for group in opt.param_groups] == [NAMES[:1], NAMES[1:], ["extra"]]


def test_none_leaves_a_parameter_alone():
    arrays = tree()
    opt = Adam(arrays)
    grads = tree(5)
    grads["head"]["b"] = None
    opt.step(grads=grads)
    assert bits(arrays["head"]["b"]) == bits(tree()["head"]["b"])
    assert bits(arrays["w"]) != bits(tree()["w"])
    assert list(opt.state_dict()["state"]) == [0, 2, 3]


G = np.ones(4, np.float32)
LAYERS = [G, (G,)]
# name: (gradients, error, words)
BAD = {
    "missing": ({"w": G, "head": {"layers": LAYERS}}, ValueError, ["no gradient for ['head.b']", "None"]),
    "unknown": ({"w": G, "v": G, "head": {"b": G, "layers": LAYERS}}, ValueError, ["['v']", "no parameters"]),
    "both": ({"v": G, "head": {"b": G, "layers": LAYERS}}, ValueError, ["['w']", "['v']"]),
    "empty": ({}, ValueError, NAMES),
    "too deep": ({"w": {"w": G}, "head": {"b": G, "layers": LAYERS}}, ValueError, ["['w']", "['w.w']"]),
    "too flat": ({"w": G, "head": G}, ValueError, ["'head.b'", "['head']"]),
    "none for a branch": ({"w": G, "head": None}, ValueError, ["'head.b'", "['head']"]),
    "list for a dict": ([G, G], ValueError, ["2", "4"]),
    "list of numbers": ({"w": [1.0], "head": {"b": G, "layers": LAYERS}}, ValueError, ["['w']", "['w.0']"]),
    "longer list": ({"w": G, "head": {"b": G, "layers": [*LAYERS, G]}}, ValueError, ["['head.layers.2']"]),
    "twice": ({"w": G, "head": {"b": G, "layers": LAYERS}, "head.b": G}, ValueError, ["'head.b'", "two gradients"]),
    "key": ({"w": G, "head": {1: G}}, TypeError, ["head", "1", "str"]),
    "values": ({"a": G}.values(), TypeError, ["dict_values", "mapping itself"]),
    "items": ({"a": G}.items(), TypeError, ["dict_items", "mapping itself"]),
    "keys": ({"a": G}.keys(), TypeError, ["dict_keys", "mapping itself"]),
    "set": ({1, 2, 3, 4}, TypeError, ["set", "mapping itself"]),
    "str": ("abcd", TypeError, ["str"]),
    "number": (np.array(1.0), TypeError, ["grads", "ndarray"]),
    "shape": ({"w": G[:3], "head": {"b": G, "layers": LAYERS}}, ValueError, ["'w'", "(3,)"]),
}


@pytest.mark.parametrize("grads, error, words", BAD.values(), ids=BAD)
def test_bad_gradients_by_name(grads, error, words):
    arrays = tree()
    opt = Adam(arrays)
    with pytest.raises(error) as info:
        opt.step(grads=grads)
    assert all(word in str(info.value) for word in words), str(info.value)
    assert [bits(a) for a in flat(arrays)] == [bits(a) for a in flat(tree())]


def test_the_order_of_another_mapping_is_refused():
    """JAX returns dicts with sorted keys: values by position would go to the wrong arrays, where shapes agree."""
    p = {"w": np.zeros(2), "b": np.zeros(2)}
    g = {"b": np.ones(2), "w": np.full(2, 5.0)}
    opt = SGD(p.values(), lr=1)
    with pytest.raises(TypeError, match="mapping itself"):
        opt.step(grads=g.values())
    with pytest.raises(TypeError, match="parameter 0 has no name"):
        opt.step(grads=g)
    SGD(p, lr=1).step(grads=g)
    assert {k: v.tolist() for k, v in p.items()} == {"w": [-5, -5], "b": [-1, -1]}


# name: (parameters, error, words)
BAD_PARAMS = {
    "group": ({"params": [np.ones(2)]}, TypeError, ["[{'params': ...}]", "params['params']"]),
    "flax": ({"params": {"dense": {"kernel": np.ones(2)}}}, TypeError, ["params['params']"]),
    "empty": ({}, ValueError, ["empty"]),
    "empty items": ({}.items(), ValueError, ["empty"]),
    "list of layers": ([{"w": np.ones(2)}, {"w": np.ones(2)}], KeyError, ["{'layers': [...]}"]),
    "None": ({"w": None}, TypeError, ["'w'", "None"]),
    "nested number": ({"a": {"b": [1.0]}}, TypeError, ["'a.b.0'", "float"]),
    "key": ({"a": {0: np.ones(2)}}, TypeError, ["a", "0", "str"]),
    "keys": ({"a": np.ones(2)}.keys(), TypeError, ["dict_keys"]),
    "twice": ({"a": {"b": np.ones(2)}, "a.b": np.ones(2)}, ValueError, ["'a.b'"]),
}


@pytest.mark.parametrize("params, error, words", BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_bad_mappings(params, error, words):
    with pytest.raises(error) as info:
        SGD(params)
    assert all(word in str(info.value) for word in words), str(info.value)


def test_names_in_two_groups_may_agree_but_then_name_nothing():
    """As in torch, names are unique within a group."""
    opt = SGD([{"params": {"w": random(3)}}, {"params": {"w": random(3)}}])
    opt.step(grads=[random(3), random(3)])
    with pytest.raises(ValueError, match="'w' stands for two parameters"):
        opt.step(grads={"w": random(3)})


def test_a_failed_constructor_gives_no_names():
    p = Parameter(random(3))
    with pytest.raises(ValueError, match="lr"):
        SGD({"w": p}, lr=-1)
    with pytest.raises(ValueError, match="share"):
        SGD({"w": p, "v": p})
    assert p.name is None
    assert params_of(SGD({"w": p})) == [p]
    assert p.name == "w"


@pytest.mark.parametrize("names", [["a"], ("a", "b"), "ab", None])
def test_bad_param_names(names):
    opt = SGD({"a": random(2), "b": random(2)})
    opt.param_groups[0]["param_names"] = names
    with pytest.raises(ValueError, match="param_names"):
        opt.step(grads=[None, None])


# --- no gradients -----------------------------------------------------------------------------------------------------


@CASES
def test_bare_arrays_without_gradients(cls, options):
    arrays = [random(3), random(3, seed=1)]
    for params in (arrays, {"a": arrays[0], "b": arrays[1]}, [{"params": arrays}], [arrays[0], Parameter(arrays[1])]):
        opt = cls(params, **options)
        for closure in (None, lambda: 3.0):
            with pytest.raises(ValueError, match="grads="):
                opt.step(closure)
        opt.step(grads=[None, None])  # said, not forgotten
    assert [bits(a) for a in arrays] == [bits(random(3)), bits(random(3, seed=1))]
    params_of(opt)[0].grad = random(3, seed=2)
    for _ in range(2):  # ADOPT moves in the second
        opt.step()
    assert bits(arrays[0]) != bits(random(3))


def test_parameters_without_gradients():
    """As in torch, nothing happens."""
    opt, _ = make()
    opt.zero_grad()
    before = values(opt)
    assert opt.step() is None
    assert values(opt) == before


@pytest.mark.parametrize("closure", [[random(3)], random(3), {"w": random(3)}, 3], ids=["list", "array", "dict", "int"])
def test_gradients_in_place_of_the_closure(closure):
    opt = SGD({"w": random(3)})
    with pytest.raises(TypeError, match="grads="):
        opt.step(closure)
