"""What tests/test_stack_mpi.py runs on several ranks: `mpiexec -n 2 python -m mpi4py tests/mpi_program.py CASE [FILE]`.

Each case ends by itself or with an error, which ends all ranks. Rank 0 prints a digest of what it has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
from mpi4py import MPI

import pyopt
from pyopt.mpi import Sharded, average_gradients

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size


class Sign(pyopt.Optimizer):
    """An optimizer of the user's own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def update(self, p: Any, g: Any, state: Any, group: Any) -> None:
        m = state.setdefault("m", np.zeros_like(p))
        m += g
        p -= group["lr"] * np.sign(m)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "Adam": pyopt.Adam,
    "SGD": pyopt.SGD,
    "LAMB": pyopt.LAMB,
    "Adafactor": pyopt.Adafactor,
    "MuonAdamW": pyopt.MuonAdamW,
    "Sign": Sign,
}
OPTIONS = {"SGD": {"momentum": 0.9, "nesterov": True}}


def model(seed: int = 0) -> dict[str, Any]:
    """Arrays of several kinds: both types, both memory orders, of one element and of none."""
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((40, 30), np.float32),
        "transposed": rng.standard_normal((20, 50), np.float32).T,
        "double": np.asfortranarray(rng.standard_normal((7, 9))),
        "scalar": np.array(0.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "b": rng.standard_normal(33).astype(np.float32),
    }


def gradients(params: dict[str, Any], *seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(p.shape), p.dtype) for name, p in params.items()}


def groups(params: dict[str, Any]) -> list[dict[str, Any]]:
    second = {"b", "double"}
    return [
        {"params": {k: v for k, v in params.items() if k not in second}},
        {"params": {k: v for k, v in params.items() if k in second}, "lr": 0.02},
    ]


def summed(params: dict[str, Any], step: int) -> dict[str, Any]:
    """The ranks' gradients added up in their order, as one process would."""
    total = gradients(params, step, 0)
    for rank in range(1, SIZE):
        for name, g in gradients(params, step, rank).items():
            total[name] = np.asarray(total[name] + g)
    return total


def in_order(grads: dict[str, Any], params: dict[str, Any]) -> list[Any]:
    return [grads[name] for group in groups(params) for name in group["params"]]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, p in ours.items():
        assert p.tobytes() == theirs[name].tobytes(), name


def digest(params: dict[str, Any]) -> str:
    return sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in params.values())).hexdigest()


def fails(kind: type[BaseException], words: str, function: Callable[[], Any]) -> None:
    try:
        function()
    except kind as error:
        assert words in str(error), f"{error!r} lacks {words!r}"
    else:
        raise AssertionError(f"no error: {words}")


# --- cases ------------------------------------------------------------------------------------------------------------


def bits(name: str) -> str:
    """Sums over the ranks, clipped: the bits of one process that is given the sums, in parameters and state."""
    options = OPTIONS.get(name, {})
    ours, theirs = model(RANK), model()  # rank 0's values are those that count
    sharded = Sharded(OPTIMIZERS[name], groups(ours), COMM, lr=0.01, **options)
    single = OPTIMIZERS[name](groups(theirs), lr=0.01, **options)
    assert_same(ours, theirs)
    for step in range(6):
        limit = {"max_norm": 1.0} if step % 2 else {}
        grads = in_order(gradients(ours, step, RANK), ours)
        if step == 3:
            grads[0] = None
        total = in_order(summed(theirs, step), theirs)
        if step == 3:
            total[0] = None
        sharded.step(grads=grads, **limit)
        single.step(grads=total, gradient_factor=1 / SIZE, **limit)
        assert sharded.last_grad_norm == (single.last_grad_norm if limit else sharded.last_grad_norm)
        assert_same(ours, theirs)
    mine = {i for i in range(len(ours)) if sharded._owners[sharded._params()[i]] == RANK}
    kept = {sharded._params().index(p) for p in sharded.optimizer.state if sharded.optimizer.state[p]}
    assert kept <= mine
    assert sorted(i for each in COMM.allgather(mine) for i in each) == list(range(len(ours)))
    assert_states(sharded.state_dict(), single.state_dict())
    assert (sharded.state_dict(root=SIZE - 1) is None) == (RANK != SIZE - 1)
    # The same gradients on all ranks: the same bits whatever their number.
    for step in range(3):
        sharded.step(grads=in_order(gradients(ours, step), ours), reduce="none", max_norm=2.0)
        single.step(grads=in_order(gradients(theirs, step), theirs), max_norm=2.0)
    assert_same(ours, theirs)
    again = model()
    sharded = Sharded(OPTIMIZERS[name], groups(again), COMM, lr=0.01, **options)
    for step in range(3):
        sharded.step(grads=in_order(gradients(again, step), again), reduce="none", max_norm=2.0)
    return digest(again)


