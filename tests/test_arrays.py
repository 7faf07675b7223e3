"""Arrays of every kind as parameters, gradients and state."""

import gc
import sys
import weakref

import numpy as np
import pytest

from all_optimizers import BROADCAST, CLASSES, DENSE, LAYOUTS, ONE, TYPES, Own, bits, make, params_of, random, values
from pyopt import Adam, Parameter, RowwiseAdagrad

SHAPES = [(33, 70), (2, 3, 4), (7,), (1,), (), (0,), (3, 0, 2), (1, 1, 5), (600, 40)]


@pytest.mark.parametrize("layout", LAYOUTS | BROADCAST)
@TYPES
@CLASSES
def test_memory_order(cls, options, dtype, layout):
    """Of parameter and gradient: the same bits as in C order, stored or passed; and gradients are not written."""
    if cls is RowwiseAdagrad:
        pytest.skip("its tables lie in C order")
    spread = (LAYOUTS | BROADCAST)[layout]
    starts = [random(s, dtype, i) for i, s in enumerate(SHAPES)]
    reference = cls([x.copy() for x in starts], **options)
    opts = [cls([LAYOUTS[order](x.copy()) for x in starts], **options) for order in DENSE]
    strides = [[p.data.strides for p in params_of(opt)] for opt in opts]
    for step in range(2):
        grads = [spread(random(s, dtype, 20 * step + i)) for i, s in enumerate(SHAPES)]
        assert [g.shape for g in grads] == SHAPES
        kept = [np.array(g, order="C") for g in grads]
        reference.step(grads=kept)
        for opt in opts:
            if step:
                for p, g in zip(params_of(opt), grads, strict=True):
                    p.grad = g
                opt.step()
            else:
                opt.step(grads=grads)
            assert values(opt) == values(reference)
        assert [bits(g) for g in grads] == [bits(np.array(g)) for g in kept]
    assert [[p.data.strides for p in params_of(opt)] for opt in opts] == strides


@CLASSES
def test_neighbours_are_not_touched(cls, options):
    big = random((9, 50))
    before = big.copy()
    opt = cls([big[2:4], big[6, 3:20]], **options)
    for _ in range(2):  # ADOPT moves in the second
        opt.step(grads=[np.ones((2, 50), np.float32), np.ones(17, np.float32)])
    mask = np.zeros(big.shape, bool)
    mask[2:4] = mask[6, 3:20] = True
    assert ((big != before) == mask).all()


