"""The best keys in all dimensions are the best keys; all keys are attention; the axes are those of the keys that count."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.loki_attention import LokiAttention, rows_of
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer as ops
from tautomer.rewrite.moments import added


@pytest.mark.parametrize(("causal", "gather", "padded"), list(product((True, False), repeat=3)))
def test_all_keys_are_attention_and_all_dimensions_the_best_keys(causal: bool, gather: bool, padded: bool) -> None:
    n = 12
    q, k, v = (torch.randn(2, h, n, d, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 6)))
    mask = torch.rand(2, 1, 1, n) > 0.3 if padded else None
    keep = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
    if mask is not None:
        mask[..., 0] = True
        keep = keep & mask
    few = torch.randn(2, 8, 3, dtype=torch.float64)
    wanted = F.scaled_dot_product_attention(q, k, v, keep, scale=0.3, enable_gqa=True)
    found = ops.top_attention.v1(q, k, v, few, mask, 0.3, n, 0, causal, gather)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    turned = torch.linalg.qr(torch.randn(2, 8, 8, dtype=torch.float64)).Q
    scores = (q @ k.repeat_interleave(2, 1).mT).masked_fill(~keep, -torch.inf)
    best = keep & (scores >= scores.topk(4, -1).values[..., -1:])
    wanted = F.scaled_dot_product_attention(q, k, v, best, scale=0.3, enable_gqa=True)
    for count, of in ((4, 0), (1, 3)):
        found = ops.top_attention.v1(q, k, v, turned, mask, 0.3, count, of, causal, gather)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_query_meets_a_cache() -> None:
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (1, 9, 9))
    whole = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    found = ops.top_attention.v1(q, k, v, whole, None, 0.5, 9)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_the_covariance_comes_in_pieces_and_leaves_padding_out() -> None:
    keys = [torch.randn(b, 2, n, 3) for b, n in ((2, 5), (1, 7))]
    keep = [torch.rand(b, 1, 1, n) > 0.4 for b, n in ((2, 5), (1, 7))]
    moments = None
    for key, kept in zip(keys, keep, strict=True):
        moments = added(moments, rows_of(key, kept))
    assert moments is not None
    rows = torch.cat([key.transpose(1, 2)[kept[:, 0, 0]] for key, kept in zip(keys, keep, strict=True)]).double()
    for head in range(2):
        torch.testing.assert_close(moments.covariance(centred=True)[head], rows[:, head].T.cov(correction=0))


def test_a_share_of_the_variance_is_that_of_the_head_that_needs_most() -> None:
    spread = torch.diag_embed(torch.tensor([[8.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64))
    assert [LokiAttention(rank=share).rotation(spread).shape[-1] for share in (0.2, 0.5, 0.7, 3)] == [1, 2, 3, 3]
    first = LokiAttention(rank=1).rotation(spread)[0, :, 0].abs()
    assert first.tolist() == [1.0, 0.0, 0.0, 0.0]


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=True)


def test_without_data_it_is_refused_and_wrong_numbers_are_named() -> None:
    fast = tautomer.optimize(Attention().eval(), (torch.randn(2, 2, 9, 4),), passes=[LokiAttention()])
    assert "the axes in which its keys vary are not known" in fast.report.refusals[0].reason
    with pytest.raises(UsageError, match=r"keys is 2\.5"):
        LokiAttention(keys=2.5)
