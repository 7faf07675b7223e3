"""bfloat16, float16 and 8 bits on tensors: the NumPy side's bits, checkpoints, what keeps weights from stalling."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyopt
from cases import BRIEF, Case
from pyopt.averaging import EMA
from torch_or_skip import optim, torch

SHORT = [torch.bfloat16, torch.float16]
STORED = [
    {},
    {"state_dtype": torch.float32},
    {"state_dtype": "bfloat16"},
    {"master": "split"},
    {"master": "kahan"},
    {"rounding": "stochastic", "seed": 3},
]
each_stored = pytest.mark.parametrize("stored", STORED, ids=lambda o: "-".join(map(str, o.values())) or "usual")
each_short = pytest.mark.parametrize("dtype", SHORT, ids=str)


def as_array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def random(shape: Any, dtype: Any, seed: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stepped(optimizer: Any, steps: int, first: int = 0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        for i, p in enumerate(params):
            p.grad = random(p.shape, p.dtype, 100 * step + i)
        optimizer.step()


def params_of(dtype: Any) -> list[Any]:
    return [torch.nn.Parameter(random(shape, dtype, i)) for i, shape in enumerate([(5, 7), (), (1200,), (0, 3)])]


@each_stored
@each_short
@pytest.mark.parametrize(
    "case", [c for c in BRIEF if c.optimizer.short_types and hasattr(optim, c.optimizer.__name__)], ids=str
)
def test_bits_are_those_of_the_numpy_side(case: Case, dtype: Any, stored: dict[str, Any]) -> None:
    params = params_of(dtype)
    arrays = [pyopt.Parameter(as_array(p.detach().clone())) for p in params]
    tensors = getattr(optim, case.optimizer.__name__)(params, **case.options, **stored)
    ours = case.optimizer(arrays, **case.options, **stored)
    for step in range(3):
        stepped(tensors, 1, step)
        ours.step(grads=[as_array(p.grad) for p in params])
    for p, q in zip(params, arrays, strict=True):
        assert as_array(p).tobytes() == q.data.tobytes()
        for name, value in tensors.state[p].items():
            if isinstance(ours.state[q][name], np.ndarray):
                assert as_array(value).tobytes() == ours.state[q][name].tobytes(), name
                assert as_array(value).dtype == ours.state[q][name].dtype, name


@each_stored
@pytest.mark.parametrize("dtype", [*SHORT, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Lion", "RMSprop"])
def test_a_checkpoint_keeps_types_and_bits(name: str, dtype: Any, stored: dict[str, Any]) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(optim, name)(params_of(dtype), **options, **stored)
    stepped(optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = copy.deepcopy([p for group in optimizer.param_groups for p in group["params"]])
    again = getattr(optim, name)(twins, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    stepped(optimizer, 3, 3)
    stepped(again, 3, 3)
    for p, q in zip(optimizer.state, again.state, strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert value.dtype == again.state[q][key].dtype and torch.equal(value, again.state[q][key]), key


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "Prodigy", "SGDScheduleFree"])
def test_numbers_of_the_whole_tensor_keep_their_type(name: str) -> None:
    """torch casts all of the state but "step" to the parameter's type, which rounds NAdam's mu_product."""
    trained = []
    for resumed in (False, True):
        p = torch.nn.Parameter(random(33, torch.bfloat16, 0))
        optimizer = getattr(optim, name)([p])
        for i in range(6):
            if i == 3 and resumed:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = getattr(optim, name)([p])
                optimizer.load_state_dict(saved)
            p.grad = random(33, torch.bfloat16, i)
            optimizer.step()
        trained.append((p, optimizer.state[p]))
    assert torch.equal(trained[0][0], trained[1][0])
    for key, value in trained[0][1].items():
        assert (
            value == trained[1][1][key]
            if not isinstance(value, torch.Tensor)
            else (value.dtype == trained[1][1][key].dtype and torch.equal(value, trained[1][1][key]))
        ), key


@each_short
def test_checkpoints_between_tensors_and_arrays(dtype: Any) -> None:
    p = torch.nn.Parameter(random(33, dtype, 0))
    optimizer = optim.Adam([p], lr=0.1, master="kahan")
    p.grad = random(33, dtype, 1)
    optimizer.step()
    array = as_array(p).copy()
    there = pyopt.Adam([array])
    there.load_state_dict(optim.from_torch(optimizer.state_dict()))
    back = optim.Adam([torch.nn.Parameter(p.detach().clone())])
    back.load_state_dict(optim.to_torch(there.state_dict()))
    there.step(grads=[as_array(random(33, dtype, 2))])
    for each in (optimizer, back):
        q = each.param_groups[0]["params"][0]
        q.grad = random(33, dtype, 2)
        each.step()
        assert as_array(q).tobytes() == array.tobytes()


def test_codes_stay_codes_where_the_option_is_gone() -> None:
    p = torch.nn.Parameter(random(4096, torch.bfloat16, 0))
    optimizer = optim.Adam([p], state_dtype="8bit")
    p.grad = random(4096, torch.bfloat16, 1)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["state_dtype"]
    other = optim.Adam([torch.nn.Parameter(p.detach().clone())])
    other.load_state_dict(saved)
    entry = next(iter(other.state.values()))
    assert {name: value.dtype for name, value in entry.items()} == {
        name: value.dtype for name, value in optimizer.state[p].items()
    }


def test_state_of_the_users_own_is_cast_as_in_torch() -> None:
    """What is no state of the optimizer gets the parameter's type, whatever its shape."""
    loaded = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(random(4, torch.float32, 0))
        optimizer = module.SGD([p], momentum=0.5)
        p.grad = random(4, torch.float32, 1)
        optimizer.step()
        optimizer.state[p].update(own=torch.ones(2), counts=torch.ones(4, dtype=torch.int64))
        other = module.SGD([torch.nn.Parameter(p.detach().double())], momentum=0.5)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loaded.append({name: value.dtype for name, value in next(iter(other.state.values())).items()})
    assert loaded[0] == loaded[1]