def assert_states(one: Any, other: Any) -> None:
    assert one["param_groups"] == other["param_groups"]
    assert {k for k, v in one["state"].items() if v} == {k for k, v in other["state"].items() if v}
    for index, entry in one["state"].items():
        for name, value in entry.items():
            assert np.array_equal(value, other["state"][index][name]), (index, name)


def averaged() -> str:
    """average_gradients: exact means, in place, of any strides; the same on all ranks."""
    params = [pyopt.Parameter(p) for p in model().values()]
    for mode in ("mean", "sum"):
        every = [[*gradients(model(), 7, rank).values()] for rank in range(SIZE)]
        for p, g in zip(params, every[RANK], strict=True):
            p.grad = g.copy("K")
        wide = np.arange(12.0).reshape(3, 4)[:, ::2] * (RANK + 1)
        kept = params[0].grad
        average_gradients(COMM, [params, {"more": [wide, None]}], reduce=mode)
        assert params[0].grad is kept
        for i, p in enumerate(params):
            total = every[0][i].copy()
            for rank in range(1, SIZE):
                total += every[rank][i]
            assert np.array_equal(p.grad, total / np.asarray(SIZE, total.dtype) if mode == "mean" else total)
        factor = sum(range(1, SIZE + 1)) / (SIZE if mode == "mean" else 1)
        assert np.allclose(wide, np.arange(12.0).reshape(3, 4)[:, ::2] * factor, rtol=1e-15)
    return digest({str(i): p.grad for i, p in enumerate(params)})


def errors() -> str:
    """An error on the last rank is an error on all, with nothing changed; afterwards all goes on."""
    last, params = SIZE - 1, model()
    sharded = Sharded(pyopt.Adam, params, COMM, lr=0.01)
    sharded.step(grads=gradients(params, 0, RANK))
    before = digest(params)
    kind: Any = ValueError if last == RANK else RuntimeError
    there = f"rank {last} has failed" if last != RANK else ""

    def bad(**changes: Any) -> dict[str, Any]:
        return gradients(params, 1, RANK) | (changes if last == RANK else {})

    fails(kind, there or "has shape (3,)", lambda: sharded.step(grads=bad(w=np.ones(3, np.float32))))
    fails(kind, there or "no gradient for ['w'", lambda: sharded.step(grads={"b": 1} if last == RANK else bad()))
    fails(kind, there or "max_norm == -1", lambda: sharded.step(grads=bad(), max_norm=-1 if last == RANK else 1))
    fails(kind, there or "reduce == 'max'", lambda: sharded.step(grads=bad(), reduce="max" if last == RANK else "sum"))

    def closure() -> None:
        if last == RANK:
            raise ValueError("my own")
        for p, g in zip(sharded._params(), bad().values(), strict=True):
            p.grad = g

    fails(kind, there or "my own", lambda: sharded.step(closure))
    if SIZE > 1:
        fails(ValueError, "differ between the ranks", lambda: sharded.step(grads=bad(b=None)))
        if last == RANK:
            sharded.optimizer.param_groups[0]["lr"] = 0.5
        fails(ValueError, "'lr': 0.5", lambda: sharded.step(grads=bad()))
        sharded.optimizer.param_groups[0]["lr"] = 0.01
        fails(ValueError, "differ between", lambda: Sharded(pyopt.Adam, [np.ones(2 + (last == RANK))], COMM))
        fails(ValueError, "gradients differ", lambda: average_gradients(COMM, [np.ones(2 + (last == RANK))]))
    fails(kind, there or "lr == -1", lambda: Sharded(pyopt.Adam, model(), COMM, lr=-1 if last == RANK else 1))
    bad_kind: Any = TypeError if last == RANK else RuntimeError
    fails(bad_kind, there, lambda: average_gradients(COMM, [[1] if last == RANK else np.ones(1)]))
    for cls in (pyopt.Prodigy, pyopt.LBFGS):
        fails(TypeError, "cannot be shared out", lambda cls=cls: Sharded(cls, model(), COMM))
    fails(TypeError, "has dtype float16, must be float32", lambda: Sharded(pyopt.Adam, [np.ones(2, np.float16)], COMM))
    short = {"params": {"x": np.ones(2, np.float16)}}
    fails(TypeError, "parameter 'x' has dtype float16", lambda: sharded.add_param_group(short))
    assert len(sharded.optimizer.param_groups) == 1
    pyopt.averaging.EMA(sharded.optimizer)
    fails(ValueError, "has averages", lambda: sharded.step(grads=bad()))
    sharded.optimizer._averages[0].detach()
    # What is not finite on one rank is not finite in the sum.
    nan = bad(w=np.full((40, 30), np.nan, np.float32))
    fails(ValueError, "parameter 'w': its gradient has NaN or inf", lambda: sharded.step(grads=nan, nonfinite="raise"))
    sharded.step(grads=nan, nonfinite="skip")
    assert sharded.skipped_steps == 1 and not np.isfinite(sharded.last_grad_norm)  # type: ignore[arg-type]
    assert digest(params) == before
    for p, g in zip(sharded._params(), bad().values(), strict=True):
        p.grad = g
    sharded.step(zero_grad=True)
    assert all((p.grad == 0).all() for p in sharded._params())
    twin = model()
    single = pyopt.Adam(twin, lr=0.01)
    for step in range(2):
        single.step(grads=summed(twin, step), gradient_factor=1 / SIZE)
    assert_same(params, twin)
    return ""


