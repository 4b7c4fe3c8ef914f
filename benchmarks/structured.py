"""Structured feedforward layers in a small language model over bytes, trained from scratch: starts, and self-guided training.

    python benchmarks/structured.py --steps 400        half an hour on one CPU thread

The model is that of examples/train_byte_lm.py; of the parameters of its feedforward matrices 31% are left. Every row is trained
on the same windows with the same optimizer. Self-guided training leads by dense matrices for the first half of the steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tautomer.nn import SelfGuidance, replace_linears
from tautomer.rewrite.structured import BlockDense, BlockShuffle, Form, LowRank

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from train_byte_lm import LENGTH, corpus, cross_entropy, windows

D = 128


def fresh(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=D, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0, **quiet
    )
    return GPT2LMHeadModel(config)


def train(model: nn.Module, steps: int, size: int, data: torch.Tensor, guide: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    guidance = SelfGuidance(model, steps // 2, optimizers=[optimizer]) if guide else None
    model.train()
    for ids in windows(data, steps, size):
        model(ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if guidance is not None:
            guidance.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, held_out = corpus(held_out=False), corpus(held_out=True)
    rows: tuple[tuple[str, Form | None, str, bool], ...] = (
        ("dense", None, "", False),
        ("LowRank(32), plain", LowRank(D // 4), "plain", False),
        ("LowRank(32), spectral", LowRank(D // 4), "spectral", False),
        ("LowRank(32), spectral, self-guided", LowRank(D // 4), "spectral", True),
        ("BlockDense(2, 42), orthogonal", BlockDense(2, 42), "orthogonal", False),
        ("BlockShuffle(4), orthogonal", BlockShuffle(4), "orthogonal", False),
        ("BlockShuffle(4), orthogonal, self-guided", BlockShuffle(4), "orthogonal", True),
    )
    print(f"{options.steps} steps of {options.size} windows, seeds 0 to {options.seeds - 1}")
    print("| feedforward matrices | parameters | nats per byte |\n|---|---|---|")
    for name, form, init, guide in rows:
        losses, count = [], 0
        for seed in range(options.seeds):
            model = fresh(seed)
            if form is not None:
                replace_linears(
                    model, form, ["transformer.h.*.mlp"], init=init, std=0.02 if init == "plain" else None, guide=guide
                )  # type: ignore[arg-type]
            train(model, options.steps, options.size, data, guide)
            count = sum(p.numel() for block in model.transformer.h for p in block.mlp.parameters() if p.ndim > 1)
            losses.append(cross_entropy(model, held_out, batches=4))
        spread = f" ({', '.join(f'{loss:.3f}' for loss in losses)})" if len(losses) > 1 else ""
        print(f"| {name} | {count:,} | {sum(losses) / len(losses):.3f}{spread} |", flush=True)


if __name__ == "__main__":
    main()
