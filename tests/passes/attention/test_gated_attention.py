"""Half a gated recurrence, half a window, written out; the recurrence takes queries and keys before they are turned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.gated_attention import GatedAttention
from tautomer.rewrite.errors import UsageError

F64 = torch.float64


class Attention(nn.Module):
    def __init__(self, turned: bool, causal: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.turned, self.causal = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), turned, causal

    def heads(self, x: Tensor) -> list[Tensor]:
        return [layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)]

    def turn(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
        return torch.ops.tautomer.rotary.v1(x, angle.cos(), angle.sin()) if self.turned else x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=self.causal, enable_gqa=True)


@pytest.mark.parametrize("turned", [True, False])
def test_it_is_the_formula(turned: bool) -> None:
    model, x = Attention(turned).double(), torch.randn(2, 23, 8, dtype=F64)
    fast = tautomer.optimize(model, (x,), passes=[GatedAttention(5, chunk=4, architecture=True)])
    assert len(fast.report.applications) == 1
    q, k, v = (y.repeat_interleave(4 // y.shape[1], 1) for y in model.heads(x))
    gates, S, rows = torch.sigmoid(k) ** (1 / 16), torch.zeros(2, 4, 4, 4, dtype=F64), []
    for t in range(23):
        S = gates[:, :, t, :, None] * S + k.softmax(-1)[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append(torch.einsum("bhd,bhde->bhe", q.softmax(-1)[:, :, t], S))
    away = torch.arange(23)[:, None] - torch.arange(23)
    near = F.scaled_dot_product_attention(model.turn(q), model.turn(k), v, (away >= 0) & (away < 5))
    torch.testing.assert_close(fast(x), (torch.stack(rows, 2) + near) / 2, rtol=1e-11, atol=1e-12)


def test_what_sees_the_future_is_refused() -> None:
    model = Attention(False, causal=False)
    fast = tautomer.optimize(model, (torch.randn(2, 9, 8),), passes=[GatedAttention(architecture=True)])
    assert "it is not causal" in fast.report.refusals[0].reason


def test_windows_and_chunks_hold_a_position() -> None:
    with pytest.raises(UsageError, match="window is 0"):
        GatedAttention(0)
