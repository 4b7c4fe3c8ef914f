"""Where every query and every key of a head has one length it is the model; elsewhere it starts at the mean and learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.qknorm_attention import QknormAttention
from tautomer.passes.attention.transfer import Transfer

F64 = torch.float64


class Attention(nn.Module):
    """Heads of keys that each serve two of the queries, under a mask of any kind; ``turned`` keeps lengths one per head."""

    def __init__(self, turned: bool, mask: str) -> None:
        super().__init__()
        self.q, self.kv, self.turned, self.mask = nn.Linear(8, 16), nn.Linear(8, 16), turned, mask
        self.bias = nn.Parameter(torch.randn(4, 9, 9))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.turned:
            q, k = F.normalize(q, dim=-1) * torch.arange(1, 5, dtype=x.dtype)[:, None, None], F.normalize(k, dim=-1) * 3
        mask = {"bias": self.bias, "other": (x[..., :1] > x[..., 0][:, None] - 2)[:, None]}.get(self.mask)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.mask == "causal", scale=0.7, enable_gqa=True)


@pytest.mark.parametrize("mask", ["none", "causal", "bias", "other"])
def test_where_lengths_are_constant_nothing_changes(mask: str) -> None:
    model, data = Attention(True, mask).double().eval(), [torch.randn(2, 9, 8, dtype=F64) for _ in range(2)]
    fast = tautomer.optimize(model, data[:1], passes=[QknormAttention(transfer=Transfer(steps=0))], data=data)
    assert fast.report.attentions[0].places[0].replaced, str(fast.report)
    torch.testing.assert_close(fast.get_parameter("gain").flatten(), 0.7 * 3 * torch.arange(1, 5, dtype=F64), rtol=1e-12, atol=0)
    torch.testing.assert_close(fast(data[1]), model(data[1]), rtol=1e-11, atol=1e-12)


def test_elsewhere_it_learns_from_the_mean() -> None:
    torch.manual_seed(0)
    model, data = Attention(False, "bias").eval(), [3 * torch.randn(4, 9, 8) for _ in range(9)]
    fast = tautomer.optimize(model, data[:1], passes=[QknormAttention(transfer=Transfer(steps=40))], data=data)
    (place,) = fast.report.attentions[0].places
    assert place.learning is not None and 0 < place.learning.after < place.learning.before < 1
    fast(data[0]).sum().backward()
    assert bool(fast.get_parameter("gain").grad.any())


def test_without_data_there_is_nothing_to_start_from() -> None:
    model, x = Attention(False, "none").eval(), torch.randn(2, 9, 8)
    for architecture, sentence in ((False, "it must learn what attention gave"), (True, "is measured: pass data=[…]")):
        fast = tautomer.optimize(model, (x,), passes=[QknormAttention(architecture=architecture)])
        assert sentence in fast.report.attentions[0].places[0].reason