def test_a_checkpoint_of_torch_and_the_own_options() -> None:
    """A group of a checkpoint without the options leaves them; without any, types are torch's."""
    theirs = torch.optim.Adam([torch.nn.Parameter(torch.ones(5))])
    stepped(theirs, 2)
    saved = theirs.state_dict()
    with_option = optim.Adam([torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))], state_dtype="float32")
    without = optim.Adam([torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))])
    for optimizer, dtype in ((with_option, torch.float32), (without, torch.bfloat16)):
        optimizer.load_state_dict(copy.deepcopy(saved))
        (entry,) = optimizer.state.values()
        assert entry["exp_avg"].dtype == dtype
        stepped(optimizer, 1)
    assert with_option.param_groups[0]["state_dtype"] == "float32" and "state_dtype" not in without.param_groups[0]


# --- weights that do not stall ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [*STORED[3:], {}], ids=lambda o: "-".join(map(str, o.values())) or "usual")
def test_a_hundred_small_steps(stored: dict[str, Any]) -> None:
    """1e-3 a hundred times from 1.0 in bfloat16, whose neighbour below is 0.996: torch stays where it is."""
    p, q = (torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2))
    ours, theirs = optim.SGD([p], lr=1e-3, **stored), torch.optim.SGD([q], lr=1e-3)
    for _ in range(100):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        ours.step()
        theirs.step()
    assert (q == 1).all()
    if not stored:
        assert (p == 1).all()
    else:
        assert abs(p.double().mean().item() - 0.9) < 2e-3


def test_split_is_training_in_float32() -> None:
    """Over 1000 steps: together the halves are the float32 weights, in bits."""
    start = random(1500, torch.bfloat16, 0)
    for name in ("SGD", "AdamW"):
        short, long = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
        ours = getattr(optim, name)([short], lr=1e-3, master="split", state_dtype="float32")
        plain = getattr(optim, name)([long], lr=1e-3)
        for step in range(1000):
            g = random(1500, torch.bfloat16, step)
            short.grad, long.grad = g, g.float()
            ours.step()
            plain.step()
        low = ours.state[short]["low_bits"]
        bits = (short.detach().view(torch.int16).int() << 16) + low.int()
        assert torch.equal(bits, long.detach().view(torch.int32)), name
        away = (short.detach().float() - long.detach()).abs()  # the upper half alone is rounded to nearest
        assert (away <= long.detach().abs() * 2.0**-8).all()


def test_kahan_is_near_float32() -> None:
    for dtype in SHORT:
        start = random(1000, dtype, 0)
        short, long = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
        ours, plain = optim.AdamW([short], lr=1e-4, master="kahan", state_dtype="float32"), optim.AdamW([long], lr=1e-4)
        for step in range(200):
            g = random(1000, dtype, step)
            short.grad, long.grad = g, g.float()
            ours.step()
            plain.step()
        weight = short.detach().float() + ours.state[short]["compensation"].float()
        torch.testing.assert_close(weight, long.detach(), rtol=2.0**-12, atol=2e-5)