# Gradients that lie in the memory of parameters or state, of a square matrix `p` and `q` side by side in `memory`.
ALIASES = {
    "itself": lambda p, q, memory, state: (p, q),
    "each other": lambda p, q, memory, state: (q, p),
    "transposed": lambda p, q, memory, state: (p.T, q.T),
    "reversed": lambda p, q, memory, state: (p[::-1, ::-1], q[::-1]),
    "shifted up": lambda p, q, memory, state: (memory[1 : 1 + p.size].reshape(p.shape), None),
    "shifted down": lambda p, q, memory, state: (None, memory[p.size - 1 : -1].reshape(q.shape)),
    "far shifted": lambda p, q, memory, state: (memory[p.size // 2 :][: p.size].reshape(p.shape),) * 2,
    "broadcast": lambda p, q, memory, state: (np.broadcast_to(p[0], p.shape), np.broadcast_to(p[:, :1], p.shape)),
    "the same for both": lambda p, q, memory, state: (q, q),
    "state of one": lambda p, q, memory, state: (state(0), state(0)),
    "state of each other": lambda p, q, memory, state: (state(1), state(0)),
    "state transposed": lambda p, q, memory, state: (state(0).T, state(1)[::-1]),
}


# The state of a user's own rule is the rule's own affair, and one with a number per row has no gradient's shape.
OTHERS = (Own, RowwiseAdagrad)
ALIASED = [(*c.values, k) for c in ONE.values() for k in ALIASES if not (c.values[0] in OTHERS and "state" in k)]


@TYPES
@pytest.mark.parametrize("cls, options, kind", ALIASED, ids=[f"{c.__name__}-{k}" for c, _, k in ALIASED])
def test_gradient_in_the_memory_of_what_is_written(cls, options, dtype, kind):
    """Gives what a copy of it gives."""
    for n in 3, 130:  # of one small chunk, and of several
        results = []
        for copies in (False, True):
            memory = random(2 * n * n, dtype)
            p, q = (Parameter(half.reshape(n, n)) for half in np.split(memory, 2))
            opt = cls([p, q], **options)
            opt.step(grads=[random((n, n), dtype, 1), random((n, n), dtype, 2)])

            def state(i, opt=opt, params=(p, q)):
                return next(v for v in opt.state[params[i]].values() if isinstance(v, np.ndarray))

            for step in range(3):
                grads = ALIASES[kind](p.data, q.data, memory, state)
                if copies:
                    grads = [None if g is None else g.copy() for g in grads]
                if step == 2:
                    p.grad, q.grad = grads
                    opt.step()
                else:
                    opt.step(grads=grads)
            results.append(values(opt))
        assert results[0] == results[1]


class Bare:
    """An array by __array__ and nothing else."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


class Described(Bare):
    """As most array libraries have it."""

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)


class Sub(np.ndarray):
    pass


@pytest.mark.parametrize("wrap", [Bare, Described, lambda a: a.view(Sub)], ids=["Bare", "Described", "subclass"])
@TYPES
@CLASSES
def test_gradient_that_is_no_plain_ndarray(cls, options, dtype, wrap):
    opt, params = make(cls, options, dtype)
    twin, _ = make(cls, options, dtype)
    for step in range(2):
        grads = [random(p.data.shape, dtype, 10 * step + i) for i, p in enumerate(params)]
        kept = [g.copy() for g in grads]
        wrapped = [wrap(g) for g in grads]
        if step:
            for p, g in zip(params, wrapped, strict=True):
                p.grad = g
            opt.step()
            assert all(p.grad is g for p, g in zip(params, wrapped, strict=True))
        else:
            opt.step(grads=wrapped)
        twin.step(grads=kept)
        assert values(opt) == values(twin)
        assert [bits(g) for g in grads] == [bits(g) for g in kept]


def test_wrong_gradient_that_is_no_ndarray():
    opt, _ = make(Adam, steps=1)
    before = values(opt)
    for wrap in Bare, Described:
        for g, error in [(np.ones(5), TypeError), (np.ones(4, np.float32), ValueError)]:
            with pytest.raises(error, match="parameter 2"):
                opt.step(grads=[None, None, wrap(g)])
    assert values(opt) == before


@TYPES
def test_numpy_scalar_as_gradient(dtype):
    """What NumPy's sums give is a scalar, no 0-dim array."""
    opt, params = make(Adam, {}, dtype)
    twin, _ = make(Adam, {}, dtype)
    scalar = random(9, dtype).sum()
    opt.step(grads=[None, scalar, None])
    twin.step(grads=[None, np.array(scalar), None])
    params[1].grad = scalar
    opt.step()
    twin.step(grads=[params[0].grad, np.array(scalar), params[2].grad])
    assert values(opt) == values(twin)


@pytest.mark.parametrize("layout", ["C", "F", "strided", "reversed", "broadcast rows", "misaligned", "Bare"])
@CLASSES
def test_no_reference_to_a_gradient_is_kept(cls, options, layout):
    opt, (p, *_) = make(cls, options)
    spread = (LAYOUTS | BROADCAST | {"Bare": Bare})[layout]
    gc.disable()  # no cycle may hold it either
    try:
        for stored in False, True, False:
            array = np.array(random((3, 4)))
            g = spread(array)
            g = g if g is not array else array.view()
            refs = [weakref.ref(g), weakref.ref(array)]
            if stored:
                p.grad = g
                opt.step()
                p.grad = None
            else:
                opt.step(grads=[g, None, None])
            del g, array
            assert [ref() for ref in refs] == [None, None]
        p.grad = g = random((3, 4))
        count = sys.getrefcount(g)
        for _ in range(2):
            opt.step()
            opt.state_dict()
            assert sys.getrefcount(g) == count
    finally:
        gc.enable()


def test_no_reference_is_kept_by_a_failed_step():
    opt, (p, _, r) = make()
    p.grad, r.grad = g, bad = random((3, 4)), random(4)
    refs = weakref.ref(g), weakref.ref(bad)
    with pytest.raises(ValueError):
        opt.step()
    p.grad = r.grad = None
    del g, bad
    assert [ref() for ref in refs] == [None, None]
