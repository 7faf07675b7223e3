"""Rules with numbers that follow from sums over whole tensors: what the table of cases does not reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pyopt
import reference
from cases import BRIEF, DTYPES, Case, assert_same_bits, gradients, parameters
from pyopt._engine import set_parallel_cost

SUMS = [case for case in BRIEF if case.sums]
each = pytest.mark.parametrize("case", SUMS, ids=str)


@pytest.fixture
def always_shared() -> Iterator[None]:
    set_parallel_cost(0)
    yield
    set_parallel_cost(-1)


@pytest.mark.usefixtures("always_shared")
@pytest.mark.parametrize("dtype", DTYPES)
@each
def test_bits_on_any_number_of_threads(case: Case, dtype: type) -> None:
    """Every size around a block, with cuts of the work anywhere: the bits are those of the oracle."""
    shapes = [(n,) for n in (0, 1, 5, 1023, 1024, 1025, 2047, 2049, 3500, 0, 5120)]
    for threads in (1, 2, 3, 5, 8):
        params = parameters(shapes, dtype)
        optimizer = case.optimizer(params, **case.options)
        expected: list[Any] = [(p.data.copy(), {}) for p in params]
        rng = np.random.default_rng(1)
        with pyopt.num_threads(threads):
            for _ in range(3):
                grads = gradients(params, rng)
                expected, _ = case.step(expected, grads, optimizer.param_groups[0])
                optimizer.step(grads=grads)
        for p, (data, _) in zip(params, expected, strict=True):
            assert_same_bits(p.data, data, f"{case} on {threads} threads, {p.data.shape}")


@each
def test_memory_order_is_the_order_of_the_sum(case: Case) -> None:
    """As every element by itself: an array in Fortran's order has the bits of its transpose in C's."""
    data = np.asfortranarray(np.random.default_rng(0).standard_normal((70, 31)).astype(np.float32))
    one, other = pyopt.Parameter(data.copy("K")), pyopt.Parameter(data.T.copy())
    for p, turn in ((one, lambda g: np.asfortranarray(g)), (other, lambda g: g.T)):
        optimizer = case.optimizer([p], **case.options)
        rng = np.random.default_rng(2)
        for _ in range(3):
            optimizer.step(grads=[turn(rng.standard_normal((70, 31)).astype(np.float32))])
    assert_same_bits(one.data, np.asfortranarray(other.data.T), str(case))


@each
def test_float_modes_of_the_thread_do_not_matter(case: Case) -> None:
    """Sums over denormals: flushed in the mode of pyopt alone, in both passes and between them."""
    tiny = np.full(3000, 1e-42, np.float32)
    results = []
    for flush in (False, True, False):
        p = pyopt.Parameter(tiny.copy())
        optimizer = case.optimizer([p], **case.options)
        try:
            pyopt.set_flush_denormal(flush)
            optimizer.step(grads=[tiny])
        finally:
            pyopt.set_flush_denormal(False)
        results.append(p.data)
    assert_same_bits(results[0], results[2], str(case))
    ((data, _),) = case.step([(tiny, {})], [tiny], case.optimizer([tiny], **case.options).param_groups[0])[0]
    assert_same_bits(results[0], data, str(case))


@pytest.mark.parametrize("optimizer", [pyopt.LAMB, pyopt.LARS])
@pytest.mark.parametrize("zero", ["parameter", "gradient", "both"])
def test_a_norm_of_zero(optimizer: type[pyopt.Optimizer], zero: str) -> None:
    """The ratio is 1: the step is that of a group without."""
    ps = [pyopt.Parameter(np.ones(5)) for _ in range(2)]
    g = np.linspace(-1, 1, 5)
    if zero != "gradient":
        for p in ps:
            p.data[:] = 0
    if zero != "parameter":
        g[:] = 0
    optimizer([{"params": ps[:1]}, {"params": ps[1:], "trust_ratio": False}], lr=0.1).step(grads=[g, g])
    assert_same_bits(ps[0].data, ps[1].data, zero)
    assert np.isfinite(ps[0].data).all()


def test_groups_with_and_without_in_one_step() -> None:
    """Each of an Adam's groups takes the rule that its options ask for, also where they change later."""
    params = parameters([5000, 7, 3000, (40, 60)], np.float32)
    groups: list[Any] = [
        {"params": params[:2]},
        {"params": params[2:3], "update_clip": True},
        {"params": params[3:], "cautious": True, "amsgrad": True},
    ]
    optimizer = pyopt.Adam(groups, lr=0.1)
    expected: list[Any] = [(p.data.copy(), {}) for p in params]
    rng = np.random.default_rng(3)
    for step in range(6):
        if step == 3:
            optimizer.param_groups[0]["update_clip"] = True
            optimizer.param_groups[1]["update_clip"] = False
        grads = gradients(params, rng)
        of = [group for group in optimizer.param_groups for _ in group["params"]]
        expected = [reference.adam(p, g, s, h) for (p, s), g, h in zip(expected, grads, of, strict=True)]
        optimizer.step(grads=grads)
        for p, (data, _) in zip(params, expected, strict=True):
            assert_same_bits(p.data, data, f"step {step}")


