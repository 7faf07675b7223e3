"""pyopt.torch under FSDP2, where parameters are DTensors. Run as a script, it is one of two processes with gloo."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torch_or_skip import optim, same_bits, torch

import torch.distributed.checkpoint as dcp  # isort: skip
import torch.distributed.checkpoint.state_dict as dcp_state  # isort: skip
from torch.distributed.device_mesh import init_device_mesh  # isort: skip

dist = torch.distributed
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)
fsdp = pytest.importorskip("torch.distributed.fsdp")
tensor = pytest.importorskip("torch.distributed.tensor", reason="torch before 2.5")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("torch before 2.6", allow_module_level=True)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01},
}


# --- in each of the processes -----------------------------------------------------------------------------------------


def sharded_model(dtype: Any = torch.float32) -> Any:
    """Layers that do not divide evenly: the shards of one are empty in a process."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).to(dtype)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fsdp.fully_shard(layer, mesh=mesh)
    return model


def backward(model: Any, step: int) -> None:
    """From other data in each process."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    x = torch.randn(4, 5, generator=generator).to(next(model.parameters()).dtype)
    model(x).square().mean().backward()


def full(value: Any) -> Any:
    return (value.full_tensor() if isinstance(value, tensor.DTensor) else value).detach().clone()


def assert_same_as_whole(model: Any, ours: Any, whole: Any) -> None:
    """The shards hold the bits of the optimizer on the tensors that were never cut, parameters and state."""
    for p, q in zip(model.parameters(), whole.param_groups[0]["params"], strict=True):
        assert same_bits(full(p), q.detach())
        assert ours.state[p].keys() == whole.state[q].keys()
        for name, value in whole.state[q].items():
            got = ours.state[p][name]
            assert same_bits(full(got), value), name
            assert name == "step" or (isinstance(got, tensor.DTensor) and got.placements == p.placements)


def bits_of_the_unsharded_step() -> None:
    for dtype in (torch.float32, torch.float64):
        for name, options in OPTIMIZERS.items():
            model = sharded_model(dtype)
            ours = getattr(optim, name)(model.parameters(), **options)
            whole = getattr(optim, name)([torch.nn.Parameter(full(p)) for p in model.parameters()], **options)
            for step in range(3):
                backward(model, step)
                for p, q in zip(model.parameters(), whole.param_groups[0]["params"], strict=True):
                    assert isinstance(p.grad, tensor.DTensor)
                    q.grad = full(p.grad)
                versions = [p._version for p in model.parameters()]
                ours.step()
                whole.step()
                assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
                assert_same_as_whole(model, ours, whole)


def checkpoints() -> None:
    """Through torch.distributed.checkpoint and back, ours and torch's in both roles; whole state dicts as well."""
    for name, options in OPTIMIZERS.items():
        for saver, loader in ((optim, torch.optim), (torch.optim, optim), (optim, optim)):
            model = sharded_model()
            first = getattr(saver, name)(model.parameters(), **options)
            for step in range(2):
                backward(model, step)
                first.step()
            folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(folder)
            saved = dict(zip(("model", "optim"), dcp_state.get_state_dict(model, first), strict=True))
            dcp.save(saved, checkpoint_id=folder[0])
            other = sharded_model()
            second = getattr(loader, name)(other.parameters(), **options)
            empty = dict(zip(("model", "optim"), dcp_state.get_state_dict(other, second), strict=True))
            dcp.load(empty, checkpoint_id=folder[0])
            dcp_state.set_state_dict(other, second, model_state_dict=empty["model"], optim_state_dict=empty["optim"])
            assert_close(model, first, other, second, bits=True)

            third = getattr(loader, name)(other.parameters(), **options)
            whole = dcp_state.StateDictOptions(full_state_dict=True)
            # A copy: what torch hands out holds the step counts themselves.
            state_dict = copy.deepcopy(dcp_state.get_optimizer_state_dict(model, first, options=whole))
            dcp_state.set_optimizer_state_dict(other, third, state_dict, options=whole)
            assert_close(model, first, other, third, bits=True)
            for m, optimizer in ((model, first), (other, third)):
                backward(m, 2)
                optimizer.step()
            assert_close(model, first, other, third, bits=saver is loader)


def assert_close(model: Any, first: Any, other: Any, second: Any, bits: bool) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(full(p), full(q)) if bits else torch.allclose(full(p), full(q), rtol=1e-4, atol=1e-6)
        assert first.state[p].keys() == second.state[q].keys()
        for name, value in first.state[p].items():
            a, b = full(value), full(second.state[q][name])
            assert same_bits(a, b) if bits else torch.allclose(a, b, rtol=1e-4, atol=1e-6), (name, a, b)


def other_placements() -> None:
    """Gradients or state that are placed otherwise than their parameter, beside plain tensors: as torch steps them."""
    for name, options in OPTIMIZERS.items():
        for what in ("gradient", "state"):
            results = []
            for module in (optim, torch.optim):
                model = sharded_model()
                plain = torch.nn.Parameter(torch.ones(3))
                optimizer = getattr(module, name)([*model.parameters(), plain], **options)
                for step in range(3):
                    backward(model, step)
                    plain.grad = torch.ones(3)
                    p = next(model.parameters())
                    if what == "gradient" and step == 1:
                        p.grad = tensor.distribute_tensor(full(p.grad), p.device_mesh, [tensor.Replicate()])
                    if what == "state" and step == 1:
                        key = "momentum_buffer" if name == "SGD" else "exp_avg"
                        optimizer.state[p][key] = tensor.distribute_tensor(
                            full(optimizer.state[p][key]), p.device_mesh, [tensor.Replicate()]
                        )
                    try:
                        optimizer.step()
                    except Exception as error:
                        results.append(type(error))
                        break
                else:
                    results.append([full(p) for p in (*model.parameters(), plain)])
            if isinstance(results[1], type):
                assert results[0] is results[1], results
            else:
                torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


# --- the processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [bits_of_the_unsharded_step, checkpoints, other_placements])
def test_on_two_processes(work: Callable[[], None], tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", __file__, work.__name__, str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for output in outputs:
        assert "this process is through" in output, "\n".join(outputs)


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[3]), world_size=2)
    globals()[sys.argv[1]]()
    dist.barrier()
    print("this process is through", flush=True)
    dist.destroy_process_group()