def test_stochastic_rounding_depends_on_seed_step_and_element() -> None:
    """Not on threads; the next step rounds otherwise, another seed and another parameter too; the mean is right."""

    def run(seed: int, threads: int, steps: int = 1, dtype: Any = torch.bfloat16) -> list[Any]:
        params = [torch.nn.Parameter(torch.ones(100_000, dtype=dtype)) for _ in range(2)]
        optimizer = optim.SGD(params, lr=1e-3, rounding="stochastic", seed=seed)
        with pyopt.num_threads(threads):
            for _ in range(steps):
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.step()
        assert optimizer.param_groups[0]["rounding_step"] == steps
        return [p.detach() for p in params]

    one, two = run(0, 1), run(0, 2)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], run(1, 1)[0])
    assert {x.item() for x in one[0].unique()} == {1.0, 1 - 2.0**-8}
    for dtype in SHORT:
        for steps in (1, 10):
            assert abs(run(5, 1, steps, dtype)[0].double().mean().item() - (1 - 1e-3 * steps)) < 3e-5
    up = (one[0] == 1).double()  # neighbours are independent
    assert abs(((up[1:] - up.mean()) * (up[:-1] - up.mean())).mean().item()) < 3e-3


# --- beside the step --------------------------------------------------------------------------------------------------


@each_stored
@each_short
def test_clipping_skipping_and_averages(dtype: Any, stored: dict[str, Any]) -> None:
    p = torch.nn.Parameter(random(3000, dtype, 0))
    optimizer = optim.AdamW([p], lr=1e-2, **stored)
    average = EMA(optimizer, decay=0.5)
    for step in range(4):
        p.grad = random(3000, dtype, step)
        expected = p.grad.double().norm().item()
        optimizer.step(max_norm=1.0, nonfinite="skip", zero_grad=True)
        assert abs(optimizer.last_grad_norm - expected) < 1e-3 * expected and not p.grad.any()
    (kept,) = average.averages
    assert kept.dtype == torch.float32
    before, weights = kept.clone(), p.detach().clone()
    p.grad = random(3000, dtype, 9)
    p.grad[17] = float("inf")
    optimizer.step(nonfinite="skip")
    assert optimizer.skipped_steps == 1 and torch.equal(p, weights) and torch.equal(kept, before)
    with average.swapped():
        assert torch.equal(p, before.to(dtype))
    assert torch.equal(p, weights) and torch.equal(kept, before)


def test_the_average_of_split_weights_is_that_of_float32() -> None:
    start = random(1100, torch.bfloat16, 0)
    short, long = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours, plain = optim.SGD([short], lr=1e-3, master="split"), optim.SGD([long], lr=1e-3)
    averages = [EMA(o, decay=0.9) for o in (ours, plain)]
    for step in range(20):
        g = random(1100, torch.bfloat16, step)
        short.grad, long.grad = g, g.float()
        ours.step()
        plain.step()
    assert torch.equal(averages[0].averages[0], averages[1].averages[0])


def test_grad_scaler_with_float16() -> None:
    """Infinite gradients of a scale that is too large are skipped, the scale shrinks, and training goes on."""
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.float16))
    # Without `fused`, GradScaler unscales gradients itself, and refuses those of float16.
    optimizer = optim.AdamW([p], lr=1e-2, master="kahan", fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    moved = []
    for _ in range(6):
        optimizer.zero_grad()
        before = p.detach().clone()
        scaler.scale((p.float() * 2).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(p, before))
    assert moved[:2] == [False, False] and moved[-1] and p.isfinite().all()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"state_dtype": "float8"},
            ValueError,
            "state_dtype == 'float8', must be None or one of 'float32', ",
        ),
        ({"state_dtype": torch.int8}, ValueError, "state_dtype == torch.int8"),
        ({"master": "float32"}, ValueError, "master == 'float32', must be 'split', 'kahan' or None"),
        ({"rounding": "up"}, ValueError, "rounding == 'up', must be 'nearest' or 'stochastic'"),
        ({"rounding": "stochastic", "seed": -1}, ValueError, "seed == -1"),
        ({"rounding": "stochastic", "master": "split"}, ValueError, "master == 'split' with rounding == 'stochastic'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    for make in (
        lambda: optim.Adam([torch.nn.Parameter(torch.ones(3))], **options),
        lambda: optim.Adam([{"params": [torch.nn.Parameter(torch.ones(3))], **options}]),
        lambda: optim.Lion([torch.nn.Parameter(torch.ones(3))], **options),
        lambda: pyopt.Adam([np.ones(3)], **options),
        lambda: pyopt.Adam([{"params": [np.ones(3)], **options}]),
    ):
        with pytest.raises(error, match=words.replace("(", r"\(")):
            make()


