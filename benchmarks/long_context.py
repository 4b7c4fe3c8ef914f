"""What a cheaper form of attention costs a trained model, and what it costs itself as sequences grow.

    python benchmarks/long_context.py                                     quality on the shipped model over bytes: minutes
    python benchmarks/long_context.py --time --longest 32768              time against n, and of a decoded token: 12 heads of 64
    python benchmarks/long_context.py --rows window --batches 2           a small run
    python benchmarks/long_context.py --learn 250                         quality of forms that learn: minutes a row

Quality: the cross-entropy of the model of examples/byte_lm (4 layers, 128 positions) on sources it was not trained on, every
attention replaced, nothing trained; with ``--learn``, the new weights trained for so many steps of 16 windows of sources that the
model was trained on. Time: medians of calls that alternate with ``scaled_dot_product_attention``, and the exponent of n that fits
them. A row is a name, a method and its options.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import tautomer
from tautomer.passes.attention.feature_maps import Elu, Hedgehog, LogNormal, Relu
from tautomer.passes.attention.substitutes import METHODS
from tautomer.passes.attention.transfer import Transfer
from tautomer.rewrite.attentions import Masking

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train_byte_lm import SHIPPED, corpus, windows

Row = tuple[str, str, dict[str, Any]]
QUALITY: tuple[Row, ...] = (
    ("window 64", "window", {"window": 64, "sinks": 0}),
    ("window 32", "window", {"window": 32, "sinks": 0}),
    ("window 16", "window", {"window": 16, "sinks": 0}),
    ("window 16, 4 sinks", "window", {"window": 16, "sinks": 4}),
    ("Loki, 1/4 of the keys, d/8", "loki", {"keys": 0.25, "rank": 4, "gather": False}),
    ("Loki, 1/8 of the keys, d/4", "loki", {"keys": 0.125, "rank": 8, "gather": False}),
    ("HyperAttention, leaf 64, block 16, 16 samples", "hyper", {"leaf": 64, "block": 16, "samples": 16}),
    ("HyperAttention, leaf 32, block 16, 16 samples", "hyper", {"leaf": 32, "block": 16, "samples": 16}),
)
LEARNT: tuple[Row, ...] = (
    ("hybrid, window 16", "hybrid", {"window": 16}),
    ("hybrid, window 32", "hybrid", {"window": 32}),
    ("kernel, Hedgehog", "kernel", {"feature_map": Hedgehog()}),
    ("kernel, T2R", "kernel", {"feature_map": Relu()}),
    ("kernel, elu + 1 (learns nothing)", "kernel", {"feature_map": Elu()}),
    ("kernel, LLN (learns nothing)", "kernel", {"feature_map": LogNormal()}),
    ("kernel, LLN and softmax in blocks of 32 (learns nothing)", "kernel", {"feature_map": LogNormal(), "diagonal": 32}),
    ("gated, window 32 (learns nothing)", "gated", {"window": 32, "architecture": True}),
)
TIME: tuple[Row, ...] = (
    ("window 256, 4 sinks", "window", {}),
    ("HyperAttention", "hyper", {}),
    ("Nyström, 64 landmarks", "nystrom", {}),
    ("Linformer, 64 slots", "linformer", {"longest": 65536, "architecture": True}),
    ("PoNet, 16 segments", "ponet", {"architecture": True}),
    ("PoolFormer, a line", "poolformer", {"grid": (), "architecture": True}),
    ("Loki, gathered", "loki", {"keys": 256, "rank": 16}),
    ("kernel, Hedgehog", "kernel", {"architecture": True}),
    ("hybrid, window 64", "hybrid", {"architecture": True}),
    ("gated, window 64", "gated", {"architecture": True}),
)
LONGEST = {"loki": 4096}
"""Where a form is not tried at every length: Loki holds a score for every pair of positions."""
STEPPED = {"window", "kernel", "hybrid", "gated"}
"""Methods with a state."""
PATIENCE = 4.0
"""Seconds."""


@torch.no_grad()
def cross_entropy(model: Callable[[Tensor], Any], data: Sequence[Tensor]) -> float:
    """Nats per byte."""
    losses = [F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() for ids in data]
    return statistics.fmean(losses)


def quality(rows: Sequence[Row], batches: int, steps: int) -> None:
    model = GPT2LMHeadModel.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    model.config.use_cache = False
    measured = list(windows(corpus(held_out=True), batches, 64, seed=1))
    calibration = list(windows(corpus(held_out=False), 2, 32, seed=2))
    if steps:  # one call in eight is held out
        calibration = list(windows(corpus(held_out=False), steps + steps // 7 + 1, 16, seed=5))
        learns = {name: {} if "architecture" in options else {"transfer": Transfer(steps=steps)} for name, _, options in rows}
        rows = [(name, method, {**options, **learns[name]}) for name, method, options in rows]
    dense = cross_entropy(model, measured)
    print(f"{len(measured) * 64} windows of 128 bytes\n\n| form | nats per byte | over attention | KL |\n|---|---|---|---|")
    print(f"| attention | {dense:.4f} | – | – |")
    for name, method, options in rows:
        recipe = tautomer.LongContext(method, **options)
        fast = tautomer.optimize(model, (calibration[0][:2],), recipe=recipe, data=calibration)
        assert fast.report.fired(recipe.substitute.name) == 4, fast.report
        moved = fast.report.attentions[0].moved
        assert moved is not None
        loss = cross_entropy(fast, measured)
        print(f"| {name} | {loss:.4f} | {loss - dense:+.4f} | {moved.mean:.2e} |", flush=True)


class Core(nn.Module):
    """Attention of 12 heads of 64 over ``[batch, n, 3 · 768]``, queries, keys and values side by side as a layer writes them."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (12, 64)).transpose(1, 2) for y in x.chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


