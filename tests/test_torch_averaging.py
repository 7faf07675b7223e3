"""pyopt.averaging on tensors: the formula in bits, float32 averages of short types, and torch's AveragedModel."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyopt
from apart import apart
from extras import Beside
from test_averaging import KIND_IDS, KINDS, attach, brief_kinds, kinds
from test_torch_interruption import ByCall, interrupted
from torch_extras import (
    LEFT_TO_TORCH,
    alike,
    arrays,
    as_array,
    average_numbers,
    every_dtype,
    few,
    gradient_bits,
    numbers,
    raw,
    set_gradients,
)
from torch_or_skip import new, optim, parameters, torch

swa_utils = torch.optim.swa_utils
three = pytest.mark.parametrize("kind, settings", [KINDS[i] for i in (1, 6, 8)], ids=[KIND_IDS[i] for i in (1, 6, 8)])


def run(opt: Any, steps: int, *beside: Beside, seed: int = 0, **extras: Any) -> None:
    for step in range(steps):
        set_gradients(opt, seed=seed + step)
        opt.step(**extras)
        for each in beside:
            each.follow(arrays(opt))
            each.check(as_array)


def all_raw(tensors: Any) -> list[Any]:
    return [raw(torch.as_tensor(t)) for t in tensors]


# --- what they are ----------------------------------------------------------------------------------------------------


@every_dtype
def test_averages_in_the_step_are_those_after_it(name: str, options: Any, dtype: Any) -> None:
    ours, plain = alike(name, options, dtype=dtype)
    beside = [Beside(attach(ours, *KINDS[i]), KINDS[i][0], **KINDS[i][1]) for i in (1, 6, 8)]
    run(ours, 4, *beside)
    run(plain, 4)
    assert numbers(ours) == numbers(plain)


@kinds
@few
def test_every_kind_of_average(name: str, options: Any, kind: str, settings: Any) -> None:
    (opt,) = alike(name, options, 1)
    run(opt, 13, Beside(attach(opt, kind, settings), kind, **settings))


@three
@pytest.mark.parametrize("left", [[kind] for kind in LEFT_TO_TORCH] + [list(LEFT_TO_TORCH)], ids=" ".join)
@pytest.mark.parametrize("name", ["SGD", "Adam", "Lion", "LAMB"])
def test_of_what_is_left_to_torch(name: str, left: list[str], kind: str, settings: Any) -> None:
    """Every parameter has its average, whoever steps it; that of a short type is float32."""
    ours, plain = alike(name, {"lr": 0.1}, left=left)
    average = attach(ours, kind, settings)
    beside = Beside(average, kind, **settings)
    run(ours, 4, beside)
    run(plain, 4)
    assert numbers(ours) == numbers(plain)
    for p, a in zip(parameters(ours), average.averages, strict=True):
        short = p.dtype in (torch.bfloat16, torch.float16)
        assert a.dtype == (torch.float32 if short else p.dtype) and a.shape == p.shape and not a.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_the_first_update_copies_infinities_too(kind: str, dtype: Any) -> None:
    """Of what is left to torch as well (complex numbers)."""
    p = torch.nn.Parameter(torch.tensor([1.0, math.inf, -math.inf], dtype=dtype))
    p.grad = torch.zeros_like(p)
    opt = optim.SGD([p], lr=0.5)
    average = attach(opt, kind, {})
    opt.step()
    assert torch.equal(average.averages[0].to(dtype), p.detach())


@three
def test_of_bfloat16_alone(kind: str, settings: Any) -> None:
    """The average moves where the parameter's own type would lose the change."""
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    opt = optim.SGD([p], lr=2.0**-7)
    average = attach(opt, kind, settings)
    beside = Beside(average, kind, **settings)
    run(opt, 6, beside)
    (a,) = average.averages
    assert a.dtype == torch.float32 and raw(a) != raw(a.bfloat16().float())


@brief_kinds
def test_before_the_first_update(kind: str, settings: Any) -> None:
    (opt,) = alike("Adam", {}, 1, left=["bfloat16"])
    average = attach(opt, kind, settings)
    assert average.n_averaged == 0
    for a, p in zip(average.averages, parameters(opt), strict=True):
        assert isinstance(a, torch.Tensor) and torch.equal(a, p.detach().to(a.dtype))
        assert not a.numel() or a.data_ptr() != p.data_ptr()


