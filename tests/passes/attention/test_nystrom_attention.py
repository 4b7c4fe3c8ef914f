"""As many landmarks as positions are attention; constant values stay constant; the iteration converges, and is not A⁺."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tautomer.passes.attention.nystrom_attention import NystromAttention
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer as ops


def heads(n: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, h, n, d, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 6)))
    return q, k, v


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_no_more_positions_than_landmarks_attend_as_they_are(n: int, padded: bool) -> None:
    q, k, v = heads(n)
    mask = torch.arange(n) < 4 if padded else None
    wanted = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.expand(n, n), scale=0.3, enable_gqa=True)
    found = ops.nystrom_attention.v1(q, k, v, mask, 0.3, 8)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_landmarks_that_are_the_positions_converge_to_attention() -> None:
    """Each position twice, side by side: the means of 16 segments are the 16 different positions."""
    q, k, v = heads(16)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True).repeat_interleave(2, 2)
    twice = [x.repeat_interleave(2, 2) for x in (q, k, v)]
    errors = [float((ops.nystrom_attention.v1(*twice, None, 0.3, 16, steps) - wanted).abs().max()) for steps in (6, 10, 20, 30)]
    assert all(b < a or b < 1e-12 for a, b in pairwise(errors)) and errors[0] > 1e-3 and errors[-1] < 1e-9


def test_a_constant_value_stays() -> None:
    q, k, _ = heads(37)
    v = torch.ones(2, 2, 37, 3, dtype=torch.float64)
    found = ops.nystrom_attention.v1(q, k, v, None, 0.3, 8)
    assert float((found - 1).abs().max()) < 1e-2


def test_padding_is_as_if_it_were_not_there() -> None:
    q, k, v = heads(37)
    keep = torch.arange(40) < 37
    padded = [torch.cat((x, torch.randn(2, x.shape[1], 3, x.shape[3], dtype=x.dtype)), 2) for x in (q, k, v)]
    found = ops.nystrom_attention.v1(*padded, keep, 0.3, 8)[:, :, :37]
    torch.testing.assert_close(found, ops.nystrom_attention.v1(q, k, v, None, 0.3, 8), rtol=1e-12, atol=1e-12)


def test_no_landmarks_are_wrong() -> None:
    with pytest.raises(UsageError, match="landmarks is 0"):
        NystromAttention(0)
