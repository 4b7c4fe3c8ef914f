"""A model rewritten in place trains under DDP and FSDP2, on two processes, as it does alone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import tautomer

WORKER = """
import sys, torch, torch.distributed as dist, transformers, tautomer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

folder, rank, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
model, batch, wanted = torch.load(f"{folder}/job.pt", weights_only=False)
optimizer_of = lambda module: torch.optim.AdamW(module.parameters(), lr=0.01)
if how == "ddp":
    wrapped = DistributedDataParallel(model)
else:
    for block in model.transformer.h:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = optimizer_of(wrapped)
for _ in range(2):
    optimizer.zero_grad()
    wrapped(input_ids=batch[rank : rank + 1]).logits.square().mean().backward()
    optimizer.step()
full = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
worst = max((full(p).detach() - wanted[name]).abs().max().item() for name, p in model.named_parameters())
exchanged = sum("Rewritten" in type(m).__name__ for m in model.modules())
print("worst", worst, "exchanged", exchanged, flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def trained(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters after two steps of AdamW on the whole batch, in one process."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        twin(input_ids=batch).logits.square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in twin.named_parameters()}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("job")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=20, use_cache=False,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model, batch = transformers.GPT2LMHeadModel(config).double().train(), torch.arange(10).view(2, 5)
    done = tautomer.optimize_(model, (), {"input_ids": batch}, target="onnxruntime")
    assert done.report.fired("layer-norm-to-rms-norm") == 5
    torch.save((model, batch, trained(model, batch)), folder / "job.pt")
    (folder / "worker.py").write_text(WORKER)
    return folder


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_make_the_step_that_one_makes(job: Path, how: str, tmp_path: Path) -> None:
    (tmp_path / "job.pt").symlink_to(job / "job.pt")
    command = [sys.executable, str(job / "worker.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    for worker in workers:
        out, error = worker.communicate(timeout=600)
        assert worker.returncode == 0, error[-3000:]
        _, worst, _, exchanged = out.split()
        assert float(worst) < 1e-12 and int(exchanged) == 8
