"""pyopt.no_decay: who is decayed, in every form that a model may come in."""

import numpy as np
import pytest

import pyopt

SHAPES = {
    "embed.weight": (5, 4),
    "layers.0.attention.weight": (4, 4),
    "layers.0.attention.bias": (4,),
    "layers.0.LayerNorm.weight": (4,),
    "layers.0.norm1.table": (2, 2),
    "layers.0.normal.weight": (4, 4),
    "layers.0.relative_attention_bias": (4, 4),
    "layers.0.Bias_2": (2, 2),
    "layers.0.biases": (2, 2),
    "layers.0.normé": (2, 2),
    "temperature": (),
    "gain": (4,),
}
PLAIN = ["embed.weight", "layers.0.attention.weight", "layers.0.normal.weight", "layers.0.biases", "layers.0.normé"]


def arrays():
    return {name: np.zeros(shape) for name, shape in SHAPES.items()}


def names(groups):
    return [[name for name, _ in group["params"]] for group in groups]


def rest(decayed):
    return [name for name in SHAPES if name not in decayed]


def test_default():
    groups = pyopt.no_decay(arrays())
    assert names(groups) == [PLAIN, rest(PLAIN)]
    assert [set(group) for group in groups] == [{"params"}, {"params", "weight_decay"}]
    assert groups[1]["weight_decay"] == 0.0


def test_by_names_alone():
    decayed = [*PLAIN, "temperature", "gain"]
    assert names(pyopt.no_decay(arrays(), min_ndim=0)) == [[name for name in SHAPES if name in decayed], rest(decayed)]


def test_by_axes_alone():
    decayed = [name for name, shape in SHAPES.items() if len(shape) >= 2]
    assert names(pyopt.no_decay(arrays(), ())) == [decayed, rest(decayed)]


def test_own_patterns():
    """As transformers' users write them; no regular expressions."""
    groups = pyopt.no_decay(arrays(), ["bias", "LayerNorm.weight", "embed", "."], min_ndim=0)
    assert "layers.0.attention.bias" in names(groups)[1] and "embed.weight" in names(groups)[1]
    assert names(groups)[0] == ["temperature", "gain"]


def test_forms():
    flat = arrays()
    nested = {"embed": {"weight": flat["embed.weight"]}, "layers": [{"norm": flat["embed.weight"].copy()}]}
    assert names(pyopt.no_decay(nested)) == [["embed.weight"], ["layers.0.norm"]]
    expected = names(pyopt.no_decay(flat))
    assert names(pyopt.no_decay(flat.items())) == expected
    assert names(pyopt.no_decay(list(flat.items()))) == expected
    assert names(pyopt.no_decay(iter(flat.items()))) == expected
    assert names(pyopt.no_decay([pyopt.Parameter(a, name=n) for n, a in flat.items()])) == expected
    assert names(pyopt.no_decay({n: pyopt.Parameter(a) for n, a in flat.items()})) == expected


def test_in_an_optimizer():
    flat = arrays()
    optimizer = pyopt.AdamW(pyopt.no_decay(flat), lr=0.1, weight_decay=0.5)
    assert [group["param_names"] for group in optimizer.param_groups] == [PLAIN, rest(PLAIN)]
    for array in flat.values():
        array[...] = 1.0
    optimizer.step(grads={name: np.zeros_like(array) for name, array in flat.items()})
    for name, array in flat.items():
        assert (array == (0.95 if name in PLAIN else 1.0)).all()


def test_one_group_alone():
    assert names(pyopt.no_decay({"w": np.zeros((2, 2))})) == [["w"]]
    (group,) = pyopt.no_decay({"b": np.zeros(2)})
    assert group["weight_decay"] == 0.0
    pyopt.SGD([group])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pyopt.no_decay({}), "named is empty"),
        (lambda: pyopt.no_decay(np.zeros(3)), "named is a ndarray, must be a mapping or pairs"),
        (lambda: pyopt.no_decay(3), "named is a int"),
        (lambda: pyopt.no_decay("w"), "named is a str"),
        (lambda: pyopt.no_decay([np.zeros(3)]), "parameter 0 is a ndarray without a name"),
        (lambda: pyopt.no_decay([pyopt.Parameter(np.zeros(3))]), "parameter 0 is a Parameter without a name"),
        (lambda: pyopt.no_decay({"w": None}), "parameter 'w' is a NoneType, must be an array"),
        (lambda: pyopt.no_decay([("w", np.zeros(1)), ("w", np.zeros(1))]), "the name 'w' stands for two parameters"),
        (lambda: pyopt.no_decay({"w": np.zeros(1)}, "bias"), "patterns == 'bias', must be a list of str"),
        (lambda: pyopt.no_decay({"w": np.zeros(1)}, [""]), "patterns == "),
        (lambda: pyopt.no_decay({"w": np.zeros(1)}, min_ndim=-1), "min_ndim == -1, must be >= 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