class Breaks(Sign):
    """Fails in the middle of a step, on one rank alone."""

    def update(self, p: Any, g: Any, state: Any, group: Any) -> None:
        if group["lr"] == 0.25 and RANK == SIZE - 1:
            raise ZeroDivisionError("broke")
        super().update(p, g, state, group)


def apart() -> str:
    """After a step that some ranks have made and others not, the ranks say so until something is loaded."""
    params = model()
    sharded = Sharded(Breaks, params, COMM, lr=0.5)
    sharded.step(grads=gradients(params, 0, RANK))
    saved, values = sharded.state_dict(), {name: p.copy() for name, p in params.items()}
    sharded.optimizer.param_groups[0]["lr"] = 0.25
    kind: Any = ZeroDivisionError if RANK == SIZE - 1 else RuntimeError
    fails(kind, "broke", lambda: sharded.step(grads=gradients(params, 1, RANK)))
    if SIZE > 1:
        fails(RuntimeError, "by some ranks alone", lambda: sharded.step(grads=gradients(params, 1, RANK)))
    for name, p in params.items():
        p[...] = values[name]
    sharded.load_state_dict(saved)
    sharded.step(grads=gradients(params, 1, RANK))
    return digest(params) if SIZE == 1 else ""


def more_parameters() -> str:
    """A group that is added begins with rank 0's values, and is stepped and shared out."""
    params, twin = {"w": np.ones((4, 4))}, {"w": np.ones((4, 4))}
    sharded, single = Sharded(pyopt.AdamW, params, COMM), pyopt.AdamW(twin)
    for step in range(4):
        if step == 2:
            for both, optimizer in ((params, sharded), (twin, single)):
                both["v"] = np.full(5, float(RANK + 1) if optimizer is sharded else 1.0)
                optimizer.add_param_group({"params": {"v": both["v"]}, "lr": 0.5})
        grads = gradients(params, step, RANK)
        sharded.step(grads=[*grads.values()])
        single.step(grads=[*summed(twin, step).values()], gradient_factor=1 / SIZE)
    assert_same(params, twin)
    fails(ValueError, "share the same array", lambda: sharded.add_param_group({"params": {"x": params["v"]}}))
    return ""


def trained(path: str, first: int, last: int) -> str:
    """Steps of a training with a schedule, from a file unless they are the first, to a file."""
    params = model(RANK + first)
    sharded = Sharded(pyopt.AdamW, groups(params), COMM, lr=0.02)
    schedule = pyopt.lr_scheduler.CosineAnnealingLR(sharded.optimizer, T_max=20)
    if first:
        assert sharded.load(path, schedulers=[schedule]) == {"step": first, "list": [1, 2]}
        assert schedule.last_epoch == first
    for step in range(first, last):
        sharded.step(grads=in_order(gradients(params, step), params), reduce="none")
        schedule.step()
    sharded.save(path, schedulers=[schedule], extra={"step": last, "list": [1, 2]})
    mine = [p for p in sharded._params() if sharded._owners[p] == RANK]
    assert set(sharded.optimizer.state) <= set(mine)
    kind: Any = OSError
    fails(kind, "", lambda: sharded.load(path + ".missing", schedulers=[schedule]))
    fails(kind if RANK == 0 else RuntimeError, "", lambda: sharded.save("/nowhere/there/is/a.file"))
    sharded.step(grads=in_order(gradients(params, last), params), reduce="none")  # neither has broken anything
    return digest(params)


def alone() -> str:
    """The user's own code fails on one rank, while the others wait."""
    sharded = Sharded(pyopt.SGD, [np.ones(3)], COMM)
    if RANK == SIZE - 1:
        raise ValueError("on one rank alone")
    sharded.step(grads=[np.ones(3)])
    return ""


if __name__ == "__main__":
    case, *arguments = sys.argv[1:]
    simple = {f.__name__: f for f in (averaged, errors, apart, more_parameters, alone)}
    if case == "trained":
        result = trained(arguments[0], int(arguments[1]), int(arguments[2]))
    elif case == "all":
        result = " ".join(bits(name) for name in OPTIMIZERS)
        for name, function in simple.items():
            if name != "alone":
                function()
    else:
        result = simple[case]()
    if RANK == 0:
        print(result)
