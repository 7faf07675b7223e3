"""pyopt.save and pyopt.load for tensors: the same file as for arrays, so that a run moves between both."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

import pyopt
from test_files import bits_of as plain_bits
from test_files import peak_beyond
from torch_or_skip import bits, optim, torch

# (class, options) of both sides; the shapes of Muon's parameters are matrices.
BOTH = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    ("Adam", {"update_clip": True, "cautious": True}),
    ("AdamW", {"lr": 0.1, "betas": (0.8, 0.99)}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("Adadelta", {}),
    ("Adamax", {}),
    ("NAdam", {"decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("ASGD", {"t0": 1}),
    ("Rprop", {}),
    ("Lion", {"lr": 0.1}),
    ("AdaBelief", {}),
    ("ADOPT", {}),
    ("AdEMAMix", {"alpha_warmup": 9, "beta3_warmup": 9}),
    ("Adan", {}),
    ("FTRL", {"l1": 0.1}),
    ("LAMB", {}),
    ("LARS", {"momentum": 0.9}),
    ("Prodigy", {}),
    ("SGDScheduleFree", {"lr": 0.1}),
    ("AdamWScheduleFree", {"warmup_steps": 3}),
    ("Adafactor", {}),
    ("Muon", {}),
    ("MuonAdamW", {}),
]
IDS = ["-".join([name, *options]) for name, options in BOTH]
each = pytest.mark.parametrize("name, options", BOTH, ids=IDS)
NUMBERS_OF_TORCH = ("NAdam", "ASGD")  # which torch keeps in float32, NumPy's side in double


def shapes_of(name):
    return ((3, 4), (5, 2)) if name == "Muon" else ((3, 4), (), (5,)) if name != "MuonAdamW" else ((3, 4), (5,))


def values_of(name, seed):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape)) for shape in shapes_of(name)]


def tensors(name, options, dtype=torch.float32, steps=0, seed=0, make=None):
    """An optimizer of tensors after some steps."""
    if not hasattr(optim, name):
        pytest.skip(f"this torch has no {name}")
    params = [torch.nn.Parameter(torch.tensor(x).to(dtype)) for x in values_of(name, seed)]
    opt = (make or getattr(optim, name))(params, **options)
    for i in range(steps):
        step(opt, i)
    return opt


def arrays(name, options, dtype=np.float32, steps=0, seed=0):
    params = [pyopt.Parameter(x.astype(dtype)) for x in values_of(name, seed)]
    opt = getattr(pyopt, name)(params, **options)
    for i in range(steps):
        step(opt, i)
    return opt


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def step(opt, i):
    for j, p in enumerate(params_of(opt)):
        grad = np.random.default_rng(100 * i + j).standard_normal(tuple(p.shape))
        p.grad = torch.tensor(grad).to(p.dtype) if isinstance(p, torch.Tensor) else grad.astype(p.dtype)
    opt.step()


def exact(x):
    """Nested data with tensors, to be compared: dtypes and bits."""
    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), bits(x).tolist()
    if isinstance(x, dict):
        return {key: exact(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x), [exact(item) for item in x]
    return plain_bits(x)


def seen(opt):
    """All that a load may change, with the identity of tensors and of what autograd saw of them."""
    held = [(id(t), t._version) for p in params_of(opt) for t in (p, *opt.state[p].values()) if torch.is_tensor(t)]
    return copy.deepcopy((exact([*params_of(opt)]), exact(opt.state_dict()), held))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@each
def test_round_trip(name, options, dtype, tmp_path):
    """To the bit, in the memory that is there, and both go on alike."""
    opt = tensors(name, options, dtype, steps=3)
    pyopt.save(tmp_path / "run", opt)
    for steps in (0, 1):  # without and with state to be written to
        new = tensors(name, options, dtype, steps=steps, seed=1)
        held = [(p.data_ptr(), p._version, dict(new.state[p])) for p in params_of(new)]
        assert pyopt.load(tmp_path / "run", new) is None
        assert exact(params_of(new)) == exact(params_of(opt))
        assert exact(new.state_dict()) == exact(opt.state_dict())
        for p, (pointer, version, entry) in zip(params_of(new), held, strict=True):
            assert p.data_ptr() == pointer
            assert p._version > version
            for key, value in entry.items():
                if torch.is_tensor(value) and value.shape == p.shape and value.ndim:
                    assert new.state[p][key] is value
        other = copy.deepcopy(opt)
        for i in range(3):
            step(new, i)
            step(other, i)
            assert exact(params_of(new)) == exact(params_of(other))
            assert exact(new.state_dict()) == exact(other.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each
def test_from_tensors_to_arrays_and_back(name, options, dtype, tmp_path):
    """Each side writes the very file of the other, and goes on alike where both compute alike."""
    opt = tensors(name, options, getattr(torch, dtype), steps=3)
    pyopt.save(tmp_path / "torch", opt)
    ours = arrays(name, options, dtype, seed=1)
    pyopt.load(tmp_path / "torch", ours)
    for p, q in zip(params_of(opt), params_of(ours), strict=True):
        assert p.detach().numpy().tobytes() == q.data.tobytes()
    pyopt.save(tmp_path / "numpy", ours)
    back = tensors(name, options, getattr(torch, dtype), seed=2)
    pyopt.load(tmp_path / "numpy", back)
    assert exact(back.state_dict()["state"]) == exact(opt.state_dict()["state"])
    assert exact(params_of(back)) == exact(params_of(opt))
    for before, after in zip(opt.param_groups, back.param_groups, strict=True):
        later = dict.fromkeys(after.keys() - before.keys())
        assert exact({k: v for k, v in after.items() if k not in ("params", *later)}) == exact(
            {k: v for k, v in before.items() if k != "params"}
        )
    for i in range(3):
        step(opt, i)
        step(back, i)
        assert exact(params_of(back)) == exact(params_of(opt))


@each
def test_from_arrays_to_tensors_and_back(name, options, tmp_path):
    ours = arrays(name, options, steps=3)
    pyopt.save(tmp_path / "numpy", ours)
    opt = tensors(name, options, seed=1)
    pyopt.load(tmp_path / "numpy", opt)
    pyopt.save(tmp_path / "torch", opt)
    back = arrays(name, options, seed=2)
    pyopt.load(tmp_path / "torch", back)
    for p, q in zip(params_of(ours), params_of(back), strict=True):
        assert p.data.tobytes() == q.data.tobytes()
    if name in NUMBERS_OF_TORCH:
        for p, q in zip(params_of(ours), params_of(back), strict=True):
            for key, value in ours.state[p].items():
                np.testing.assert_array_equal(back.state[q][key], np.float32(value) if type(value) is float else value)
    else:
        assert plain_bits(back.state_dict()["state"]) == plain_bits(ours.state_dict()["state"])
    assert ours.state_dict()["param_groups"] == back.state_dict()["param_groups"]


def test_lbfgs_and_classes_of_torch_itself(tmp_path):
    """torch.optim's own classes that pyopt has too, LBFGS among them."""

    def run(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        return model, optim.LBFGS(model.parameters(), lr=0.1)

    def go(model, opt):
        x = torch.ones(4, 3)

        def closure():
            opt.zero_grad()
            loss = (model(x) ** 2).sum()
            loss.backward()
            return loss

        opt.step(closure)

    whole = run(0)
    go(*whole)
    pyopt.save(tmp_path / "run", whole[1])
    other = run(1)
    pyopt.load(tmp_path / "run", other[1])
    for _ in range(2):
        go(*whole)
        go(*other)
        assert exact(params_of(whole[1])) == exact(params_of(other[1]))
    adam = tensors("Adam", {}, steps=2, make=torch.optim.Adam)
    pyopt.save(tmp_path / "run", adam)
    new = tensors("Adam", {}, seed=1)
    pyopt.load(tmp_path / "run", new)
    assert exact(new.state_dict()) == exact(adam.state_dict())


def test_names_and_groups(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    names = [*model[0].named_parameters()]
    opt = optim.Adam([{"params": names, "mine": (1, math.inf)}, {"params": [*model[1].named_parameters("head")]}])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    pyopt.save(tmp_path / "run", opt)
    safe = pytest.importorskip("safetensors.torch").load_file(tmp_path / "run")
    assert exact(safe["parameters.head.weight"]) == exact(model[1].weight.detach())
    assert exact(safe["state.weight.exp_avg"]) == exact(opt.state[model[0].weight]["exp_avg"])
    new = optim.Adam([{"params": names}, {"params": [*model[1].named_parameters("head")]}])
    pyopt.load(tmp_path / "run", new)
    assert new.param_groups[0]["mine"] == (1, math.inf)
    assert exact(new.state_dict()) == exact(opt.state_dict())


def test_lr_that_is_a_tensor_stays_one(tmp_path):
    opt = tensors("Adam", {"lr": 0.1}, steps=1)
    pyopt.save(tmp_path / "run", opt)
    lr = torch.tensor(0.5, dtype=torch.float64)
    new = tensors("Adam", {"lr": lr}, seed=1)
    pyopt.load(tmp_path / "run", new)
    assert new.param_groups[0]["lr"] is lr
    assert lr == 0.1
    pyopt.save(tmp_path / "again", new)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "run").read_bytes()


@pytest.mark.parametrize("module", [torch.optim.lr_scheduler, pyopt.lr_scheduler])
def test_schedulers(module, tmp_path):
    def run():
        opt = tensors("SGD", {"lr": 0.5, "momentum": 0.9})
        warmup = module.LinearLR(opt, total_iters=3)
        return opt, module.SequentialLR(opt, [warmup, module.CosineAnnealingLR(opt, T_max=9)], [3])

    opt, scheduler = run()
    for i in range(5):
        step(opt, i)
        scheduler.step()
    pyopt.save(tmp_path / "run", opt, schedulers=[scheduler])
    new, other = run()
    pyopt.load(tmp_path / "run", new, schedulers=[other])
    assert other.state_dict() == scheduler.state_dict()
    for i in range(5):
        for o, s in ((opt, scheduler), (new, other)):
            step(o, i)
            s.step()
        assert new.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
        assert exact(params_of(new)) == exact(params_of(opt))


def test_extra(tmp_path):
    """Tensors come back as tensors, arrays as arrays; on NumPy's side both are arrays."""
    extra = {
        "rng": torch.get_rng_state(),
        "half": torch.tensor([1.5, math.nan, -0.0], dtype=torch.bfloat16),
        "array": np.arange(3),
        "turned": torch.arange(6).reshape(2, 3).T,
        "conj": torch.tensor([1 + 2j]).conj(),
        "number": torch.tensor(2.5),
        "none": torch.zeros(0, 3, dtype=torch.bool),
    }
    opt = tensors("SGD", {})
    pyopt.save(tmp_path / "run", opt, extra=extra)
    loaded = pyopt.load(tmp_path / "run", opt)
    assert exact(loaded) == exact(extra)
    loaded["rng"][0] = 1  # a copy
    ours = arrays("SGD", {})
    pytest.importorskip("ml_dtypes")
    found = pyopt.load(tmp_path / "run", ours)
    assert found["half"].dtype.name == "bfloat16"
    assert found["half"].tobytes() == extra["half"].view(torch.int16).numpy().tobytes()
    assert (found["turned"] == extra["turned"].numpy()).all()
    pyopt.save(tmp_path / "again", ours, extra=found["half"])
    assert pyopt.load(tmp_path / "again", ours).tobytes() == found["half"].tobytes()


def test_bfloat16_without_ml_dtypes(tmp_path, monkeypatch):
    """An error before anything changes."""
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    opt = tensors("SGD", {}, steps=1)
    pyopt.save(tmp_path / "run", opt, extra=[torch.ones(2, dtype=torch.bfloat16)])
    ours = arrays("SGD", {}, seed=1)
    before = [p.data.copy() for p in params_of(ours)]
    with pytest.raises(TypeError, match="bfloat16, which NumPy has not: pip install ml_dtypes"):
        pyopt.load(tmp_path / "run", ours)
    assert all((p.data == b).all() for p, b in zip(params_of(ours), before, strict=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: arrays("Adam", {}, seed=1), "parameter 0 has dtype bfloat16 in the file, must be float32"),
        (lambda: tensors("Adam", {}, torch.float16), "parameter 0 has dtype bfloat16 in the file, must be float16"),
        (lambda: tensors("AdamW", {}, torch.bfloat16), "is of the optimizer Adam, optimizer is a AdamW"),
        (lambda: tensors("Adam", {}, torch.bfloat16, make=lambda p, **k: optim.Adam(p[:2])), "has 3 parameters"),
    ],
)
def test_other_optimizer(make, message, tmp_path):
    pyopt.save(tmp_path / "run", tensors("Adam", {}, torch.bfloat16, steps=1))
    new = make()
    before = exact([p.data for p in params_of(new)])
    with pytest.raises((TypeError, ValueError), match=message):
        pyopt.load(tmp_path / "run", new)
    assert exact([p.data for p in params_of(new)]) == before