def test_what_has_no_such_options() -> None:
    with pytest.raises(TypeError, match="master"):
        optim.Muon([torch.nn.Parameter(torch.ones(3, 3))], master="kahan")
    with pytest.raises(TypeError, match="float16, must be float32 or float64 for Muon"):
        pyopt.Muon([np.ones((3, 3), np.float16)])
    p = torch.nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16)[:, 1])
    optimizer = optim.SGD([p], lr=0.1, master="kahan")
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameter 0 has the option 'master', which is not for a step that is left"):
        optimizer.step()


# --- between tensors and arrays ---------------------------------------------------------------------------------------


@each_short
@pytest.mark.parametrize("make", [optim, torch.optim], ids=["pyopt", "torch"])
@each_stored
def test_checkpoints_travel_to_arrays_and_back(dtype: Any, make: Any, stored: dict[str, Any]) -> None:
    """The state keeps its types, and both sides go on with the same bits."""
    if make is torch.optim and stored:
        pytest.skip("options of pyopt's")
    if dtype == torch.float16 and stored.get("master") == "split":
        pytest.skip("of bfloat16 alone")
    params = [torch.nn.Parameter(random(shape, dtype, i)) for i, shape in enumerate([(50, 3), (7,)])]
    params[0].data = params[0].data.T.contiguous().T
    optimizer = make.AdamW(params, lr=0.1, **stored)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = random(p.shape, dtype, 10 * step + i)
        optimizer.step()
    saved = optimizer.state_dict()
    on_arrays = pyopt.AdamW([as_array(p).copy("K") for p in params])
    on_arrays.load_state_dict(optim.from_torch(saved))
    there = optim.to_torch(on_arrays.state_dict())["state"]
    assert len(there) == 2
    for index, entry in saved["state"].items():
        for name, value in entry.items():
            assert there[index][name].dtype == value.dtype and torch.equal(there[index][name], value), name
    again = optim.AdamW(params)
    again.load_state_dict(optim.to_torch(on_arrays.state_dict()))
    for i, p in enumerate(params):
        p.grad = random(p.shape, dtype, 50 + i)
    again.step()
    on_arrays.step(grads=[as_array(p.grad) for p in params])
    for array, p in zip(on_arrays.param_groups[0]["params"], params, strict=True):
        assert np.array_equal(array.data.view(np.int16), as_array(p).view(np.int16))


def test_numbers_of_bfloat16_in_groups() -> None:
    group = {"lr": torch.tensor(0.5, dtype=torch.bfloat16), "params": []}
    (found,) = optim.from_torch({"state": {}, "param_groups": [group]})["param_groups"]
    assert found["lr"] == 0.5 and type(found["lr"]) is float
    with pytest.raises(TypeError, match=r"group 0: 'x' is torch\.float8_e4m3fn, must be of a dtype that NumPy has"):
        optim.from_torch({"state": {}, "param_groups": [{"x": torch.zeros(2).to(torch.float8_e4m3fn)}]})


# --- bitsandbytes -----------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "stored" / "bitsandbytes_0_50.pt"  # made by tools/golden_bitsandbytes.py


@pytest.mark.parametrize("name", ["Adam", "AdamW", "AdEMAMix", "Lion", "SGD"])
def test_checkpoints_of_bitsandbytes(name: str) -> None:
    """Their state after three steps goes on here, and back there in the same codes."""
    saved = torch.load(GOLDEN, weights_only=True)[name]
    params = [torch.nn.Parameter(p.float()) for p in saved["params"]]
    optimizer = getattr(optim, name)(params, **({"momentum": 0.9} if name == "SGD" else {}))
    optimizer.load_state_dict(optim.from_bitsandbytes(saved["state_dict"], optimizer))
    back = optim.to_bitsandbytes(optimizer)
    for index, entry in saved["state_dict"]["state"].items():
        expected = {k: v for k, v in entry.items() if not isinstance(v, dict)}
        expected.update(entry["__bnb_optimizer_quant_state__"])
        for key, value in expected.items():
            found = back["state"][index][key]
            if name in ("SGD", "Lion") and key == "step":  # they do not count here
                continue
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(value)), key
    for p, g in zip(params, saved["grads"], strict=True):
        p.grad = g.float()
    optimizer.step()
    for p, expected in zip(params, saved["after"], strict=True):
        torch.testing.assert_close(p.detach().ravel()[:512], expected, rtol=1e-5, atol=1e-6)


