"""What torch.compile makes of a model, and what it makes of the model rewritten.

    python benchmarks/compiled.py [--layers 4] [--width 256] [--seconds 8] [--device cpu] [--only gpt2 llama vit] [--train]

Every figure is a ratio to eager PyTorch, the median over calls that take turns in one run (A B C D A B C D …):

    compile     torch.compile, default backend
    backend     torch.compile(backend="tautomer"): every graph rewritten, then the same Inductor
    optimize    torch.compile of what ``optimize(target="inductor")`` returns; with --train the recipe "training"

Attention, norms and activations are spelled out, as in many models. Seconds to compile, checks included, are printed too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer

HEADS = 4


class Attention(nn.Module):
    def __init__(self, width: int, *, causal: bool, turn: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.causal, self.turn = causal, turn

    def forward(self, x: Tensor) -> Tensor:
        length, width = x.shape[1], x.shape[2] // HEADS
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, width)).permute(2, 0, 3, 1, 4)
        if self.turn:
            q, k = rotate(q), rotate(k)
        scores = q @ k.mT / width**0.5
        if self.causal:
            future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = 1e4 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
    turn = torch.cat([angles, angles], -1)
    return x * turn.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * turn.sin()


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Mlp(nn.Module):
    """GPT-2's, with the tanh GELU by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3)))))


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        norm = RMSNorm if kind == "llama" else nn.LayerNorm
        self.first, self.second = norm(width), norm(width)
        self.attention = Attention(width, causal=kind != "vit", turn=kind == "llama")
        self.mlp = Gated(width) if kind == "llama" else Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Model(nn.Module):
    """Tokens or patches in, logits out."""

    def __init__(self, kind: str, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 16, stride=16) if kind == "vit" else nn.Embedding(1000, width)
        self.blocks = nn.ModuleList([Block(kind, width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "gpt2": lambda: torch.randint(1000, (4, 128)),
    "llama": lambda: torch.randint(1000, (4, 128)),
    "vit": lambda: torch.randn(4, 3, 224, 224),
}


def step(module: Callable[[Tensor], Tensor], x: Tensor, *, train: bool) -> Callable[[], None]:
    def run() -> None:
        if train:
            module(x).square().mean().backward()
        else:
            with torch.no_grad():
                module(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return run


def turns(runs: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """The median time of every run; all of them take turns until the seconds are gone."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["eager"]) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def measured(kind: str, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float], str]:
    torch.manual_seed(0)
    model = Model(kind, options.width, options.layers).to(options.device).train(options.train)
    x = INPUTS[kind]().to(options.device)
    recipe = "training" if options.train else "inference"
    backend = tautomer.Compiler()
    modules: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": model,
        "compile": torch.compile(model),
        "backend": torch.compile(model, backend=backend),
        "optimize": torch.compile(tautomer.optimize(model, (x,), recipe=recipe, target="inductor"), dynamic=False),
    }
    runs = {name: step(module, x, train=options.train) for name, module in modules.items()}
    compiled = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        compiled[name] = time.perf_counter() - start
        run()
    times = turns(runs, options.seconds)
    (graph,) = backend.graphs
    fired = len(graph.report.applications) if graph.report else graph.reason
    torch.compiler.reset()
    return times, compiled, str(fired)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(INPUTS), default=list(INPUTS))
    parser.add_argument("--train", action="store_true", help="forward and backward")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    what = "forward and backward" if options.train else "forward"
    print(f"torch {torch.__version__}, {options.device}, {what}, {options.layers} layers of {options.width}; ratios to eager\n")
    print("| model | eager, ms | compile | backend | optimize | seconds to compile | fired |\n|---|---|---|---|---|---|---|")
    for kind in options.only:
        times, compiled, fired = measured(kind, options)
        ratios = " | ".join(f"{times[name] / times['eager']:.2f}" for name in ("compile", "backend", "optimize"))
        seconds = ", ".join(f"{compiled[name]:.0f}" for name in ("compile", "backend", "optimize"))
        print(f"| {kind} | {times['eager'] * 1e3:.1f} | {ratios} | {seconds} | {fired} |", flush=True)


if __name__ == "__main__":
    main()