def seconds(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def lengths(longest: int) -> list[int]:
    return [2**i for i in range(10, longest.bit_length())]


@torch.no_grad()
def time(rows: Sequence[Row], longest: int, repeats: int) -> None:
    """Each round calls every form once. What takes longer than ``PATIENCE`` is called once in all."""
    forms: dict[str, tuple[nn.Module, str, int]] = {}
    for name, method, options in rows:
        causal = Masking.CAUSAL in METHODS[method].represents
        example = (torch.randn(1, 1024, 3 * 768),)
        core, baseline = Core(causal).eval(), "attention, causal" if causal else "attention"
        forms.setdefault(baseline, (core, baseline, longest))
        rewrite, data = METHODS[method](**options), None if options.get("architecture") else [example]
        fast = tautomer.optimize(core, example, passes=[rewrite], data=data, check=False)
        assert fast.report.fired(rewrite.name) == 1, fast.report
        forms[name] = (fast, baseline, min(longest, LONGEST.get(method, longest)))
    found: dict[str, dict[int, float]] = {name: {} for name in forms}
    for n in lengths(longest):
        x = torch.randn(1, n, 3 * 768)
        taken = {name: [seconds(partial(form, x))] for name, (form, _, most) in forms.items() if n <= most}
        for _ in range(repeats):
            for name, times in taken.items():
                if times[0] < PATIENCE:
                    times.append(seconds(partial(forms[name][0], x)))
        for name, times in taken.items():
            found[name][n] = 1e3 * statistics.median(times[1:] or times)
    print(
        f"medians of {repeats} rounds in milliseconds (one call where that takes more than {PATIENCE:.0f} s), 12 heads of 64, "
        f"float32, {torch.get_num_threads()} thread(s)\n"
    )
    print("| form | " + " | ".join(map(str, lengths(longest))) + " | exponent | faster at the last |")
    print("|---" * (len(lengths(longest)) + 3) + "|")
    for name, (_, baseline, most) in forms.items():
        cells = [f"{found[name][n]:.1f}" if n in found[name] else "–" for n in lengths(longest)]
        ratio = found[baseline][most] / found[name][most]
        print(f"| {name} | {' | '.join(cells)} | {exponent(found[name]):.2f} | {ratio:.1f} × |")


@torch.no_grad()
def decoding(rows: Sequence[Row], longest: int, repeats: int) -> None:
    """Milliseconds per token behind so many positions, one layer of 12 heads of 64 with its feedforward layer."""
    print(f"\nmedians of {8 * repeats} steps in milliseconds, and megabytes of state, {torch.get_num_threads()} thread(s)\n")
    print(
        "| decoding | "
        + " | ".join(map(str, lengths(longest)))
        + " | MB at the last |\n"
        + "|---" * (len(lengths(longest)) + 2)
        + "|"
    )
    sizes = {"n_positions": 2 * longest, "n_embd": 768, "n_layer": 1, "n_head": 12}
    config = GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, use_cache=False, **sizes)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(256, (1, longest))
    for name, method, options in (("attention", "", {}), *rows):
        if method and method not in STEPPED:
            continue
        recipe = tautomer.LongContext(method, **options) if method else "inference"
        decoder = tautomer.decoder(tautomer.optimize(model, (ids[:, :1024],), recipe=recipe, check=False), check=False)
        cells, held = list[str](), 0
        for n in lengths(longest):
            if decoder.constant:
                _, state = decoder.prefill(ids[:, :n])
            else:  # keys and values of any numbers: to compute them all would take longer than all the rest
                _, state = decoder.prefill(ids[:, :2])
                state = replace(state, position=n, tensors=tuple(torch.randn(1, 12, n, 64) for _ in state.tensors))
            taken = [seconds(partial(decoder.step, ids[:, 0], state)) for _ in range(8 * repeats + 1)][1:]
            cells.append(f"{1e3 * statistics.median(taken):.2f}")
            held = state.bytes
        print(f"| {name} | {' | '.join(cells)} | {held / 1e6:.1f} |", flush=True)


def exponent(found: Mapping[int, float]) -> float:
    """The slope of log time against log n."""
    if len(found) < 2:
        return math.nan
    return statistics.linear_regression([math.log(n) for n in found], [math.log(x) for x in found.values()]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="time instead of quality")
    parser.add_argument("--rows", help="only rows whose name has this in it")
    parser.add_argument("--batches", type=int, default=16, help="of 64 windows each, for quality")
    parser.add_argument("--learn", type=int, default=0, help="steps of attention transfer, for the quality of forms that learn")
    parser.add_argument("--longest", type=int, default=8192, help="the longest sequence, for time")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, for time")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    every = TIME if options.time else LEARNT if options.learn else QUALITY
    rows = [row for row in every if (options.rows or "").lower() in row[0].lower()]
    if options.time:
        time(rows, options.longest, options.repeats)
        decoding(rows, options.longest, options.repeats)
    else:
        quality(rows, options.batches, options.learn)


if __name__ == "__main__":
    main()
