"""Train a small language model on the Python standard library's sources, byte by byte.

A GPT-2 of 4 layers, width 128 and 128 positions, with 0.83 million parameters. A file of the library is held out for validation
if the CRC of its path says so (one in twenty), so that everybody who has the library has the same split. The float16 weights in
examples/byte_lm, on which tests and benchmarks measure compression and attention, are what

    python examples/train_byte_lm.py --steps 1800 --folder examples/byte_lm

writes in some ten minutes on two cores (seeded; the library of Python 3.11). Without options it trains for some seconds, to a
folder that it throws away.
"""

from __future__ import annotations

import argparse
import logging
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

LIBRARY = Path(sysconfig.get_path("stdlib"))
SHIPPED = Path(__file__).parent / "byte_lm"
LENGTH = 128
"""Tokens in a window."""


def corpus(held_out: bool) -> Tensor:
    """The bytes of the library's sources, tests and installed packages left out: [n], uint8.

    Args:
        held_out: the twentieth that training does not see, or the rest.
    """
    ignored = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = sorted(file.relative_to(LIBRARY).as_posix() for file in LIBRARY.rglob("*.py"))
    names = [name for name in names if not ignored & set(name.split("/"))]
    kept = [name for name in names if (zlib.crc32(name.encode()) % 20 == 0) == held_out]
    data = b"\n".join((LIBRARY / name).read_bytes() for name in kept)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def windows(data: Tensor, batches: int, size: int, seed: int = 0) -> Iterator[Tensor]:
    """Batches of windows cut from the corpus at random places: each [size, LENGTH], int64."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        starts = torch.randint(len(data) - LENGTH, (size, 1), generator=generator)
        yield data[starts + torch.arange(LENGTH)].long()


@torch.no_grad()
def cross_entropy(model: torch.nn.Module, data: Tensor, batches: int = 16, size: int = 64) -> float:
    """Nats per byte on windows of the data, the same windows at every call."""
    model.eval()
    losses = [model(ids, labels=ids).loss.item() for ids in windows(data, batches, size, seed=1)]
    return sum(losses) / len(losses)


def train(steps: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    end = {"bos_token_id": 0, "eos_token_id": 0}
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4, **quiet, **end)
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step, ids in enumerate(windows(corpus(held_out=False), steps, size=32)):
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(steps // 10, 1) == 0 or step == steps - 1:
            print(f"step {step:5}: {loss.item():.3f} nats per byte")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, held_out = train(options.steps), corpus(held_out=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "byte_lm"
        model.half().save_pretrained(folder)
        again = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    print(f"validation: {cross_entropy(again, held_out):.4f} nats per byte")
    if SHIPPED.exists():
        shipped = GPT2LMHeadModel.from_pretrained(SHIPPED, dtype=torch.float32)
        print(f"the shipped weights: {cross_entropy(shipped, held_out):.4f}")


if __name__ == "__main__":
    main()
