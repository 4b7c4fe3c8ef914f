"""The rewrite is the layer of nn/ponet.py with the model's projections, learns, and refuses what pooling has no place for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.nn.ponet import PoNet
from tautomer.passes.attention.ponet_attention import LAYERS, PonetAttention
from tautomer.passes.attention.transfer import Transfer
from tautomer.rewrite.errors import UsageError

F64 = torch.float64


class Attention(nn.Module):
    def __init__(self, key_heads: int = 3, causal: bool = False, wide: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 4 * key_heads), nn.Linear(12, wide * key_heads)
        self.causal, self.wide = causal, wide

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = (y(x).unflatten(-1, (-1, w)).transpose(1, 2) for y, w in ((self.q, 4), (self.k, 4), (self.v, self.wide)))
        mask = None if keep is None else keep[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=k.shape[1] != q.shape[1])
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_layer_with_the_projections_of_the_model(padded: bool) -> None:
    model, x = Attention().double().eval(), torch.randn(2, 9, 12, dtype=F64)
    keep = torch.arange(9) < torch.tensor([[9], [5]]) if padded else None
    given = (x, keep) if padded else (x,)
    fast = tautomer.optimize(model, given, passes=[PonetAttention(4, architecture=True)])
    assert fast.report.attentions[0].places[0].replaced
    layer = PoNet(12, 3, 4).double()
    weights = dict(fast.named_parameters())
    with torch.no_grad():
        layer.query.load_state_dict(model.q.state_dict())
        layer.key.load_state_dict(model.k.state_dict())
        for name in LAYERS:
            W, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
            layer.get_submodule(name).weight.copy_(W @ model.v.weight)  # type: ignore[operator]
            layer.get_submodule(name).bias.copy_(W @ model.v.bias + b)  # type: ignore[operator]
    torch.testing.assert_close(fast(*given), layer(*given), rtol=1e-11, atol=1e-11)


def test_it_learns_from_what_attention_gave() -> None:
    torch.manual_seed(0)
    data = [torch.randn(4, 12, 12) for _ in range(9)]
    fast = tautomer.optimize(Attention().eval(), data[:1], passes=[PonetAttention(4, transfer=Transfer(steps=40))], data=data)
    (place,) = fast.report.attentions[0].places
    assert place.learning is not None and place.learning.after < 0.6 * place.learning.before
    assert place.error is not None and place.error < 1.2 * place.learning.after


def test_what_pooling_has_no_place_for_is_refused() -> None:
    def reason(model: nn.Module) -> str:
        fast = tautomer.optimize(model.eval(), (torch.randn(2, 9, 12),), passes=[PonetAttention(4, architecture=True)])
        return fast.report.refusals[0].reason

    assert "it is causal" in reason(Attention(causal=True))
    assert "have another width" in reason(Attention(wide=5))
    with pytest.raises(UsageError, match="window=2"):
        PonetAttention(window=2)