def test_wrong_option_changes_nothing(tmp_path):
    """torch checks in its constructors alone; a file is checked as it is for arrays."""
    opt = tensors("Adam", {}, steps=1)
    opt.param_groups[0]["betas"] = (0.9, 1.5)
    pyopt.save(tmp_path / "run", opt)
    new = tensors("Adam", {}, steps=2, seed=1)
    before = seen(new)
    with pytest.raises(ValueError, match=r"param group 0: betas\[1\] == 1.5"):
        pyopt.load(tmp_path / "run", new)
    assert seen(new) == before


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.eye(3).to_sparse(), "extra is a torch.sparse_coo tensor on cpu, must be a dense one"),
        (torch.empty(3, device="meta"), "extra is a torch.strided tensor on meta"),
        (torch.ones(2, dtype=torch.complex128), "extra has dtype complex128, which safetensors has not"),
        (torch.ones(2).to(torch.float8_e5m2), "extra has dtype torch.float8_e5m2, which NumPy has not"),
    ],
)
def test_tensors_that_cannot_be_saved(value, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        pyopt.save(tmp_path / "run", tensors("SGD", {}), extra=value)
    assert not list(tmp_path.iterdir())


def test_optimizers_that_pyopt_has_not(tmp_path):
    class Mine(torch.optim.Optimizer):
        def step(self):
            """None."""

    with pytest.raises(TypeError, match="Mine, must be one of pyopt or"):
        pyopt.save(tmp_path / "run", Mine([torch.nn.Parameter(torch.ones(2))], {}))


@pytest.mark.parametrize(
    "shape, turn",
    [
        ((4, 6), lambda t: t.T),
        ((4, 6), lambda t: t[:, ::2]),
        ((2, 3, 4, 5), lambda t: t.to(memory_format=torch.channels_last)),
    ],
    ids=["transposed", "strided", "channels last"],
)
def test_memory_order(shape, turn, tmp_path):
    """Parameters of any strides are saved by their elements, and written where they lie."""

    def run(seed):
        torch.manual_seed(seed)
        p = turn(torch.randn(shape)).requires_grad_()
        p.grad = torch.ones_like(p)
        opt = optim.Adam([p])
        opt.step()
        return p, opt

    p, opt = run(0)
    pyopt.save(tmp_path / "run", opt)
    q, new = run(1)
    strides, pointer = q.stride(), q.data_ptr()
    pyopt.load(tmp_path / "run", new)
    assert (q.stride(), q.data_ptr()) == (strides, pointer)
    assert torch.equal(p, q)
    assert torch.equal(opt.state[p]["exp_avg"], new.state[q]["exp_avg"])


def test_complex_parameters(tmp_path):
    def run(seed):
        torch.manual_seed(seed)
        p = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
        p.grad = torch.ones_like(p)
        opt = optim.Adam([p])
        opt.step()
        return opt

    opt, new = run(0), run(1)
    pyopt.save(tmp_path / "run", opt)
    pyopt.load(tmp_path / "run", new)
    assert exact(new.state_dict()) == exact(opt.state_dict())
    assert exact(params_of(new)) == exact(params_of(opt))


def test_hooks_run(tmp_path):
    opt = tensors("Adam", {}, steps=1)
    ran = []
    opt.register_load_state_dict_pre_hook(
        lambda o, sd: (
            ran.append(torch.is_tensor(sd["state"][0]["exp_avg"])),
            {**sd, "param_groups": [{**sd["param_groups"][0], "lr": 0.25}]},
        )[1]
    )
    opt.register_load_state_dict_post_hook(lambda o: ran.append("loaded"))
    pyopt.save(tmp_path / "run", opt)
    before = exact(opt.state_dict()["state"])
    pyopt.load(tmp_path / "run", opt)
    assert ran == [True, "loaded"]
    assert opt.param_groups[0]["lr"] == 0.25
    assert exact(opt.state_dict()["state"]) == before


def test_stale_graph_raises(tmp_path):
    """What autograd has saved of a parameter from before a load is not used."""
    p = torch.nn.Parameter(torch.ones(2))
    opt = optim.SGD([p])
    pyopt.save(tmp_path / "run", opt)
    loss = (p**2).sum()
    pyopt.load(tmp_path / "run", opt)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_second_copy(tmp_path):
    p = torch.nn.Parameter(torch.ones(25_000_000))
    opt = optim.Adam([p])
    p.grad = torch.ones_like(p)
    opt.step()
    for work in (pyopt.save, pyopt.load):
        peak = peak_beyond(lambda work=work: work(tmp_path / "run", opt))
        assert peak < 64e6, (work.__name__, peak)


# --- what matches what ------------------------------------------------------------------------------------------------


def of_names(*groups, seed=0, steps=0, side="torch", name="Adam", **options):
    """An optimizer with groups of named parameters, of tensors or arrays."""

    def params(shapes):
        made = {n: np.random.default_rng(sum(map(ord, n)) + seed).standard_normal(s) for n, s in shapes.items()}
        if side == "numpy":
            return {n: a.astype(np.float32) for n, a in made.items()}
        return [(n, torch.nn.Parameter(torch.tensor(a, dtype=torch.float32))) for n, a in made.items()]

    cls = getattr(optim if side == "torch" else pyopt, name)
    opt = cls([{"params": params(shapes), **each} for shapes, each in groups], **options)
    for i in range(steps):
        step(opt, i)
    return opt


def by_name(opt):
    """Parameters and states as NumPy's numbers, by name."""
    names = [name for group in opt.param_groups for name in group["param_names"]]
    found = {}
    for name, p in zip(names, params_of(opt), strict=True):
        entry = {k: np.asarray(v.detach() if torch.is_tensor(v) else v) for k, v in opt.state.get(p, {}).items()}
        data = p.detach().numpy() if torch.is_tensor(p) else p.data
        found[name] = data.tolist(), {k: v.tolist() for k, v in entry.items()}
    return found


FILE = ({"a": (3, 4), "b": (2,)}, {"lr": 0.5}), ({"c": (1,)}, {"lr": 0.25})
needs_names = pytest.mark.skipif(torch.__version__ < "2.6", reason="this torch has no named parameters")


@needs_names
@pytest.mark.parametrize("sides", [("torch", "torch"), ("torch", "numpy"), ("numpy", "torch")])
def test_parameters_are_matched_by_name(sides, tmp_path):
    """In any order of parameters and groups, also between both sides, averages with them."""
    opt = of_names(*FILE, side=sides[0])
    average = pyopt.averaging.EMA(opt, decay=0.5)
    step(opt, 0)
    step(opt, 1)
    pyopt.save(tmp_path / "run", opt, averages=[average])
    new = of_names(({"c": (1,)}, {}), ({"b": (2,), "a": (3, 4)}, {}), seed=1, steps=1, side=sides[1])
    other = pyopt.averaging.EMA(new)
    pyopt.load(tmp_path / "run", new, averages=[other])
    assert by_name(new) == by_name(opt)
    assert [g["lr"] for g in new.param_groups] == [0.25, 0.5]
    assert [g["param_names"] for g in new.param_groups] == [["c"], ["b", "a"]]
    assert [other.averages[i].tolist() for i in (2, 1, 0)] == [a.tolist() for a in average.averages]
    assert (other.n_averaged, other.decay) == (2, 0.5)


@needs_names
def test_what_does_not_match_is_an_error(tmp_path):
    pyopt.save(tmp_path / "run", of_names(*FILE, steps=1))
    new = of_names(({"a": (3, 4)}, {}), ({"c": (1,), "b": (2,)}, {}), seed=1, steps=1)
    before = seen(new)
    with pytest.raises(ValueError, match="param group 0: 'a' and 'b', which is in another here"):
        pyopt.load(tmp_path / "run", new)
    assert seen(new) == before


@needs_names
def test_not_strict(tmp_path):
    """What matches is loaded; the rest is told, and the same tensors as before, whose versions have not moved."""
    opt = of_names(({"a": (3, 4), "head": (5,)}, {"lr": 0.5}), ({"c": (1,)}, {}), steps=2)
    pyopt.save(tmp_path / "run", opt, extra=3)
    lr = torch.tensor(0.125)
    new = of_names(({"new": (2,), "head": (6,), "a": (3, 4)}, {}), ({"d": ()}, {"lr": lr}), seed=1, steps=1)
    new_p, head, _, d = params_of(new)
    kept = [(p, p._version, new.state[p], exact(new.state[p])) for p in (new_p, head, d)]
    group = new.param_groups[1]
    result = pyopt.load(tmp_path / "run", new, strict=False)
    assert result == (
        3,
        ["parameters.new", "parameters.d", "groups.1"],
        ["parameters.c", "groups.1"],
        {"parameters.head": "has shape (5,) in the file, must be (6,)"},
    )
    assert by_name(new)["a"] == by_name(opt)["a"]
    for p, version, state, before in kept:
        assert p._version == version
        assert new.state[p] is state
        assert exact(state) == before
    assert new.param_groups[0]["lr"] == 0.5
    assert new.param_groups[1] is group
    assert group["lr"] is lr
    assert lr == 0.125
    step(new, 5)


@needs_names
def test_state_for_other_options(tmp_path):
    """Where groups differ, their options stay, and state that is none for them."""
    pyopt.save(tmp_path / "run", opt := of_names(({"a": (2,), "b": (3,)}, {}), steps=2))
    new = of_names(({"a": (2,)}, {"amsgrad": True}), ({"b": (3,)}, {}), steps=1, seed=1)
    state = new.state[params_of(new)[0]]
    result = pyopt.load(tmp_path / "run", new, strict=False)
    assert list(result.mismatched) == ["groups.0", "groups.1", "state.a"]
    assert new.state[params_of(new)[0]] is state
    assert by_name(new)["b"] == by_name(opt)["b"]
    assert by_name(new)["a"][0] == by_name(opt)["a"][0]


@needs_names
def test_not_strict_numbers_of_all_groups(tmp_path):
    """Prodigy's d stands in each group, and is one: that of the file."""
    opt = of_names(({"a": (2,)}, {}), ({"b": (3,)}, {}), name="Prodigy")
    for _ in range(5):
        for p in params_of(opt):
            p.grad = torch.full_like(p, 0.1)
        opt.step()
    pyopt.save(tmp_path / "run", opt)
    new = of_names(({"c": (2,)}, {}), ({"a": (2,)}, {}), name="Prodigy", seed=1)
    pyopt.load(tmp_path / "run", new, strict=False)
    assert [g["d"] for g in new.param_groups] == [g["d"] for g in opt.param_groups] != [1e-6, 1e-6]
    step(new, 1)


def test_not_strict_where_all_matches(tmp_path):
    opt = tensors("Adam", {"lr": 0.5}, torch.bfloat16, steps=2)
    average = pyopt.averaging.SWA(opt)
    step(opt, 3)
    pyopt.save(tmp_path / "run", opt, averages=[average])
    new = tensors("Adam", {}, torch.bfloat16, seed=1)
    other = pyopt.averaging.SWA(new)
    assert pyopt.load(tmp_path / "run", new, averages=[other], strict=False) == (None, [], [], {})
    assert exact(new.state_dict()) == exact(opt.state_dict())
    assert exact(params_of(new)) == exact(params_of(opt))
    assert exact(other.state_dict()) == exact(average.state_dict())


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_averages_travel(kind, tmp_path):
    """From tensors to arrays and back; a load that fails leaves them."""
    cls = getattr(pyopt.averaging, kind)
    opt = tensors("Adam", {})
    average = cls(opt)
    for i in range(3):
        step(opt, i)
    pyopt.save(tmp_path / "torch", opt, averages=[average])
    ours = arrays("Adam", {}, seed=1)
    between = cls(ours)
    pyopt.load(tmp_path / "torch", ours, averages=[between])
    assert [a.tobytes() for a in between.averages] == [a.numpy().tobytes() for a in average.averages]
    pyopt.save(tmp_path / "numpy", ours, averages=[between])
    new = tensors("Adam", {}, seed=2)
    back = cls(new, every=3)
    new.param_groups[0]["betas"] = (0.9, 1.5)
    pyopt.save(tmp_path / "wrong", new, averages=[back])
    before = exact(average.state_dict())
    with pytest.raises(ValueError, match=r"betas\[1\] == 1.5"):
        pyopt.load(tmp_path / "wrong", opt, averages=[average])
    assert exact(average.state_dict()) == before
    pyopt.load(tmp_path / "numpy", new, averages=[back])
    assert exact(back.state_dict()) == before
    for o in (opt, new):
        step(o, 7)
    assert exact(back.state_dict()) == exact(average.state_dict())
