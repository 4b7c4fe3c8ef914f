"""Blocks of queries see what the window and the sinks say, at every size; a window that is nothing new is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.window_attention import WindowAttention, WindowMask
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer as ops


def heads(n: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, h, n, d, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 6)))
    return q, k, v


@pytest.mark.parametrize(("n", "window", "sinks"), list(product((1, 7, 16, 17), (1, 3, 4, 20), (0, 2))))
def test_blocks_and_the_mask_keep_the_same_scores(n: int, window: int, sinks: int) -> None:
    q, k, v = heads(n)
    at, padding = torch.arange(n), torch.rand(2, 1, 1, n) > 0.3
    padding[..., 0] = True
    added = torch.where(padding, 0.5 * at.double(), -torch.inf)
    for causal, mask in product((True, False), (None, padding, added)):
        away = at[:, None] - at
        keep = ((away.abs() < window) | (at < sinks)) & ((away >= 0) | (not causal))
        keep = keep if mask is None else keep & padding
        rows = keep.any(-1, keepdim=True).expand(2, 1, n, 1)
        bias = torch.where(keep, added if mask is added else 0.0, -1e30).double()
        wanted = F.scaled_dot_product_attention(q, k, v, bias, scale=0.3, enable_gqa=True)
        for blocks in (True, False):
            found = ops.window_attention.v1(q, k, v, mask, 0.3, window, sinks, causal, blocks)
            assert found.isfinite().all()
            torch.testing.assert_close(found * rows, wanted * rows, rtol=1e-12, atol=1e-12)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[-2])
        band = (at <= at[:, None]) & (at > at[:, None] - 5)
        return F.scaled_dot_product_attention(x, x, x, band)


def test_a_model_with_a_window_of_its_own_gets_a_narrower_one_only_as_a_mask() -> None:
    x = torch.randn(2, 2, 9, 4)
    refused = tautomer.optimize(Attention().eval(), (x,), passes=[WindowAttention(3)])
    assert "its mask is a window of 5, for which window-attention has no place" in refused.report.refusals[0].reason
    wide = tautomer.optimize(Attention().eval(), (x,), passes=[WindowMask(5, sinks=0)])
    assert "its mask is a window of 5 already, within the window of 5" in wide.report.refusals[0].reason
    narrow = tautomer.optimize(Attention().eval(), (x,), passes=[WindowMask(2, sinks=0)])
    torch.testing.assert_close(narrow(x), ops.window_attention.v1(x, x, x, None, 0.5, 2, 0, True))


def test_a_sequence_within_the_window_stays() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    fast = tautomer.optimize(Causal().eval(), (torch.randn(2, 2, 9, 4),), passes=[WindowAttention(9)], dynamic_shapes="static")
    assert fast.report.refusals[0].reason == "its 9 positions are within the window of 9: nothing would change"


def test_no_window_is_wrong() -> None:
    with pytest.raises(UsageError, match="window is 0\n  try: 1 or more"):
        WindowAttention(0)
