"""Which attentions features may stand for, and the mean with blocks of softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.feature_maps import Elu
from tautomer.passes.attention.kernel_attention import KernelAttention
from tautomer.rewrite.errors import UsageError


class Attention(nn.Module):
    def __init__(self, causal: bool, cached: bool = False) -> None:
        super().__init__()
        self.causal, self.cached = causal, cached
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def heads(self, x: Tensor, y: Tensor) -> list[Tensor]:
        pairs = ((self.q, x), (self.k, y), (self.v, y))
        q, k, v = (layer(z).unflatten(-1, (2, 4)).transpose(1, 2) for layer, z in pairs)
        return [q, torch.cat([k.sin(), k], -2), torch.cat([v.sin(), v], -2)] if self.cached else [q, k, v]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x, y), is_causal=self.causal)


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def put(model: nn.Module, *args: Tensor, **options: int) -> nn.Module:
    return tautomer.optimize(model, args, passes=[KernelAttention(Elu(), architecture=True, **options)])


def test_queries_may_be_of_another_sequence_where_nothing_is_later() -> None:
    model = Attention(causal=False).double()
    x, y = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = model.heads(x, y)
    weights = phi(q) @ phi(k).mT
    fast = put(model, x, y)
    torch.testing.assert_close(fast(x, y), weights / weights.sum(-1, keepdim=True) @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", [Attention(True), Attention(True, cached=True)], ids=["crossed", "cached"])
def test_where_something_is_later_it_must_be_one_sequence(model: nn.Module) -> None:
    x = torch.randn(2, 5, 8)
    fast = put(model, x, x.cos() if not model.cached else x)  # type: ignore[arg-type]
    assert not fast.report.applications  # type: ignore[union-attr]
    assert "not of one sequence" in fast.report.refusals[0].reason  # type: ignore[union-attr, index]


@pytest.mark.parametrize("causal", [True, False])
def test_with_a_diagonal_it_is_the_mean_with_softmax_in_blocks(causal: bool) -> None:
    model, x = Attention(causal).double(), torch.randn(2, 11, 8, dtype=torch.float64)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x)

    q, k, v = model.heads(x, x)
    at = torch.arange(11)
    seen = (at <= at[:, None]) | torch.tensor(not causal)
    weights = (phi(q) @ phi(k).mT).masked_fill(~seen, 0)
    blocks = F.scaled_dot_product_attention(q, k, v, seen & (at // 4 == at[:, None] // 4))
    wanted = (weights / weights.sum(-1, keepdim=True) @ v + blocks) / 2
    torch.testing.assert_close(put(Own(), x, diagonal=4, chunk=3)(x), wanted, rtol=1e-12, atol=1e-12)
    # One block over everything: half of the result is softmax itself.
    half = 2 * put(Own(), x, diagonal=11)(x) - weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(half, model(x, x), rtol=1e-11, atol=1e-11)


def test_blocks_hold_a_position() -> None:
    with pytest.raises(UsageError, match="chunk is 0"):
        KernelAttention(chunk=0)
