"""What optimize(target="inductor") returns is torch.compile's to take: whole, at any size and trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tautomer
from tautomer.rewrite.errors import UsageError

AUTO = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}


class Branches(nn.Module):
    """Asks about sizes, takes a dict and a constant, normalizes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: dict[str, Tensor] | None = None, *, scale: float = 2.0) -> dict[str, Any]:
        y = self.down(self.norm(self.up(x)))
        if x.shape[1] % 4 == 0:
            y = y + x.shape[1] // 4
        if max(x.shape[0], x.shape[1]) > 3:
            y = y * scale
        return {"y": y if mask is None else y * mask["keep"], "calls": 1}


def call(batch: int, length: int) -> tuple[Tensor, dict[str, Any]]:
    return torch.randn(batch, length, 16), {"mask": {"keep": torch.ones(batch, length, 1)}, "scale": 3.0}


def emitted(recipe: str) -> tuple[nn.Module, nn.Module]:
    model = Branches().train(recipe == "training")
    x, rest = call(2, 8)
    shapes = {"x": AUTO, "mask": {"keep": AUTO}, "scale": None}
    fast = tautomer.optimize(model, (x,), rest, recipe=recipe, target="inductor", dynamic_shapes=shapes)
    assert fast.report.fired("layer-norm-to-rms-norm") == 1
    return model, fast


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("recipe", ["inference", "training"])
def test_it_is_one_graph_binder_and_conditions_included(recipe: str, dynamic: bool | None) -> None:
    model, fast = emitted(recipe)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, length in ((2, 8), (3, 12), (5, 4)):
        x, rest = call(batch, length)
        found, expected = compiled(x, **rest), model(x, **rest)
        assert found["calls"] == 1
        torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)
        if recipe == "training":
            pairs = []
            for module, output in ((model, expected), (fast, found)):
                output["y"].sin().sum().backward()
                pairs.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
                module.zero_grad()
            assert len(pairs[0]) == 6
            for a, b in zip(*pairs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_call_it_was_not_captured_for_is_our_sentence() -> None:
    _, fast = emitted("inference")
    x, rest = call(2, 6)
    with pytest.raises(UsageError, match=r"inputs with \(x\.shape\[1\] % 4\) == 0"):
        torch.compile(fast, backend="aot_eager")(x, **rest)