# --- torchao ----------------------------------------------------------------------------------------------------------

GOLDEN_AO = GOLDEN.with_name("torchao_0_18.pt")  # made by tools/golden_torchao.py


class Quantized:
    """What a state of torchao has, without its package."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)

    def dequantize(self) -> torch.Tensor:
        if hasattr(self, "numbers"):  # as torchao gave them, of other than 8 bits
            return self.numbers
        blocks = self.qmap[self.codes.int()].view(len(self.scale), -1)
        return (blocks * self.scale.view(-1, 1)).view(self.codes.shape)


def saved_by_torchao(name: str) -> dict:
    saved = torch.load(GOLDEN_AO, weights_only=True)[name]
    for entry in saved["state_dict"]["state"].values():
        entry.update({key: Quantized(**value) for key, value in entry.items() if isinstance(value, dict)})
    return saved


def loaded(saved: dict, params: list, name: str) -> torch.optim.Optimizer:
    optimizer = getattr(optim, name)(params, lr=3, maximize=False)
    optimizer.load_state_dict(optim.from_torchao(saved["state_dict"], optimizer))
    return optimizer


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_checkpoints_of_torchao(name: str) -> None:
    """Their state after three steps goes on here, in the same codes where these are of 8 bits."""
    saved = saved_by_torchao(name)
    params = [torch.nn.Parameter(p.float()) for p in saved["params"]]
    optimizer = loaded(saved, params, "Adam" if name == "Adam8bit" else "AdamW")
    for p, entry in zip(params, saved["state_dict"]["state"].values(), strict=True):
        state = optimizer.state[p]
        assert state["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            if not isinstance(entry[key], Quantized):
                assert torch.equal(state[key], entry[key]), "float32 stays"
            elif name.endswith("8bit"):
                assert torch.equal(state[key], entry[key].codes)
                assert torch.equal(state[f"{key}_absmax"], entry[key].scale)
            else:
                assert torch.equal(state[key], entry[key].dequantize())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["maximize"]) == (float(torch.tensor(0.01)), 0.1, False)
    assert group.get("state_dtype") == ("8bit" if name.endswith("8bit") else None)
    for p, g in zip(params, saved["grads"], strict=True):
        p.grad = g.float()
    optimizer.step()
    for p, expected in zip(params, saved["after"], strict=True):
        torch.testing.assert_close(p.detach().ravel()[:512], expected, rtol=1e-5, atol=1e-6)


def test_state_of_torchao_that_is_not_stored_so_here_becomes_float() -> None:
    saved = saved_by_torchao("AdamW8bit")
    codes = saved["state_dict"]["state"][0]["exp_avg"]
    across = [torch.nn.Parameter(p.float()) for p in saved["params"]]
    across[0].data = across[0].data.T.contiguous().T
    double = [torch.nn.Parameter(p.double()) for p in saved["params"]]
    for params in (across, double):
        state = loaded(saved, params, "AdamW").state[params[0]]["exp_avg"]
        assert (state.dtype, state.stride()) == (params[0].dtype, params[0].stride())
        assert torch.equal(state.float(), codes.dequantize())
    codes.scale = codes.scale.repeat_interleave(2)  # blocks of 128
    params = [torch.nn.Parameter(p.float()) for p in saved["params"]]
    optimizer = loaded(saved, params, "AdamW")
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], codes.dequantize())
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_what_is_no_state_of_torchao() -> None:
    saved = saved_by_torchao("AdamW8bit")
    params = [torch.nn.Parameter(p.float()) for p in saved["params"]]
    optimizer = optim.AdamW(params)
    with pytest.raises(TypeError, match="optimizer is a Lion, must be Adam or AdamW"):
        optim.from_torchao(saved["state_dict"], optim.Lion(params))
    with pytest.raises(ValueError, match=r"groups of \[3\] parameters, must be of \[2\]"):
        optim.from_torchao(saved["state_dict"], optim.AdamW(params[:2]))
    entry = saved["state_dict"]["state"][0]
    entry["exp_avg"].qmap = entry["exp_avg"].qmap.flip(0)
    with pytest.raises(ValueError, match="parameter 0: 'exp_avg': its map of 8 bits"):
        optim.from_torchao(saved["state_dict"], optimizer)
    entry["exp_avg"] = torch.nn.Parameter(torch.ones(64, 64))
    with pytest.raises(TypeError, match="parameter 0: 'exp_avg' is a Parameter, must be a tensor or a state"):
        optim.from_torchao(saved["state_dict"], optimizer)
