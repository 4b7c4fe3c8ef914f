"""Fine-tune a model that keeps less for its backward: with the same losses, or with two bits per entry and almost the same.

The language model over bytes of train_byte_lm.py learns to write sources backwards, through adapters on its attention (LoRA,
dropout and all). Original, exact and approximate form start from the same weights, with the same seed. Losses and bytes are
printed and drawn. Takes about half a minute.

    python examples/05_finetune_with_less_memory.py [--picture losses.svg]
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from train_byte_lm import SHIPPED, corpus, windows
from transformers import GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

import tautomer

STEPS, BATCH = 24, 4
COLOURS = {"original": "#8a8a8a", "exact": "#2e6fb0", "approximate": "#b03a2e"}


@dataclass(frozen=True)
class Run:
    """What one form kept for its backward, and the loss of every step in nats per byte."""

    bytes: int
    losses: list[float]


def quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks by the old name


def adapted() -> nn.Module:
    model = GPT2LMHeadModel.from_pretrained(SHIPPED, dtype=torch.float32, use_cache=False)
    lora = peft.LoraConfig(r=8, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(model, lora).train()


def batches(size: int, count: int) -> Iterator[dict[str, Tensor]]:
    for ids in windows(corpus(held_out=True), count, size):
        backwards = ids.flip(-1)
        yield {"input_ids": backwards, "labels": backwards}


def train(model: nn.Module) -> list[float]:
    torch.manual_seed(0)  # the same dropout
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for batch in batches(BATCH, STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def picture(runs: dict[str, Run]) -> str:
    """Losses as curves, kept bytes as bars: an SVG file."""
    width, height, left, top = 420, 220, 50, 40
    low = min(min(run.losses) for run in runs.values())
    high = max(max(run.losses) for run in runs.values())
    most = max(run.bytes for run in runs.values())
    ink = [f'<text x="{left}" y="24">loss, nats per byte ({STEPS} steps)</text>',
           f'<text x="{left + width + 60}" y="24">kept for the backward</text>',
           f'<path d="M {left} {top} V {top + height} H {left + width}" fill="none" stroke="#555555"/>']  # fmt: skip
    ink += [
        f'<text x="{left - 6}" y="{y}" text-anchor="end">{value:.2f}</text>'
        for value, y in ((high, top + 4), (low, top + height))
    ]
    for i, (name, run) in enumerate(runs.items()):
        points = " ".join(
            f"{left + width * step / (STEPS - 1):.1f},{top + height * (high - loss) / (high - low):.1f}"
            for step, loss in enumerate(run.losses)
        )
        # The original is drawn first and broad: a curve on top of it is the same curve.
        thickness = 6 if i == 0 else 1.5
        ink.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="{thickness}"/>')
        x, tall = left + width + 60 + 90 * i, height * run.bytes / most
        ink.append(f'<rect x="{x}" y="{top + height - tall:.1f}" width="60" height="{tall:.1f}" fill="{COLOURS[name]}"/>')
        label = f"{run.bytes / 2**20:.1f} MiB"
        ink.append(f'<text x="{x + 30}" y="{top + height - tall - 6:.1f}" text-anchor="middle">{label}</text>')
        ink.append(f'<text x="{x + 30}" y="{top + height + 18}" text-anchor="middle" fill="{COLOURS[name]}">{name}</text>')
    size = f'width="{left + width + 350}" height="{top + height + 40}"'
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>', *ink, "</svg>\n",
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path, help="where to write the picture; otherwise it is thrown away")
    options = parser.parse_args()
    quiet()
    model, call = adapted(), next(batches(BATCH, 1))
    program = tautomer.capture(model, kwargs=call, mode="both")  # once, for both recipes

    def finetuning(exact: bool) -> nn.Module:
        return copy.deepcopy(tautomer.optimize(program, recipe=tautomer.Finetune(exact=exact)))  # with weights of its own

    forms = {"original": model, "exact": finetuning(True), "approximate": finetuning(False)}
    kept = [tautomer.saved_tensors(form).bytes for form in (program, forms["exact"], forms["approximate"])]
    runs = {name: Run(size, train(form)) for (name, form), size in zip(forms.items(), kept, strict=True)}
    base = runs["original"]
    gaps = {name: max(abs(a - b) for a, b in zip(run.losses, base.losses, strict=True)) for name, run in runs.items()}
    for name, run in runs.items():
        print(f"{name:<12} keeps {run.bytes:>11,} bytes ({run.bytes / base.bytes:.3f}); "
              f"loss {run.losses[0]:.4f} → {run.losses[-1]:.4f}, at most {gaps[name]:.1e} from the original's")  # fmt: skip
    assert gaps["exact"] < 1e-5 and gaps["approximate"] < 0.1
    with tempfile.TemporaryDirectory() as scratch:
        file = options.picture or Path(scratch) / "losses.svg"
        file.write_text(picture(runs))
        print(f"picture: {file if options.picture else 'drawn and thrown away; --picture FILE keeps it'}")


if __name__ == "__main__":
    main()