@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_against_torchs_averaged_model(decay: float) -> None:
    """torch walks all parameters again; the numbers agree to rounding."""
    models = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (optim.Adam(model.parameters(), lr=0.1) for model in models)
    ema, swa = pyopt.averaging.EMA(ours, decay=decay), pyopt.averaging.SWA(ours)
    torchs = [
        swa_utils.AveragedModel(models[1], multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay)),
        swa_utils.AveragedModel(models[1]),
    ]
    for step in range(20):
        for opt in (ours, theirs):
            set_gradients(opt, seed=step)
            opt.step()
        for averaged in torchs:
            averaged.update_parameters(models[1])
    for average, averaged in zip((ema, swa), torchs, strict=True):
        assert average.n_averaged == averaged.n_averaged == 20
        for a, b in zip(average.averages, averaged.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-13)


def test_the_bits_are_the_numpy_sides() -> None:
    (ours,) = alike("Adam", {"lr": 0.1}, 1, steps=0)
    params = [pyopt.Parameter(as_array(p).copy()) for p in parameters(ours)]
    theirs = pyopt.Adam([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=0.1)
    pairs = [[attach(opt, *KINDS[i]) for opt in (ours, theirs)] for i in (1, 6, 8)]
    for step in range(5):
        set_gradients(ours, seed=step)
        ours.step(max_norm=0.3)
        theirs.step(grads=[as_array(p.grad) for p in parameters(ours)], max_norm=0.3)
        for a, b in pairs:
            assert [as_array(x).tobytes() for x in a.averages] == [x.tobytes() for x in b.averages]


@brief_kinds
def test_a_skipped_step_moves_no_average(kind: str, settings: Any) -> None:
    ours, never = alike("Adam", {"lr": 0.1}, left=["bfloat16"])
    average, other = attach(ours, kind, settings), attach(never, kind, settings)
    for step in range(4):
        parameters(ours)[step].grad.view(-1)[:1] = math.nan
        before = average_numbers(average)
        if parameters(ours)[step].numel():
            ours.step(nonfinite="skip")
            with pytest.raises(ValueError, match="gradient"):
                ours.step(nonfinite="raise")
        assert average_numbers(average) == before
        set_gradients(ours, never, seed=step)
        ours.step(nonfinite="skip", zero_grad=True)
        never.step()
        assert average_numbers(average) == average_numbers(other)


def test_a_group_that_comes_later() -> None:
    (opt,) = alike("Adam", {"lr": 0.1}, 1)
    beside = Beside(pyopt.averaging.EMA(opt, decay=0.9), "EMA", decay=0.9)
    run(opt, 3, beside)
    opt.add_param_group({"params": [torch.nn.Parameter(new(6, 2)), torch.nn.Parameter(new(9, dtype=torch.bfloat16))]})
    run(opt, 4, beside, seed=9)
    assert beside.average.averages[-1].dtype == torch.float32


# --- swapped ----------------------------------------------------------------------------------------------------------


@three
@few
def test_swapped(name: str, options: Any, kind: str, settings: Any) -> None:
    """In place and back, in bits, of short types too; inside the parameters are the averages in their own type."""
    left = list(LEFT_TO_TORCH) if name != "Adafactor" else []
    left = [each for each in left if each != "shared memory"]
    ours, plain = alike(name, options, left=left)
    average, other = attach(ours, kind, settings), attach(plain, kind, settings)
    run(ours, 3)
    run(plain, 3)
    before, averages = (numbers(ours), average_numbers(average)), [a.clone() for a in average.averages]
    pointers = [p.data_ptr() for p in parameters(ours)]
    with average.swapped():
        for p, a, pointer in zip(parameters(ours), averages, pointers, strict=True):
            assert raw(p) == raw(a.to(p.dtype)) and p.data_ptr() == pointer and p.requires_grad
    assert (numbers(ours), average_numbers(average)) == before
    run(ours, 2, seed=5)
    run(plain, 2, seed=5)
    assert numbers(ours) == numbers(plain) and average_numbers(average) == average_numbers(other)


def test_a_model_evaluates_with_the_average() -> None:
    model = torch.nn.Linear(4, 2)
    opt = optim.SGD(model.parameters(), lr=0.1)
    ema = pyopt.averaging.EMA(opt, decay=0.5)
    for step in range(4):
        model(new(8, 4, seed=step)).square().mean().backward()
        opt.step(zero_grad=True)
    x = new(3, 4)
    weight, bias = ema.averages
    expected, trained = x @ weight.T + bias, model(x)
    with ema.swapped(), torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), trained, rtol=0, atol=0)
    loss = model(x).sum()
    with ema.swapped():
        pass
    loss.backward()  # of bias and weights that are what they were: no error of a version is needed, none is forbidden


