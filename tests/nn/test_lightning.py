"""The block against the formula written out; both rules for slopes pinned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tautomer.nn.lightning import LightningAttention, LightningBlock, fla_slopes, lightning_slopes
from tautomer.rewrite.errors import UsageError

F64 = torch.float64


def test_the_slopes_of_both_rules() -> None:
    wanted = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=F64)
    torch.testing.assert_close(lightning_slopes(4), wanted * (1 + 1e-5))
    torch.testing.assert_close(lightning_slopes(4, 1, 3), wanted * (0.5 + 1e-5))
    torch.testing.assert_close(lightning_slopes(4, 2, 3), wanted * 1e-5, rtol=1e-6, atol=0)
    torch.testing.assert_close(lightning_slopes(6)[4:], torch.tensor([2**-1.0, 2**-3.0], dtype=F64) * (1 + 1e-5))
    torch.testing.assert_close(fla_slopes(4, 1, 4), torch.tensor([0.0, 2.0, 4.0, 6.0], dtype=F64) * 0.75)


def srms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def mixed(layer: LightningAttention, x: Tensor) -> Tensor:
    q, k, v, u = (W @ x.unsqueeze(-1) for W in layer.mixed.weight.chunk(4))
    q, k, v, u = F.silu(q[..., 0]), F.silu(k[..., 0]), v[..., 0], u[..., 0]
    n, d, heads = x.shape[1], x.shape[2] // layer.heads, []
    at = torch.arange(n)
    power = (at[:, None] - at).double()
    for h in range(layer.heads):
        a, b, c = (y[..., d * h : d * (h + 1)] for y in (q, k, v))
        if layer.theta is not None:
            turn = at[:, None] * layer.theta[h]
            a, b = (torch.cat([y * turn.cos(), y * turn.sin()], -1) for y in (a, b))
        decay = torch.exp(layer.log_decay[h, 0, 0] * power).tril()
        heads.append((a @ b.mT * decay) @ c)
    return (u * srms(torch.cat(heads, -1))) @ layer.out.weight.T


@pytest.mark.parametrize("turned", [True, False])
def test_it_is_the_formula_and_knows_nothing_of_the_future(turned: bool) -> None:
    block, x = LightningBlock(12, 3, 20, turned=turned, chunk=4).double(), torch.randn(2, 11, 12, dtype=F64)
    z = x + mixed(block.mixer, srms(x))
    wanted = z + (srms(z) @ block.gate.weight.T * (srms(z) @ block.up.weight.T)) @ block.down.weight.T
    y = block(x)
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-12)
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in block.parameters())
    x[:, 7] += 100
    assert torch.equal(block(x)[:, :7], y[:, :7])


def test_turned_queries_and_keys_know_only_distances() -> None:
    layer = LightningAttention(8, 2, torch.zeros(2), turned=True).double()
    assert layer.theta is not None
    torch.testing.assert_close(layer.theta[0, 0], torch.tensor([1.0, 1e-2, 1e-4, 1e-6], dtype=F64), rtol=1e-6, atol=0)


def test_padding_at_the_end_or_the_front_does_not_count() -> None:
    block, x = LightningBlock(12, 3, 20, chunk=4).double(), torch.randn(2, 11, 12, dtype=F64)
    keep = torch.ones(2, 11, dtype=torch.bool)
    keep[0, 8:], keep[1, :3] = False, False
    y = block(x, keep)
    torch.testing.assert_close(y[:1, :8], block(x[:1, :8]), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(y[1:, 3:], block(x[1:, 3:]), rtol=1e-11, atol=1e-12)


def test_what_is_out_of_range_is_said() -> None:
    with pytest.raises(UsageError, match="cannot be shared"):
        LightningAttention(12, 5)
    with pytest.raises(UsageError, match="for 3 heads"):
        LightningAttention(12, 3, torch.ones(2))
