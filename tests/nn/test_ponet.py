"""The layer against its formula written out sample by sample, and what the formula comes to at its ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tautomer.nn.ponet import PoNet
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer as ops

F64 = torch.float64


def made(segments: int, window: int = 3) -> PoNet:
    layer = PoNet(12, 3, segments, window).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def by_definition(layer: PoNet, x: Tensor) -> Tensor:
    """One sample without padding, position by position."""
    n, columns = len(x), []
    Q, K, gate, S, L = (y(x) for y in (layer.query, layer.key, layer.gate, layer.segment, layer.local))
    segment = [r * layer.segments // n for r in range(n)]
    for h in range(3):
        at = slice(4 * h, 4 * h + 4)
        a = (K[:, at] @ Q[:, at].mean(0) / 2).softmax(0)
        columns.append(a @ K[:, at])
    g, rows, half = torch.cat(columns), [], layer.window // 2
    for i in range(n):
        top = torch.stack([S[j] for j in range(n) if segment[j] == segment[i]]).amax(0)
        near = L[max(0, i - half) : i + half + 1].amax(0)
        rows.append((g + top) * gate[i] + near)
    return torch.stack(rows)


@pytest.mark.parametrize(("segments", "window"), [(1, 1), (3, 3), (7, 5), (40, 3)])
def test_it_is_the_formula_and_padding_changes_nothing(segments: int, window: int) -> None:
    layer, x = made(segments, window), torch.randn(3, 7, 12, dtype=F64)
    keep = torch.ones(3, 7, dtype=torch.bool)
    keep[1, 4:], keep[2, :3] = False, False
    y = layer(x, keep)
    torch.testing.assert_close(layer(x)[0], by_definition(layer, x[0]), rtol=1e-12, atol=1e-12)
    for sample, at in enumerate((slice(0, 7), slice(0, 4), slice(3, 7))):
        torch.testing.assert_close(y[sample, at], by_definition(layer, x[sample, at]), rtol=1e-12, atol=1e-12)
    assert not y[~keep].any()
    other = torch.where(keep.unsqueeze(-1), x, 1e3)
    torch.testing.assert_close(layer(other, keep), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x.flip(0), keep.flip(0)).flip(0), y, rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())


def test_its_ends() -> None:
    """A segment each: S' = S. A window of one: L' = L. Equal keys: g' = K. A sample that is padding alone is 0."""
    q, k, o, s, x = (torch.randn(2, 3, 7, 4, dtype=F64) for _ in range(5))
    k = k[:, :, :1].expand(2, 3, 7, 4)
    torch.testing.assert_close(ops.ponet_attention.v1(q, k, o, s, x, None, 7, 1), (k + s) * o + x, rtol=1e-12, atol=1e-12)
    one = ops.ponet_attention.v1(q, k, o, s, x, None, 1, 1)
    torch.testing.assert_close(one, (k + s.amax(2, keepdim=True)) * o + x, rtol=1e-12, atol=1e-12)
    nothing = ops.ponet_attention.v1(q, k, o, s, x, torch.zeros(2, 1, 7, dtype=torch.bool), 3, 3)
    assert not nothing.any()


def test_what_is_out_of_range_is_said() -> None:
    with pytest.raises(UsageError, match="cannot be shared"):
        PoNet(12, 5)
    with pytest.raises(UsageError, match="window=4"):
        PoNet(12, 3, window=4)