def test_an_error_and_a_step_inside_swapped() -> None:
    (opt,) = alike("Adam", {"lr": 0.1}, 1, left=["bfloat16"])
    ema = pyopt.averaging.EMA(opt, decay=0.5)
    run(opt, 3)
    before = numbers(opt), average_numbers(ema)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        inside = numbers(opt), gradient_bits(opt)
        for extras in ({}, {"max_norm": 1.0, "nonfinite": "skip", "zero_grad": True}):
            with pytest.raises(RuntimeError, match="swapped"):
                opt.step(**extras)
        assert (numbers(opt), gradient_bits(opt)) == inside
        raise ZeroDivisionError
    assert (numbers(opt), average_numbers(ema)) == before
    run(opt, 1)
    assert ema.n_averaged == 4


# --- states and copies ------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", ["Adam", "LAMB"])
def test_states_go_on_elsewhere(name: str, kind: str, settings: Any) -> None:
    for steps in range(5):
        ours, theirs = alike(name, {"lr": 0.1}, left=["bfloat16"])
        one, other = attach(ours, kind, settings), attach(theirs, kind, settings)
        run(ours, steps)
        run(theirs, 2, seed=50)
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        with torch.no_grad():
            for p, q in zip(parameters(ours), parameters(theirs), strict=True):
                q.copy_(p)
        other.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
        run(ours, 3, seed=7)
        run(theirs, 3, seed=7)
        assert average_numbers(one) == average_numbers(other) and numbers(ours) == numbers(theirs)


def test_states_that_do_not_fit() -> None:
    (opt,) = alike("Adam", {"lr": 0.1}, 1)
    ema = pyopt.averaging.EMA(opt)
    run(opt, 2)
    saved = copy.deepcopy(ema.state_dict())
    for a in saved["averages"]:
        a += 1
    before = average_numbers(ema)
    for bad, words in [
        ({**saved, "kind": "SWA"}, "SWA"),
        ({**saved, "averages": saved["averages"][:-1]}, "4"),
        ({**saved, "averages": [*saved["averages"][:-1], saved["averages"][0]]}, r"parameter 4.*3, 4"),
        ({**saved, "averages": [*saved["averages"][:-1], None]}, "parameter 4"),
        ({**saved, "n_averaged": -1}, "n_averaged == -1, must be"),
    ]:
        with pytest.raises((TypeError, ValueError, KeyError), match=words):
            ema.load_state_dict(bad)
        assert average_numbers(ema) == before


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@brief_kinds
def test_copies(make_copy: Any, kind: str, settings: Any) -> None:
    """A copy steps like the original and leaves its average alone; a copied pair belongs together."""
    (opt,) = alike("Adam", {"lr": 0.1}, 1)
    average = attach(opt, kind, settings)
    run(opt, 2)
    alone, (opt_2, average_2) = make_copy(opt), make_copy((opt, average))
    before = average_numbers(average)
    for each in (alone, opt_2):
        run(each, 3, seed=5)
    assert average_numbers(average) == before
    run(opt, 3, seed=5)
    assert numbers(opt) == numbers(alone) == numbers(opt_2)
    assert average_numbers(average) == average_numbers(average_2)


def test_detach() -> None:
    (opt,) = alike("Adam", {"lr": 0.1}, 1)
    ema = pyopt.averaging.EMA(opt)
    run(opt, 2)
    ema.detach()
    before = average_numbers(ema)
    run(opt, 2, seed=5)
    assert average_numbers(ema) == before


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_of_no_optimizer_of_ours(kind: str) -> None:
    """torch's own has no sweep to ride on."""
    with pytest.raises(TypeError, match="must be"):
        attach(torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]), kind, {})


# --- AveragedModel ----------------------------------------------------------------------------------------------------


def trained(kind: str, settings: Any, dtype: Any = torch.float64, reverse: bool = False) -> Any:
    """A model with a buffer, its optimizer and an average, after some steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)).to(dtype)
    params = list(model.parameters())
    opt = optim.Adam(params[::-1] if reverse else params, lr=0.1)
    average = attach(opt, kind, settings)
    go_on(model, opt, range(5))
    return model, opt, average


def go_on(model: Any, opt: Any, steps: Any) -> None:
    for step in steps:
        model(new(8, 4, seed=step).to(next(model.parameters()).dtype)).square().mean().backward()
        opt.step(zero_grad=True)


def by_parameter(opt: Any, average: Any) -> dict[Any, Any]:
    return dict(zip(parameters(opt), average.averages, strict=True))


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
@brief_kinds
def test_to_averaged_model(kind: str, settings: Any, reverse: bool) -> None:
    """Its module has the averages, by parameter and not by place, and the model's buffers; nothing is shared."""
    model, opt, average = trained(kind, settings, reverse=reverse)
    before = numbers(opt), average_numbers(average)
    averaged = average.to_averaged_model(model)
    assert type(averaged) is swa_utils.AveragedModel and averaged.n_averaged == 5
    assert type(averaged.module) is type(model)
    own = by_parameter(opt, average)
    for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
        assert raw(q) == raw(own[p]) and q.data_ptr() not in (p.data_ptr(), own[p].data_ptr())
    for b, c in zip(model.buffers(), averaged.module.buffers(), strict=True):
        assert raw(b) == raw(c)
    with torch.no_grad():
        for q in averaged.parameters():
            q.zero_()
    assert (numbers(opt), average_numbers(average)) == before


