"""A model rewritten in place trains under DDP and FSDP2, on two processes, as it does alone, or as the original does."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from zoo.blocks import RAISED, residual_stream

import tautomer

WORKER = """
import copy, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

folder, rank = sys.argv[1], int(sys.argv[3])
sys.path.insert(0, sys.argv[2])  # zoo.blocks
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
mesh, full = init_device_mesh("cpu", (2,)), lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
for form, (original, batch, wanted) in torch.load(f"{folder}/job.pt", weights_only=False).items():
    for how in ("ddp", "fsdp2"):
        model = copy.deepcopy(original)
        if how == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            for block in model[:-1]:
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01, eps=1e-5)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(batch[2 * rank : 2 * rank + 2]).square().mean().backward()
            optimizer.step()
        wrapped.load_state_dict(wrapped.state_dict())
        worst = max((full(p).detach() - wanted[name]).abs().max().item() for name, p in model.named_parameters())
        exchanged = sum("Rewritten" in type(m).__name__ for m in model.modules())
        print(form, how, worst, exchanged, flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)), nn.Linear(16, 16), nn.GELU(),
        nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8)), nn.Linear(8, 4),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3 + 0.1
    return model.double().train()


def trained(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters after three steps of AdamW on the whole batch, in one process."""
    twin = copy.deepcopy(model)
    # The bias of keys has no gradient but rounding, of which a smaller eps would make a step.
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, eps=1e-5)
    for _ in range(3):
        optimizer.zero_grad()
        twin(batch).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in twin.named_parameters()}


def test_two_processes_make_the_steps_that_one_makes(tmp_path: Path) -> None:
    batch, job = torch.randn(4, 5, 8, dtype=torch.float64), {}
    for recipe in ("inference", "training"):
        model = net()
        done = tautomer.optimize_(model, (batch,), recipe=recipe, target="inductor")
        assert done.report.fired("layer-norm-to-rms-norm") == 2
        job[recipe] = (model, batch, trained(model if recipe == "inference" else net(), batch))
    for form, options in (("blocks", {"passes": RAISED}), ("finetune", {"recipe": "finetune"})):
        model = residual_stream().train()
        done = tautomer.optimize_(model, (batch,), **options)
        assert {"1", "2"} <= set(done.modules)  # the blocks themselves, by code of their own
        job[form] = (model, batch, trained(residual_stream().train(), batch))
    torch.save(job, tmp_path / "job.pt")
    command = [sys.executable, "-c", WORKER, str(tmp_path), str(Path(__file__).parent.parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    for worker in workers:
        out, error = worker.communicate(timeout=600)
        assert worker.returncode == 0, error[-3000:]
        lines = [line.split() for line in out.splitlines()]
        assert [line[:2] for line in lines] == [[form, how] for form in job for how in ("ddp", "fsdp2")]
        assert all(float(worst) < 1e-12 and int(exchanged) >= 2 for _, _, worst, exchanged in lines), out
