"""What a language model loses when its linear layers get a low rank: the shipped model, in nats per byte over the dense one.

    python benchmarks/lowrank.py                    all linear layers at 0.8, 0.6 and 0.4 of their parameters; FFN alone at 0.32
    python benchmarks/lowrank.py --ratios 0.6 --ffn 0 --recover 200

Peers in the same run, all of them through ``FactorLinears``: the plain SVD; a scale per channel, rms(x)^0.5 (the form of ASVD,
arXiv:2312.05821: a diagonal covariance); the whole covariance at one ratio in every layer (SVD-LLM with its bias corrected,
arXiv:2403.07378), and with the budget where measured losses send it; ours, with errors counted by what the outputs lose, and with
the layers fitted in order, each behind the factored ones before it. Ranks are multiples of 8 only where it says so.
``--generations`` adds a search, ``--recover`` trains each for some steps of AdamW, on other windows of the text that the model
was trained on. Parameters are those of the whole model, seconds those of the rewrite.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from train_byte_lm import SHIPPED, corpus, cross_entropy, windows
from transformers import GPT2LMHeadModel

import tautomer
from tautomer.passes.lowrank.factor_linears import FactorLinears
from tautomer.rewrite.factors import Factors, factor
from tautomer.rewrite.program import Program


class ScaledLinears(FactorLinears):
    """The covariance without what is off its diagonal, and the square root of that."""

    def _factors(self, found: Any, program: Program, seen: Any, weighed: Any) -> list[Factors]:
        scales = [torch.diag((seen[c.x].second.diagonal() / seen[c.x].count).sqrt()) for c in found]
        return [factor(c.value(program), scale) for c, scale in zip(found, scales, strict=True)]


class Labelled(nn.Module):
    """The loss that ``cross_entropy`` of the example asks a model for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        output = self.model(input_ids=ids)
        output.loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


def recover(model: nn.Module, text: Tensor, steps: int, size: int, rate: float) -> None:
    """AdamW on windows that no row was calibrated on, the same for every row. The rate falls to nothing, its noise with it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    labelled = Labelled(model)  # captured in eval mode; the model drops nothing out
    for ids in windows(text, steps, size, seed=2):
        labelled(ids, ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.8, 0.6, 0.4])
    parser.add_argument("--ffn", type=float, default=0.32, help="the ratio of the FFN alone; 0 leaves it out")
    parser.add_argument("--ways", nargs="*", help="only these rows")
    parser.add_argument("--generations", type=int, default=0)
    parser.add_argument("--batches", type=int, default=16, help="of 16 windows, to calibrate on")
    parser.add_argument("--evaluate", type=int, default=16, help="batches of 64 windows")
    parser.add_argument("--recover", type=int, default=0, help="steps of training afterwards")
    parser.add_argument("--rate", type=float, default=3e-5, help="of it, at its highest")
    parser.add_argument("--size", type=int, default=4, help="windows in a step of it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = GPT2LMHeadModel.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    model.config.use_cache = False
    text, held_out = corpus(held_out=False), corpus(held_out=True)
    data = [{"input_ids": ids} for ids in windows(text, options.batches, 16)]
    dense = cross_entropy(Labelled(model), held_out, options.evaluate)
    print(f"dense: {dense:.4f} nats per byte on sources that nothing was trained, calibrated or searched on\n")
    print(f"| layers | way | over dense |{f' after {options.recover} steps |' if options.recover else ''} parameters | seconds |")
    print(f"|{'---|' * (6 if options.recover else 5)}")
    if options.recover:
        trained = copy.deepcopy(model)
        recover(trained, text, options.recover, options.size, options.rate)
        after = cross_entropy(Labelled(trained), held_out, options.evaluate) - dense
        print(f"| none | dense | 0 | {after:+.4f} | {sum(p.numel() for p in model.parameters()):,} | 0 |", flush=True)
    ffn = [f"transformer.h.{layer}.mlp" for layer in range(model.config.n_layer)]
    jobs = [("all", ratio, ()) for ratio in options.ratios] + ([("FFN", options.ffn, ffn)] if options.ffn else [])
    for what, ratio, only in jobs:
        ways: dict[str, tuple[FactorLinears, Any]] = {
            "plain SVD": (FactorLinears(ratio, multiple=1), None),
            "scaled": (ScaledLinears(ratio, allocation="uniform", error="layer", multiple=1), data),
            "whitened, uniform": (FactorLinears(ratio, allocation="uniform", error="layer", multiple=1), data),
            "whitened, measured": (FactorLinears(ratio, allocation="measured", error="layer", multiple=1), data),
            "ours, uniform": (FactorLinears(ratio, allocation="uniform", multiple=1), data),
            "ours, threshold": (FactorLinears(ratio, allocation="threshold", multiple=1), data),
            "ours": (FactorLinears(ratio, multiple=1), data),
            "ours, ranks of 8": (FactorLinears(ratio), data),
            "ours, in order": (FactorLinears(ratio, multiple=1, sequential=True), data),
        }
        if options.generations:
            ways["ours, searched"] = (FactorLinears(ratio, multiple=1, generations=options.generations), data)
        chosen = {name: way for name, way in ways.items() if not options.ways or name in options.ways}
        for name, (rewrite, calls) in chosen.items():
            start = perf_counter()
            passes = [rewrite, "drop-dead-code", "drop-unused-weights", "name-weights"]
            example = {"input_ids": data[0]["input_ids"][:2]}
            # What stays dense is shared with the model, and must not be trained for the next row.
            mine = copy.deepcopy(model) if options.recover else model
            fast = tautomer.optimize(mine, (), example, passes=passes, data=calls, only=only)
            seconds = perf_counter() - start
            row = [f"{what} at {ratio}", name, f"{cross_entropy(Labelled(fast), held_out, options.evaluate) - dense:+.4f}"]
            if options.recover:
                recover(fast, text, options.recover, options.size, options.rate)
                row.append(f"{cross_entropy(Labelled(fast), held_out, options.evaluate) - dense:+.4f}")
            row += [f"{fast.report.after.parameters:,}", f"{seconds:.0f}"]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
