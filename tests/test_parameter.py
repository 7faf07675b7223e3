"""A Parameter shows what its array is, and says clearly that it is none."""

import copy
import operator
import pickle

import numpy as np
import pytest

from all_optimizers import bits, random
from pyopt import SGD, Parameter


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_the_array_is(shape, dtype):
    x = random(shape, dtype)
    for p in (Parameter(x), pickle.loads(pickle.dumps(Parameter(x))), copy.deepcopy(Parameter(x))):
        assert (p.shape, p.dtype, p.ndim, p.size) == (shape, np.dtype(dtype), x.ndim, x.size)
        assert bits(np.asarray(p)) == bits(x)
    if shape:
        assert len(Parameter(x)) == shape[0]
    else:
        with pytest.raises(TypeError, match="unsized"):
            len(Parameter(x))


def test_as_an_array():
    """By the protocol of NumPy 2: no copy where none is needed or none is asked for."""
    p = Parameter(random((2, 3)))
    assert np.shares_memory(np.asarray(p), p.data)
    assert np.shares_memory(np.array(p, copy=False), p.data)
    assert not np.shares_memory(np.array(p), p.data)
    assert not np.shares_memory(np.array(p, copy=True), p.data)
    assert bits(np.asarray(p, "float64")) == bits(p.data.astype("float64"))
    with pytest.raises(ValueError, match="copy"):
        np.array(p, "float64", copy=False)
    np.asarray(p)[0] = 7
    assert p.data[0].tolist() == [7] * 3
    p.data = random(4)
    assert p.shape == np.asarray(p).shape == (4,)


X = np.ones((3, 3))
NAMES = "add sub mul matmul truediv floordiv mod pow lt le gt ge"
BINARY = [getattr(operator, name) for name in NAMES.split()]


@pytest.mark.parametrize("function", BINARY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("other", [X, 2, 2.0, np.float32(2), Parameter(X.copy())], ids=lambda x: type(x).__name__)
def test_no_arithmetic(function, other):
    p = Parameter(np.ones((3, 3)), name="w")
    for pair in [(p, other), (other, p)]:
        with pytest.raises(TypeError, match=r"Parameter.*`\.data`"):
            function(*pair)


@pytest.mark.parametrize(
    "action",
    [
        lambda p: -p,
        lambda p: +p,
        lambda p: abs(p),
        lambda p: p[0],
        lambda p: list(p),
        lambda p: operator.setitem(p, 0, 1),
        lambda p: operator.iadd(p, 1),
        lambda p: operator.iadd(np.ones(3), p),
        lambda p: bool(p),
        lambda p: divmod(p, 2),
        lambda p: np.add(p, 1),
        lambda p: np.add(1, p),
        lambda p: np.add(1, 1, out=p),
        lambda p: np.exp(p),
        lambda p: np.add.reduce(p),
        lambda p: np.sum(p),
    ],
)
def test_no_use_as_an_array(action):
    with pytest.raises(TypeError, match=r"the Parameter 'w'.*`\.data`"):
        action(Parameter(np.ones(3), name="w"))


def test_identity():
    """Parameters are keys of the state: equal is who is the same."""
    p, q = Parameter(np.ones(3)), Parameter(np.ones(3))
    assert p == p
    assert p != q
    assert p in [q, p]
    assert {p: 1, q: 2}[p] == 1


def test_as_a_gradient():
    """It is an array to whoever reads arrays."""
    p = Parameter(np.ones(3))
    SGD([p], lr=0.5).step(grads=[Parameter(np.ones(3))])
    assert p.data.tolist() == [0.5] * 3


def test_a_name_is_text():
    with pytest.raises(TypeError, match="name == 3, must be a str or None"):
        Parameter(np.ones(3), name=3)
