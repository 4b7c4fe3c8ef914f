"""How much faster a feedforward layer is that keeps about 32% of its parameters: low rank, block dense, block shuffled.

    python benchmarks/ffn_speed.py                                    on a quiet machine, some minutes
    python benchmarks/ffn_speed.py --widths 256 --tokens 64 --seconds 0.2

x [tokens, d] -> linear to 4 d -> GELU -> linear to d, with the sizes that arXiv:2406.16450 gives for this share: LowRank(d/4) and
BlockShuffle(4) keep 31%, BlockDense 29 to 31%. Every figure is how often the structured layer fits into the time of the dense
one, medians of calls that take turns in one run, for ``--seconds`` and at least three rounds a row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.backends.targets import resolve
from tautomer.nn import replace_linears
from tautomer.rewrite.measure import in_turns
from tautomer.rewrite.program import Program
from tautomer.rewrite.structured import BlockDense, BlockShuffle, Form, LowRank

TARGETS = ("eager", "inductor", "onnxruntime")
FORMS: Mapping[str, Callable[[int], Form]] = {
    "LowRank": lambda d: LowRank(d // 4),
    "BlockDense": lambda d: BlockDense(2, d // 6 * 2) if d < 2048 else BlockDense(4, d // 8 * 3),
    "BlockShuffle": lambda d: BlockShuffle(4),
}


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def matrices(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def programs(width: int, tokens: int) -> tuple[list[Program], list[float]]:
    """The dense layer and its structured forms, and the share of its parameters that each of them has."""
    models: list[nn.Module] = []
    for form in (None, *FORMS.values()):
        model = FeedForward(width).eval()
        if form is not None:
            replace_linears(model, form(width), init="plain")  # speed does not depend on what they hold
        models.append(model)
    x = torch.randn(tokens, width)
    shares = [matrices(model) / matrices(models[0]) for model in models]
    return [tautomer.capture(model, (x,), dynamic_shapes="static") for model in models], shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="*", default=[768, 2048, 4096])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--only", nargs="*", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=4.0, help="of calls, for each row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.threads} threads; times faster than dense, in parentheses the share of its parameters\n")
    print(f"| width | tokens | runtime | dense | {' | '.join(FORMS)} |\n|{'---|' * (len(FORMS) + 4)}")
    for width in options.widths:
        for tokens in options.tokens:
            forms, (_, *shares) = programs(width, tokens)
            for target in options.only:
                runs = [resolve(target).compile(form) for form in forms]
                dense, *others = in_turns(runs, forms[0].example, 3, milliseconds=1e3 * options.seconds)
                figures = " | ".join(f"{dense / other:.2f} ({share:.2f})" for other, share in zip(others, shares, strict=True))
                print(f"| {width} | {tokens} | {target} | {dense / 1e3:,.1f} ms | {figures} |", flush=True)


if __name__ == "__main__":
    main()
