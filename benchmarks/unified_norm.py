"""Unified Normalization in a small language model: how to calibrate it, and whether it trains as LayerNorm does.

    python benchmarks/unified_norm.py         minutes on one CPU thread; every figure is a mean over three seeds

The text is made: each letter is a function of the two before it, one in ten is random. Losses are cross-entropies on text
that was not trained on; none can be below 0.565.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.nn import UnifiedNorm, replace_layer_norms

D, LETTERS, LENGTH, LAYERS = 32, 16, 16, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm2, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, D // 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.position = nn.Embedding(LETTERS, D), nn.Parameter(torch.randn(LENGTH, D) / 10)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, LETTERS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(ids) + self.position)))


def text(batch: int, generator: torch.Generator) -> Tensor:
    ids = torch.randint(LETTERS, (batch, LENGTH), generator=generator)
    noise = torch.rand(batch, LENGTH, generator=generator) < 0.1
    for t in range(2, LENGTH):
        ids[:, t] = torch.where(noise[:, t], ids[:, t], (3 * ids[:, t - 1] + 5 * ids[:, t - 2] + 1) % LETTERS)
    return ids


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())


def train(model: nn.Module, steps: int, rate: float, seed: int) -> None:
    optimizer, generator = torch.optim.AdamW(model.parameters(), rate), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, text(32, generator)).backward()
        optimizer.step()


# -- calibrations ---------------------------------------------------------------------------------------------

Sums = tuple[int, Tensor, Tensor, Tensor, Tensor]


def sums(norm: nn.LayerNorm, rows: list[Tensor]) -> Sums:
    """n, sum x, sum x^2, sum y, sum x y with y = LayerNorm(x)."""
    x = torch.cat(rows).double()
    y = copy.deepcopy(norm).double()(x)
    return len(x), x.sum(0), x.square().sum(0), y.sum(0), (x * y).sum(0)


def kept(norm: nn.LayerNorm, found: Sums) -> UnifiedNorm:
    """psi^2 measured, gamma and beta as they are."""
    n, _, xx, _, _ = found
    made = UnifiedNorm(D, norm.eps)
    made.load_state_dict(norm.state_dict(), strict=False)
    made.running_var.copy_(xx / n)
    return made


def fitted(norm: nn.LayerNorm, found: Sums) -> UnifiedNorm:
    """psi^2 measured, gamma and beta the least squares fit to the LayerNorm's outputs."""
    n, x, xx, y, xy = found
    made = kept(norm, found)
    slope = (n * xy - x * y) / (n * xx - x * x)
    made.weight.data.copy_(slope * torch.sqrt(xx / n + norm.eps))
    made.bias.data.copy_((y - slope * x) / n)
    return made


@torch.no_grad()
def calibrate(
    model: nn.Module, data: list[Tensor], make: Callable[[nn.LayerNorm, Sums], UnifiedNorm], sequential: bool
) -> nn.Module:
    model = copy.deepcopy(model).eval()
    places = [path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    places = places[1:] + places[:1]  # the last norm of the model is the first of its modules
    for group in [[path] for path in places] if sequential else [places]:
        rows: dict[str, list[Tensor]] = {path: [] for path in group}
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda _, args, seen=rows[path]: seen.append(args[0].flatten(0, 1))
            )
            for path in group
        ]
        for ids in data:
            model(ids)
        for hook in hooks:
            hook.remove()
        for path in group:
            norm = model.get_submodule(path)
            model.set_submodule(path, make(norm, sums(norm, rows[path])).eval())
    return model


def main() -> None:
    table: dict[str, list[list[float]]] = {}
    fresh: dict[str, list[list[float]]] = {}

    def enter(rows: dict[str, list[list[float]]], name: str, *figures: Tensor | float) -> None:
        rows.setdefault(name, []).append([float(x.detach() if isinstance(x, Tensor) else x) for x in figures])

    for seed in range(3):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(100 + seed)
        data, unseen = [text(32, generator) for _ in range(16)], text(256, generator)
        start = Model()
        trained = copy.deepcopy(start)
        train(trained, 500, 3e-3, seed)
        enter(fresh, "LayerNorm", loss(trained.train(), unseen), loss(trained.eval(), unseen))
        unified = copy.deepcopy(start)
        replace_layer_norms(unified, warmup=50)
        train(unified, 500, 3e-3, seed)
        at_inference = loss(unified.eval(), unseen)
        enter(fresh, "UN", loss(unified.train(), unseen), at_inference)

        outputs = trained.eval()(unseen)
        more = copy.deepcopy(trained)
        train(more, 200, 1e-3, 10 + seed)
        enter(table, "LayerNorm", 0.0, loss(trained, unseen), float("nan"), loss(more, unseen))
        for make in (kept, fitted):
            for sequential in (False, True):
                model = calibrate(trained, data, make, sequential)
                moved = (model(unseen) - outputs).norm() / outputs.norm()
                before = loss(model, unseen)
                train(model, 50, 1e-3, 10 + seed)
                soon = loss(model, unseen)
                train(model, 150, 1e-3, 20 + seed)
                name = f"{make.__name__}, {'layer by layer' if sequential else 'one pass'}"
                enter(table, name, moved, before, soon, loss(model, unseen))

    def show(title: str, rows: dict[str, list[list[float]]]) -> None:
        print(title)
        for name, figures in rows.items():
            means = torch.tensor(figures).mean(0).tolist()
            print(f"| {name} | " + " | ".join("–" if math.isnan(x) else f"{x:.3f}" for x in means) + " |")

    show("| calibration | outputs moved | loss | after 50 steps | after 200 steps |\n|---|---|---|---|---|", table)
    show("\n| trained from scratch | loss in training mode | at inference |\n|---|---|---|", fresh)


if __name__ == "__main__":
    main()
