"""What the norms of a model cost, and what is left when they are rewritten or folded away.

    python benchmarks/norms.py [--layers 4] [--seconds 8] [--only eager onnxruntime]

Two tables, every figure a ratio to the LayerNorm column of its row, medians of calls that take turns in one run, one thread.
Per op: the norm alone. End to end: ViT-S/16, ViT-B/16 and GPT-2 blocks at full width, and what ``tautomer`` makes of them:

    rms          Pre-LN → Pre-RMSNorm, shifts folded          rms folded   and the gains folded too
    crms         all coordinates but the last                 narrow rms   d - 1 coordinates of an orthonormal basis
    un folded    norms with stored statistics, folded into the layers that read them: what no norm at all costs

The last is another function (its statistics come from the example); the others are equal, which tests hold, not this script.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.backends.targets import resolve
from tautomer.rewrite.measure import in_turns
from tautomer.rewrite.program import Program

TARGETS = ("eager", "inductor", "onnxruntime")
OPS: Mapping[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "layer": lambda d: lambda x: F.layer_norm(x, [d], torch.ones(d), torch.zeros(d)),
    "rms": lambda d: lambda x: F.rms_norm(x, [d], torch.ones(d), 1e-5),
    "rms without gain": lambda d: lambda x: F.rms_norm(x, [d], None, 1e-5),
    "crms": lambda d: lambda x: torch.ops.tautomer.crms_norm.v1(x[..., :-1], None, 1e-5),
    "narrow rms": lambda d: lambda x: F.rms_norm(x[..., :-1], [d - 1], None, 1e-5),
}
SHAPES = ((1, 128, 768), (8, 128, 768), (1, 197, 384), (8, 197, 384), (1, 197, 768), (8, 197, 768))
CLEANUP = ("fold-constants", "fold-weights", "drop-dead-code", "drop-unused-weights", "name-weights")
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "layer": CLEANUP,
    "rms": ("layer-norm-to-rms-norm", "fold-norm-shift", *CLEANUP),
    "rms folded": ("layer-norm-to-rms-norm", "fold-norm-shift", "fold-norm-gain", *CLEANUP),
    "crms": ("layer-norm-to-crms-norm", *CLEANUP),
    "narrow rms": ("layer-norm-to-narrow-rms-norm", *CLEANUP),
    "un folded": ("layer-norm-to-unified-norm", "fold-into-readers", *CLEANUP),
}


def vit(hidden: int, heads: int, layers: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.ViTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden, num_labels=1000
    )
    return transformers.ViTForImageClassification(config).eval(), (torch.randn(1, 3, 224, 224),)


def gpt2(layers: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.GPT2Config(n_layer=layers, use_cache=False, vocab_size=1024, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval(), (torch.randint(1024, (1, 128)),)


MODELS: Mapping[str, Callable[[int], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "ViT-S/16": lambda layers: vit(384, 6, layers),
    "ViT-B/16": lambda layers: vit(768, 12, layers),
    "GPT-2, 128 tokens": gpt2,
}


class Op(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def row(name: str, target: str, programs: Sequence[Program], inputs: Sequence[Any], seconds: float) -> str:
    runs = [resolve(target).compile(program) for program in programs]
    first, *others = in_turns(runs, inputs, 5, milliseconds=1e3 * seconds)
    figures = " | ".join(f"{other / first:.2f}" for other in others)
    return f"| {name} | {target} | {first:,.0f} µs | {figures} |"


def header(what: str, columns: Sequence[str]) -> None:
    print(f"\n| {what} | runtime | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")


def variant(program: Program, passes: tuple[str, ...]) -> Program:
    data = [program.example] if "layer-norm-to-unified-norm" in passes else None
    return tautomer.optimize(program, passes=passes, data=data, check=False).program


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", nargs="*", default=list(TARGETS), choices=TARGETS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    header("norm alone at", list(OPS))
    for shape in SHAPES:
        x = torch.randn(shape)
        programs = [tautomer.capture(Op(make(shape[-1])).eval(), (x,), dynamic_shapes="static") for make in OPS.values()]
        for target in options.only:
            print(row(str(list(shape)), target, programs, [x], options.seconds / 8), flush=True)

    header(f"{options.layers} layers of", list(VARIANTS))
    for name, make in MODELS.items():
        model, args = make(options.layers)
        program = tautomer.capture(model, args, dynamic_shapes="static")
        programs = [variant(program, passes) for passes in VARIANTS.values()]
        for target in options.only:
            print(row(name, target, programs, program.example, options.seconds), flush=True)


if __name__ == "__main__":
    main()
