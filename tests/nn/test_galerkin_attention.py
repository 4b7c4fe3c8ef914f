"""Both kinds against their formulas written out, with positions and with a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.nn.galerkin_attention import GalerkinAttention
from tautomer.rewrite.errors import UsageError

F64 = torch.float64


def made(kind: Any, **options: Any) -> GalerkinAttention:
    layer = GalerkinAttention(12, 3, kind, gain=1.0, **options).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def by_definition(layer: GalerkinAttention, x: Tensor, p: Tensor | None) -> Tensor:
    """One sample, head by head."""
    heads = []
    for h in range(3):
        q, k, v = (y(x)[:, 4 * h : 4 * h + 4] for y in (layer.query, layer.key, layer.value))
        first, second = zip(layer.gains[:, h, 0], layer.shifts[:, h, 0], strict=True)
        if layer.kind == "fourier":
            q, k = F.layer_norm(q, [4], *first), F.layer_norm(k, [4], *second)
        else:
            k, v = F.layer_norm(k, [4], *first), F.layer_norm(v, [4], *second)
        if p is not None:
            q, k, v = (torch.cat([p, y], -1) for y in (q, k, v))
        heads.append((q @ k.T) @ v / len(x))
    y: Tensor = layer.out(torch.cat(heads, -1))
    return y


@pytest.mark.parametrize("kind", ["fourier", "galerkin"])
@pytest.mark.parametrize("positions", [0, 2])
def test_it_is_the_formula_and_padding_does_not_count(kind: str, positions: int) -> None:
    layer, x = made(kind, positions=positions), torch.randn(2, 7, 12, dtype=F64)
    p = torch.rand(2, 7, positions, dtype=F64) if positions else None
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, 4:] = False
    y = layer(x, p, keep)
    torch.testing.assert_close(y[0], by_definition(layer, x[0], None if p is None else p[0]), rtol=1e-12, atol=1e-12)
    short = by_definition(layer, x[1, :4], None if p is None else p[1, :4])
    torch.testing.assert_close(y[1, :4], short, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[:1], None if p is None else p[:1]), y[:1], rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_projections_start_near_a_small_identity() -> None:
    layer = GalerkinAttention(12, 3, gain=1e-4, diagonal=0.5)
    torch.testing.assert_close(layer.key.weight, 0.5 * torch.eye(12), rtol=0, atol=1e-3)
    assert not layer.key.bias.any()


def test_what_is_out_of_range_is_said() -> None:
    with pytest.raises(UsageError, match="cannot be shared"):
        GalerkinAttention(12, 5)
    with pytest.raises(UsageError, match="no kind 'softmax'"):
        GalerkinAttention(12, 3, "softmax")  # type: ignore[arg-type]
