"""Rules with sums over whole tensors, in pyopt.torch: what torch's own step does not know of must not get lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyopt
from cases import assert_same_bits
from torch_or_skip import assert_formula_is_the_kernels, new_parameters, optim, torch

ADAMS = pytest.mark.parametrize("name", ["Adam", "AdamW"])
OPTIONS = pytest.mark.parametrize(
    "options",
    [{"update_clip": True}, {"cautious": True}, {"update_clip": True, "cautious": True, "amsgrad": True}],
    ids=lambda options: "-".join(options),
)


def gradients(params: list[Any], step: int) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10 ** (step % 3)).to(p.dtype)


@ADAMS
@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_of_the_numpy_side(name: str, options: dict[str, Any], dtype: Any) -> None:
    tensors = new_parameters((50, 40), (7,), (), dtype=dtype)
    arrays = [pyopt.Parameter(t.detach().numpy().copy()) for t in tensors]
    ours, theirs = getattr(optim, name)(tensors, lr=0.1, **options), getattr(pyopt, name)(arrays, lr=0.1, **options)
    for step in range(6):
        gradients(tensors, step)
        ours.step()
        theirs.step(grads=[t.grad.numpy() for t in tensors])
        for p, t in zip(arrays, tensors, strict=True):
            assert_same_bits(t.detach().numpy(), p.data, f"{name} {options} step {step}")


@ADAMS
@OPTIONS
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"maximize": True}], ids=str)
def test_formula_is_the_kernels(name: str, options: dict[str, Any], decay: dict[str, Any]) -> None:
    twins = (new_parameters((50, 4), (7,), (), (0,), dtype=torch.float64) for _ in range(2))
    new = getattr(optim, name)
    assert_formula_is_the_kernels(*(new(params, lr=0.1, **options, **decay) for params in twins), gradients)


@ADAMS
def test_in_groups_beside_torchs_own_step(name: str) -> None:
    """Short types with and without the options: by the kernels, and by torch; the options are keys of groups, too."""
    wide = new_parameters((33,), (33,))
    clipped = torch.nn.Parameter(wide[0].detach().bfloat16())
    pairs = [wide[1].detach().bfloat16().repeat(2, 1).t().contiguous() for _ in range(2)]
    plain, by_torch = (torch.nn.Parameter(each[:, 1]) for each in pairs)  # do not lie side by side
    ours = getattr(optim, name)([{"params": [clipped], "update_clip": True}, {"params": [plain]}], lr=0.1)
    theirs = getattr(torch.optim, name)([by_torch], lr=0.1)
    reference = getattr(optim, name)([torch.nn.Parameter(clipped.detach().float())], lr=0.1, update_clip=True)
    (wide_clipped,) = reference.param_groups[0]["params"]
    for step in range(3):
        gradients([clipped, plain], step)
        by_torch.grad = plain.grad.clone()
        wide_clipped.grad = clipped.grad.float()
        for optimizer in (ours, theirs, reference):
            optimizer.step()
        assert torch.equal(plain, by_torch)
        torch.testing.assert_close(clipped.float(), wide_clipped, rtol=2**-6, atol=1e-2)


@ADAMS
def test_groups_are_torchs_unless_an_option_is_set(name: str) -> None:
    (p,) = new_parameters((3,))
    assert getattr(optim, name)([p]).state_dict() == getattr(torch.optim, name)([p]).state_dict()
    optimizer = getattr(optim, name)([p], cautious=True)
    assert optimizer.defaults["cautious"] is True and optimizer.param_groups[0]["update_clip"] is False
    optimizer.add_param_group({"params": new_parameters((2,))})
    assert optimizer.param_groups[1]["cautious"] is True
    with pytest.raises(TypeError, match="cautious == 1, must be a bool"):
        getattr(optim, name)([p], cautious=1)


@ADAMS
def test_what_has_no_formula_is_refused(name: str) -> None:
    """Before anything has changed; torch's step would leave the options out."""
    p, q = new_parameters((3,), (3,))
    groups: list[Any] = [{"params": [p]}, {"params": [q], "cautious": True, "differentiable": True}]
    optimizer = getattr(optim, name)(groups)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=f"{name} has no formula for differentiable=True"):
        optimizer.step()
    optimizer.param_groups[1]["differentiable"] = False
    q.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state.get(p)


def test_prodigy_is_one_step_by_formula_where_a_kernel_lacks(capsys: Any) -> None:
    """One d: a parameter that the kernels leave takes all others along, and explain says so."""
    same = new_parameters((20,), (30,), dtype=torch.float64)
    apart = torch.zeros(30, 2, dtype=torch.float64)
    apart[:, 0] = same[1].detach()
    mixed = [torch.nn.Parameter(same[0].detach().clone()), torch.nn.Parameter(apart[:, 0])]
    ours, reference = optim.Prodigy(mixed, d0=1e-2), optim.Prodigy(same, d0=1e-2)
    for _ in range(5):
        for p in (*mixed, *same):
            p.grad = p.detach().clone()
        ours.step()
        reference.step()
        assert ours.param_groups[0]["d"] == pytest.approx(reference.param_groups[0]["d"], rel=1e-11)
        for p, q in zip(mixed, same, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    assert ours.param_groups[0]["d"] > 1e-2
    optim.explain(ours)
    first, second = capsys.readouterr().out.splitlines()
    assert "torch: its step follows from sums over all parameters" in first and "side by side" in second


def test_prodigy_has_the_bits_and_d_of_the_numpy_side() -> None:
    tensors = new_parameters((50, 40), (7,))
    arrays = [pyopt.Parameter(t.detach().numpy().copy()) for t in tensors]
    ours, theirs = optim.Prodigy(tensors), pyopt.Prodigy(arrays)
    for _ in range(10):
        for t in tensors:
            t.grad = t.detach().clone()
        ours.step()
        theirs.step(grads=[t.grad.numpy() for t in tensors])
        assert ours.param_groups[0]["d"] == theirs.param_groups[0]["d"]
        for p, t in zip(arrays, tensors, strict=True):
            assert_same_bits(t.detach().numpy(), p.data, "Prodigy")
    assert ours.param_groups[0]["d"] > 1e-6
    loaded = pyopt.Prodigy([np.ones((50, 40), np.float32), np.ones(7, np.float32)])
    loaded.load_state_dict(optim.from_torch(ours.state_dict()))
    assert loaded.param_groups[0]["d"] == ours.param_groups[0]["d"]


def test_parts_of_parameters_are_refused() -> None:
    """A DTensor has a part of its elements here, and a sum over that would be taken for one over all."""
    dist = pytest.importorskip("torch.distributed.tensor")
    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        pytest.skip("no process group can be made here")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(dist.distribute_tensor(torch.ones(4, 3), mesh, [dist.Shard(0)]))
        p.grad = dist.distribute_tensor(torch.ones(4, 3), mesh, [dist.Shard(0)])
        optimizers: list[tuple[str, dict[str, Any]]] = [("LAMB", {}), ("Prodigy", {}), ("AdamW", {"cautious": True})]
        for name, options in optimizers:
            with pytest.raises(RuntimeError, match=f"{name} needs sums over whole parameters, and one is a DTensor"):
                getattr(optim, name)([p], **options).step()
        assert torch.equal(p.full_tensor(), torch.ones(4, 3))
        optim.AdamW([p], lr=0.1).step()
        assert not torch.equal(p.full_tensor(), torch.ones(4, 3))
    finally:
        torch.distributed.destroy_process_group()