def test_a_trust_ratio_beyond_float32() -> None:
    """It shows, as in any arithmetic of float32."""
    p = pyopt.Parameter(np.full(3, 1e30, np.float32))
    pyopt.LARS([p], lr=1e6, trust_coefficient=1.0).step(grads=[np.full(3, 1e-10, np.float32)])
    assert not np.isfinite(p.data).any()


# --- Prodigy ----------------------------------------------------------------------------------------------------------


def prodigy(params: list[pyopt.Parameter], **options: Any) -> pyopt.Prodigy:
    groups: list[Any] = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5, "weight_decay": 0.1}]
    return pyopt.Prodigy(groups, d0=1e-3, **options)


def test_one_d_for_all_groups_and_types() -> None:
    params = [*parameters([3000, 7], np.float32), *parameters([(40, 60)], np.float64)]
    optimizer = prodigy(params)
    expected: list[Any] = [(p.data.copy(), {}) for p in params]
    rng = np.random.default_rng(3)
    for _ in range(8):
        grads = [(p.data * rng.uniform(0.5, 2, p.data.shape)).astype(p.data.dtype) for p in params]
        groups = [group for group in optimizer.param_groups for _ in group["params"]]
        expected, shared = reference.prodigy(expected, grads, groups)
        optimizer.step(grads=grads)
        for group in optimizer.param_groups:
            assert {name: group[name] for name in shared} == shared
        for p, (data, _) in zip(params, expected, strict=True):
            assert_same_bits(p.data, data, "Prodigy")
    assert optimizer.param_groups[0]["d"] > 1e-3


def test_d_without_gradients_and_of_zero_gradients() -> None:
    params = parameters([5, 3], np.float32)
    optimizer = prodigy(params)
    optimizer.step()
    optimizer.step(grads=[np.zeros_like(p.data) for p in params])
    assert [group["d"] for group in optimizer.param_groups] == [1e-3, 1e-3]


def test_a_group_that_comes_later_has_the_d_of_the_others() -> None:
    params = parameters([50, 30, 20], np.float32)
    optimizer = prodigy(params[:2])
    for _ in range(5):
        optimizer.step(grads=[p.data.copy() for p in params[:2]])
    optimizer.add_param_group({"params": params[2:]})
    d = optimizer.param_groups[0]["d"]
    assert d > 1e-3 and optimizer.param_groups[2]["d"] == d
    optimizer.step(grads=[p.data.copy() for p in params])
    assert len({group["d"] for group in optimizer.param_groups}) == 1
    first = pyopt.Prodigy([{"params": params[:1], "d0": 0.5}])
    assert first.param_groups[0]["d"] == 0.5


@pytest.mark.parametrize("name, value", [("d0", 0.5), ("d_coef", 2.0), ("beta3", 0.1), ("d", 3.0)])
def test_what_d_is_made_with_is_the_same_in_all_groups(name: str, value: float) -> None:
    params = parameters([5, 3], np.float32)
    optimizer = prodigy(params)
    optimizer.param_groups[1][name] = value
    before = [p.data.copy() for p in params]
    with pytest.raises(ValueError, match=f"{name} == {value} in a group, must be .* as in the first one"):
        optimizer.step(grads=before)
    for p, data in zip(params, before, strict=True):
        assert_same_bits(p.data, data, name)
    assert optimizer.param_groups[0]["d"] == 1e-3 and not any(optimizer.state.values())


def test_a_nan_in_d_is_named() -> None:
    p = pyopt.Parameter(np.ones(3))
    optimizer = pyopt.Prodigy([p])
    optimizer.step(grads=[np.full(3, np.nan)])
    assert np.isnan(p.data).all()
    with pytest.raises(ValueError, match="d == nan, must be finite"):
        optimizer.step(grads=[np.ones(3)])


def test_d_goes_through_checkpoints() -> None:
    params, others = (parameters([50, 30], np.float32) for _ in range(2))
    one, other = prodigy(params), prodigy(others)
    for _ in range(5):
        one.step(grads=[p.data.copy() for p in params])
    for p, q in zip(params, others, strict=True):
        q.data[...] = p.data
    other.load_state_dict(one.state_dict())
    for optimizer, ps in ((one, params), (other, others)):
        for _ in range(5):
            optimizer.step(grads=[p.data.copy() for p in ps])
    assert one.param_groups[0]["d"] == other.param_groups[0]["d"] > 1e-3
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.data, q.data, "loaded")


def test_a_failing_step_leaves_d_alone() -> None:
    params = parameters([5, 3], np.float32)
    optimizer = prodigy(params)
    optimizer.step(grads=[p.data.copy() for p in params])
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="parameter 1"):
        optimizer.step(grads=[params[0].data.copy(), np.ones(4, np.float32)])
    assert str(optimizer.state_dict()) == str(before)
