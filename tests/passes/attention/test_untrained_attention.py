"""What has nothing to learn stands only in a model that will be trained, with data or without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.gated_attention import GatedAttention
from tautomer.passes.attention.poolformer_attention import PoolformerAttention
from tautomer.passes.attention.untrained_attention import UNTRAINED, UntrainedAttention


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("kind", [GatedAttention, PoolformerAttention])
@pytest.mark.parametrize("data", [None, [torch.randn(2, 9, 8)]])
def test_it_is_refused_unless_the_model_will_be_trained(kind: type[UntrainedAttention], data: list[Tensor] | None) -> None:
    options = {"grid": ()} if kind is PoolformerAttention else {}
    x = torch.randn(2, 9, 8)
    fast = tautomer.optimize(Attention().eval(), (x,), passes=[kind(**options)], data=data)
    assert not fast.report.applications and fast.report.attentions[0].places[0].reason == UNTRAINED
    assert UNTRAINED.startswith("it gives another function, and has nothing to learn beforehand: architecture=True")
    given = tautomer.optimize(Attention().eval(), (x,), passes=[kind(architecture=True, **options)], data=data)
    assert given.report.attentions[0].places[0].replaced and "train it before it is used" in str(given.report)
