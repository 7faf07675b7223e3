"""Flattened parameters are stepped as one block, with the bits of the steps one by one, whatever is done in between."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from pyopt.averaging import EMA
from test_torch_interruption import ByCall, every_point, interrupted
from torch_or_skip import bits, new, optim, torch

from torch.utils.flop_counter import FlopCounterMode  # isort: skip

from pyopt.torch._flat import member_of  # isort: skip

SHAPES = [(64,), (3, 5), (), (1,), (7, 1, 2), (0, 3), (33,)]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.1, "amsgrad": True}),
    ("AdamW", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5}),
    ("RMSprop", {"lr": 0.1, "momentum": 0.5, "centered": True}),
    ("RAdam", {"lr": 0.1}),
    ("Rprop", {"lr": 0.1}),
    ("Lion", {"lr": 0.1}),
    ("Adan", {"lr": 0.1}),
]


def parameters(dtype: Any) -> list[Any]:
    params = [torch.nn.Parameter(new(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(SHAPES)]
    params.append(torch.nn.Parameter(new(5, 4, dtype=dtype, seed=50).t()))  # in another memory order
    return params


def fill(params: list[Any], seed: int) -> None:
    for i, p in enumerate(params):
        g = new(*p.shape, dtype=p.dtype, seed=100 * seed + i)
        if p.grad is None:
            p.grad = g
        else:
            with torch.no_grad():
                p.grad.copy_(g)


def blocks(optimizer: Any) -> int:
    """How many blocks have state of their own."""
    state = optimizer.state
    return sum(dict.get(state, flat.block) is not None for flat in getattr(state, "flats", []))


class Pair:
    """An optimizer whose parameters are flattened, and one whose are not; the same is done to both."""

    def __init__(self, name: str, options: dict[str, Any], dtypes: tuple[Any, ...] = (torch.float32,)) -> None:
        self.seed = 0
        self.optimizers = []
        for flat in (True, False):
            params = [p for dtype in dtypes for p in parameters(dtype)]
            if flat:
                optim.flatten(params)
            else:
                for p in params:
                    p.grad = torch.zeros_like(p)
            self.optimizers.append(getattr(optim, name)(params, **options))

    def params(self, i: int) -> list[Any]:
        return [p for group in self.optimizers[i].param_groups for p in group["params"]]

    def step(self, times: int = 1, **how: Any) -> None:
        for _ in range(times):
            self.seed += 1
            for i, optimizer in enumerate(self.optimizers):
                fill(self.params(i), self.seed)
                optimizer.step(**how)

    def check(self) -> None:
        states = []
        for i, optimizer in enumerate(self.optimizers):
            found = []
            for p in self.params(i):
                values = {name: bits(value).tolist() for name, value in optimizer.state[p].items() if value is not None}
                found.append((bits(p).tolist(), values))
            states.append(found)
        assert states[0] == states[1]


@pytest.mark.parametrize("name, options", CASES)
def test_has_the_bits_of_the_steps_one_by_one(name: str, options: dict[str, Any]) -> None:
    pair = Pair(name, options, (torch.float32, torch.float64))
    pair.step(3)
    assert blocks(pair.optimizers[0]) == (0 if options == {"lr": 0.1} and name == "SGD" else 2)
    pair.check()
    pair.step(3)
    assert blocks(pair.optimizers[0]) == (0 if options == {"lr": 0.1} and name == "SGD" else 2)
    pair.check()


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Adagrad"])
@pytest.mark.parametrize(
    "stored, are_blocks",
    [
        ({}, True),
        ({"state_dtype": "float32"}, True),
        ({"master": "split"}, True),
        ({"master": "kahan"}, True),
        ({"rounding": "stochastic"}, False),
        ({"state_dtype": "8bit"}, False),
    ],
    ids=str,
)
def test_short_types_have_the_bits_of_the_steps_one_by_one(name: str, stored: Any, are_blocks: bool) -> None:
    if name == "Adagrad" and stored.get("state_dtype") == "8bit":
        pytest.skip("which it has not")
    dtypes = (torch.bfloat16, torch.float32, *(() if stored.get("master") == "split" else (torch.float16,)))
    pair = Pair(name, {"lr": 0.1, **stored}, dtypes)
    for i, average in enumerate((False, False, True, True)):
        if average and i == 2:
            for optimizer in pair.optimizers:
                optimizer.kept = EMA(optimizer, 0.9)
        pair.step(2, max_norm=1.0)
        assert blocks(pair.optimizers[0]) == (len(dtypes) if are_blocks and not average else 0)
        pair.check()
    ours, theirs = (o.kept.arrays.values() for o in pair.optimizers)
    for a, b, p in zip(ours, theirs, pair.params(0), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
        assert p.numel() == 0 or not torch.equal(a, p.float())
    for i, optimizer in enumerate(list(pair.optimizers)):
        pair.optimizers[i] = getattr(optim, name)(pair.params(i), lr=0.1)
        pair.optimizers[i].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pair.step(2)
    assert blocks(pair.optimizers[0]) == (len(dtypes) if are_blocks else 0)
    pair.check()


def test_norm_of_flattened_gradients_beside_short_ones() -> None:
    """Those that are not flattened are summed in their own type."""
    found = []
    for flat in (True, False):
        params = parameters(torch.float32)
        if flat:
            optim.flatten(params)
        params.append(torch.nn.Parameter(new(4000, dtype=torch.bfloat16)))
        fill(params, 1)
        optim.SGD(params, lr=1.0).step(max_norm=0.5)
        found.append([bits(p).tolist() for p in params])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["LAMB", "LARS", "Prodigy", "NAdam", "ASGD", "AdamWScheduleFree"])
def test_rules_with_numbers_per_tensor_go_one_by_one(name: str) -> None:
    pair = Pair(name, {})
    pair.step(3)
    pair.check()


# What comes between steps; each is done to the optimizers of a pair.
def replaced_gradient(o: Any, params: list[Any]) -> None:
    params[1].grad = new(*params[1].shape, seed=7)


def no_gradient(o: Any, params: list[Any]) -> None:
    params[0].grad = None
    params[2].grad = None


def moved(o: Any, params: list[Any]) -> None:
    params[1].data = params[1].data.clone()


def negated(o: Any, params: list[Any]) -> None:
    params[1].data = torch._neg_view(params[1].data)


def negated_gradient(o: Any, params: list[Any]) -> None:
    params[1].grad.data = torch._neg_view(params[1].grad.data)


def transposed(o: Any, params: list[Any]) -> None:
    params[1].data = params[1].data.as_strided((3, 5), (1, 3), params[1].storage_offset())


def reordered(o: Any, params: list[Any]) -> None:
    o.param_groups[0]["params"].reverse()


def split(o: Any, params: list[Any]) -> None:
    taken = o.param_groups[0]["params"].pop(3)
    o.add_param_group({"params": [taken], "lr": 0.01})


def added(o: Any, params: list[Any]) -> None:
    p = torch.nn.Parameter(new(6, seed=9))
    o.add_param_group({"params": [p]})


def state_kept(o: Any, params: list[Any]) -> None:
    o.kept = o.state[params[0]]


def state_dict_kept(o: Any, params: list[Any]) -> None:
    o.kept = o.state_dict()


def state_kept_and_changed(o: Any, params: list[Any]) -> None:
    o.kept = o.state[params[0]]["exp_avg"]
    o.kept.mul_(2)


def array_of_state_kept(o: Any, params: list[Any]) -> None:
    o.kept = o.state[params[1]]["exp_avg"].numpy()


def view_of_state_kept(o: Any, params: list[Any]) -> None:
    o.kept = o.state[params[1]]["exp_avg"].view(-1)


def state_replaced(o: Any, params: list[Any]) -> None:
    o.state[params[1]]["exp_avg"] = torch.ones_like(params[1])


def state_dropped(o: Any, params: list[Any]) -> None:
    del o.state[params[1]]


def own_entry(o: Any, params: list[Any]) -> None:
    o.state[params[1]]["own"] = "mine"
    assert o.state[params[1]]["own"] == "mine"
    del o.state[params[1]]["own"]


def loaded(o: Any, params: list[Any]) -> None:
    o.load_state_dict(copy.deepcopy(o.state_dict()))


def unflattened(o: Any, params: list[Any]) -> None:
    optim.unflatten(params)


def flattened_again(o: Any, params: list[Any]) -> None:
    if hasattr(o.state, "flats"):
        optim.unflatten(params)
        optim.flatten(params)


def averaged(o: Any, params: list[Any]) -> None:
    o.kept = EMA(o, 0.9)


def zeroed(o: Any, params: list[Any]) -> None:
    o.zero_grad()
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad


def other_lr(o: Any, params: list[Any]) -> None:
    o.param_groups[0]["lr"] = torch.tensor(0.01)


DISTURBANCES = [
    *(replaced_gradient, no_gradient, moved, negated, negated_gradient, transposed, reordered, split, added),
    *(array_of_state_kept, view_of_state_kept),
    *(state_kept, state_dict_kept, state_kept_and_changed, state_replaced, state_dropped, own_entry, loaded),
    *(unflattened, flattened_again, averaged, zeroed, other_lr),
]


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_stays_right_whatever_comes_between(disturb: Callable[..., None], before: int) -> None:
    pair = Pair("Adam", {"lr": 0.1})
    pair.step(before)
    if (before == 0 and "state" in disturb.__name__) or (disturb is own_entry and before == 0):
        pair.step()
    for i, optimizer in enumerate(pair.optimizers):
        disturb(optimizer, pair.params(i))
    for optimizer in pair.optimizers:  # with the gradients as they are
        optimizer.step()
    pair.check()
    pair.step(3)
    pair.check()


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.permutations([no_gradient, state_kept, loaded, split, zeroed], 2))
)
def test_two_disturbances(first: Callable[..., None], second: Callable[..., None]) -> None:
    pair = Pair("AdamW", {"lr": 0.1})
    pair.step()
    for disturb in (first, second):
        for i, optimizer in enumerate(pair.optimizers):
            disturb(optimizer, pair.params(i))
        for optimizer in pair.optimizers:
            optimizer.step()
        pair.check()
    pair.step(2)
    pair.check()


@pytest.mark.parametrize(
    "how",
    [
        {"max_norm": 0.5},
        {"max_norm": 0.5, "nonfinite": "skip"},
        {"nonfinite": "raise"},
        {"zero_grad": True},
        {"zero_grad": "set_to_none"},
        {"gradient_factor": 0.25},
    ],
)
def test_what_a_step_is_asked_for(how: dict[str, Any]) -> None:
    pair = Pair("Adam", {"lr": 0.1}, (torch.float32, torch.float64))
    pair.step(3, **how)
    first, second = pair.optimizers
    assert first.last_grad_norm == second.last_grad_norm
    if how.get("zero_grad"):
        assert not any(p.grad.any() for p in pair.params(0))
    pair.check()


def test_nan_is_named_by_its_parameter() -> None:
    pair = Pair("Adam", {"lr": 0.1})
    for i, optimizer in enumerate(pair.optimizers):
        pair.params(i)[3].grad.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"parameter 3"):
            optimizer.step(nonfinite="raise")


def test_backward_adds_to_the_block_and_zero_grad_clears_it() -> None:
    layers = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(5)])
    twin = copy.deepcopy(layers)
    optim.flatten(layers.named_parameters())
    optimizers = [optim.Adam(layers.parameters(), lr=0.1), optim.Adam(twin.parameters(), lr=0.1)]
    views = [p.grad for p in layers.parameters()]
    for k in range(4):
        for model, optimizer in zip((layers, twin), optimizers, strict=True):
            optimizer.zero_grad()
            model(new(2, 4, seed=k)).square().sum().backward()
            optimizer.step()
        assert all(p.grad is view for p, view in zip(layers.parameters(), views, strict=True))
    assert blocks(optimizers[0]) == 1
    for p, q in zip(layers.parameters(), twin.parameters(), strict=True):
        assert torch.equal(bits(p), bits(q))
    layers.zero_grad()  # torch's sets them to None
    assert optimizers[0].zero_grad() is None
    assert all(p.grad is view for p, view in zip(layers.parameters(), views, strict=True))


def test_a_stale_graph_raises() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optim.flatten(params)
    optimizer = optim.SGD(params, lr=0.1)
    loss = (params[1] ** 2).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_have_state_by_parameter(copied: Callable[[Any], Any]) -> None:
    pair = Pair("Adam", {"lr": 0.1})
    pair.step(2)
    twin = copied(pair.optimizers[0])
    assert type(twin.state).__name__ == "defaultdict" and len(twin.state) == len(SHAPES) + 1
    pair.optimizers[0] = twin
    pair.step(2)
    pair.check()


@pytest.mark.parametrize("keep", [array_of_state_kept, view_of_state_kept, state_kept])
def test_what_is_kept_of_the_state_follows_the_steps(keep: Callable[..., None]) -> None:
    pair = Pair("Adam", {"lr": 0.1})
    pair.step(2)
    optimizer, params = pair.optimizers[0], pair.params(0)
    keep(optimizer, params)
    kept = optimizer.kept["exp_avg"] if keep is state_kept else optimizer.kept
    before = kept.tolist()
    pair.step(2)
    assert kept.tolist() != before
    del kept, optimizer.kept
    pair.step(2)
    assert blocks(optimizer) == 1
    pair.check()


def test_looks_like_state_by_parameter() -> None:
    pair = Pair("Adam", {"lr": 0.1})
    pair.step()
    state, params = pair.optimizers[0].state, pair.params(0)
    for look in (len, list, dict, lambda s: list(s.values()), lambda s: params[0] in s, lambda s: s.get(params[0])):
        pair.step()
        assert blocks(pair.optimizers[0]) == 1
        assert look(state)
        assert len(state) == len(params)
    sizes = {value.numel() for entry in state.values() for value in entry.values()}
    assert max(sizes) == 64, "views of the parameters' sizes"


def test_memory_goes_with_the_parameters() -> None:
    params = parameters(torch.float32)
    optim.flatten(params)
    place = member_of(params[0])
    assert place is not None
    del params[0]
    assert member_of(params[1]) is None, "one of them is gone"


def test_every_interruption_leaves_all_or_nothing() -> None:
    def make() -> Any:
        params = [torch.nn.Parameter(new(5, seed=i)) for i in range(3)]
        optim.flatten(params)
        optimizer = optim.Adam(params, lr=0.1)
        fill(params, 1)
        optimizer.step()
        fill(params, 2)
        return optimizer

    assert every_point(make, lambda optimizer, n: interrupted(optimizer, ByCall(n))) > 10
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([torch.ones(3)], TypeError, r"params\[0\] is a Tensor, must be a torch.nn.Parameter"),
        ([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))], ValueError, "must be dense and on the CPU, of"),
        ([torch.nn.Parameter(torch.ones(3))] * 2, ValueError, "stands in the list twice"),
    ],
)
def test_what_cannot_be_flattened(params: list[Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        optim.flatten(params)


def test_parameters_that_share_memory_stay() -> None:
    memory = torch.ones(6)
    params = [torch.nn.Parameter(memory[:4]), torch.nn.Parameter(memory[2:])]
    with pytest.raises(ValueError, match="share memory"):
        optim.flatten(params)
    assert params[0].data_ptr() == memory.data_ptr()


def test_zero_grad_leaves_the_gradients_of_another_optimizer() -> None:
    params = [torch.nn.Parameter(new(3, seed=i)) for i in range(4)]
    optim.flatten(params)
    first, second = optim.SGD(params[:2], lr=0.1), optim.SGD(params[2:], lr=0.1)
    fill(params, 1)
    expected = [p.grad.clone() for p in params[2:]]
    first.zero_grad()
    assert not any(p.grad.any() for p in params[:2])
    assert all(torch.equal(p.grad, g) for p, g in zip(params[2:], expected, strict=True))
    second.zero_grad()
    assert not any(p.grad.any() for p in params)


def test_frozen_parameters_stay() -> None:
    params = [torch.nn.Parameter(new(3, seed=i)) for i in range(4)]
    params[1].requires_grad_(False)
    memory = params[1].data_ptr()
    optim.flatten(params)
    assert params[1].grad is None and params[1].data_ptr() == memory
    optimizer = optim.AdamW(params, lr=0.1, weight_decay=0.1)
    fill([params[0], *params[2:]], 1)
    optimizer.step()
    params[2].requires_grad_(False)  # in the middle of a run
    optimizer.zero_grad()
    assert [p.grad is None for p in params] == [False, True, True, False]
    frozen = [params[1].clone(), params[2].clone()]
    optimizer.step()
    assert torch.equal(params[1], frozen[0]) and torch.equal(params[2], frozen[1])
    params[2].requires_grad_(True)
    optimizer.zero_grad()
    assert not params[2].grad.any()


@pytest.mark.parametrize("how", ["double", "bfloat16"])
def test_a_model_of_another_type_is_zeroed_and_stepped(how: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    optim.flatten(model.parameters())
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fill(list(model.parameters()), 1)
    getattr(model, how)()  # p.data and p.grad.data are replaced under the same objects
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    model(torch.ones(1, 3, dtype=model[0].weight.dtype)).sum().backward()
    optimizer.step()
    assert model[1].bias.grad.tolist() == [1, 1]


def test_parameters_that_must_be_left_to_torch_go_one_by_one() -> None:
    pair = Pair("Adam", {"lr": 0.1})
    for i, optimizer in enumerate(pair.optimizers):
        shares = torch.nn.Parameter(pair.params(i)[0].data)
        optimizer.add_param_group({"params": [shares]})
    pair.step(3)
    pair.check()


def test_a_step_that_a_dispatch_mode_follows() -> None:
    pair = Pair("Adam", {"lr": 0.1})
    pair.step(2)
    with FlopCounterMode(display=False):
        pair.step()
    pair.step(2)
    pair.check()


def test_chance_follows_from_the_place_among_the_parameters() -> None:
    pair = Pair("Adam", {"lr": 0.1})
    for optimizer in pair.optimizers:
        short = torch.nn.Parameter(new(64).bfloat16())
        optimizer.add_param_group({"params": [short], "rounding": "stochastic"})
    pair.step(3)
    assert blocks(pair.optimizers[0]) == 1
    pair.check()


def test_each_parameter_has_a_storage_of_its_own() -> None:
    """accelerate and others take parameters of one storage for tied ones, and save but one of them."""
    params = parameters(torch.float32)
    optim.flatten(params)
    storages = [p.untyped_storage() for p in params]
    assert [s.nbytes() for s in storages] == [4 * p.numel() for p in params]
    assert len({s.data_ptr() for s in storages if s.nbytes()}) == len([p for p in params if p.numel()])


def test_flattened_in_any_mode() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    with torch.inference_mode(), torch.device("meta"):
        optim.flatten(params)
    assert not params[0].is_inference() and not params[0].grad.is_inference() and params[0].grad.tolist() == [0, 0, 0]
    with torch.inference_mode():
        optim.unflatten(params)
    assert not params[0].is_inference() and not params[0].grad.is_inference()


def test_blocks_that_are_left_go_at_once() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    gc.disable()
    try:
        optim.flatten(params)
        block = weakref.ref(member_of(params[0])[0].block)
        optim.flatten(params)
        assert block() is None
        block = weakref.ref(member_of(params[0])[0].block)
        optim.unflatten(params)
        assert block() is None
        torch.utils.swap_tensors(*params)  # raises where there are weak references
    finally:
        gc.enable()