@brief_kinds
def test_torch_goes_on_with_the_model(kind: str, settings: Any) -> None:
    """update_parameters does what the average does, to rounding."""
    model, opt, average = trained(kind, settings)
    averaged = average.to_averaged_model(model)
    for step in range(5, 9):
        go_on(model, opt, [step])
        averaged.update_parameters(model)
        own = by_parameter(opt, average)
        assert averaged.n_averaged == average.n_averaged
        for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
            torch.testing.assert_close(q.detach(), own[p], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
@brief_kinds
def test_load_averaged_model(kind: str, settings: Any, reverse: bool) -> None:
    """The average takes its numbers over, and goes on as torch's would."""
    model, opt, average = trained(kind, settings, reverse=reverse)
    function = swa_utils.get_ema_multi_avg_fn(settings["decay"]) if kind == "EMA" else None
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=function)
    for step in range(10, 17):
        go_on(model, opt, [step])
        averaged.update_parameters(model)
    average.load_averaged_model(averaged, model)
    assert average.n_averaged == 7
    for step in range(20, 25):
        own = by_parameter(opt, average)
        for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
            torch.testing.assert_close(own[p], q.detach(), rtol=1e-12, atol=1e-13)
            assert own[p].data_ptr() != q.data_ptr()
        go_on(model, opt, [step])
        averaged.update_parameters(model)


@brief_kinds
def test_there_and_back(kind: str, settings: Any) -> None:
    model, opt, average = trained(kind, settings)
    before = average_numbers(average)[0]
    averaged = average.to_averaged_model(model)
    go_on(model, opt, range(30, 33))
    average.load_averaged_model(averaged, model)
    after = average_numbers(average)[0]
    assert (after["averages"], after["n_averaged"]) == (before["averages"], before["n_averaged"])


@brief_kinds
def test_models_that_do_not_fit(kind: str, settings: Any) -> None:
    """Of parameters that are not the optimizer's, or of another shape: an error, and nothing has changed."""
    model, opt, average = trained(kind, settings)
    stranger = copy.deepcopy(model)
    smaller = torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 1)).double()
    before = average_numbers(average), numbers(opt)
    for action in (
        lambda: average.to_averaged_model(stranger),
        lambda: average.load_averaged_model(swa_utils.AveragedModel(stranger), stranger),
        lambda: average.load_averaged_model(swa_utils.AveragedModel(smaller), model),
    ):
        with pytest.raises(ValueError, match=r"parameter|shape|weight|bias"):
            action()
        assert (average_numbers(average), numbers(opt)) == before
    for action in (
        lambda: average.to_averaged_model(None),
        lambda: average.load_averaged_model(model, model),
        lambda: average.load_averaged_model(None, model),
    ):
        with pytest.raises(TypeError, match="must be"):
            action()
        assert (average_numbers(average), numbers(opt)) == before


def test_arrays_have_no_averaged_model() -> None:
    opt = pyopt.SGD([np.ones(3)])
    with pytest.raises(TypeError, match="torch"):
        pyopt.averaging.EMA(opt).to_averaged_model(torch.nn.Linear(1, 1))


# --- interruption -----------------------------------------------------------------------------------------------------


@apart
@pytest.mark.parametrize("steps", [0, 3], ids=["first update", "fourth update"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "LAMB"])
def test_interrupted_at_any_call(name: str, steps: int) -> None:
    """Parameters, state, gradients and averages are together before the step or after it."""
    extras = {"max_norm": 0.5, "nonfinite": "skip", "zero_grad": True}

    def made() -> Any:
        (opt,) = alike(name, {"lr": 0.1}, 1, steps=0)
        averages = [attach(opt, *KINDS[i]) for i in (1, 8)]
        run(opt, steps)
        set_gradients(opt, seed=77)
        return opt, averages

    def found(opt: Any, averages: Any) -> Any:
        return numbers(opt), average_numbers(*averages), gradient_bits(opt)

    opt, averages = made()
    shots = [found(opt, averages)]
    opt.step(**extras)
    shots.append(found(opt, averages))
    counts = [0, 0]
    for n in itertools.count(1):
        opt, averages = made()
        reached = interrupted(SimpleNamespace(step=lambda: opt.step(**extras)), ByCall(n))  # noqa: B023
        now = found(opt, averages)
        assert now in shots, f"half a step at event {n}"
        counts[shots.index(now)] += 1
        if not reached:
            break
    assert all(counts)
