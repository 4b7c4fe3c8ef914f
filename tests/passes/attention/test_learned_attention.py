"""What forms with weights of their own have in common: when they are refused, what they learn, what becomes of their weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.feature_maps import FeatureMap, Hedgehog, JointHedgehog, LogNormal, Relu
from tautomer.passes.attention.gated_attention import GatedAttention
from tautomer.passes.attention.hybrid_attention import HybridAttention
from tautomer.passes.attention.kernel_attention import KernelAttention
from tautomer.passes.attention.substitute_attention import SubstituteAttention
from tautomer.passes.attention.transfer import Transfer

F64 = torch.float64


class Block(nn.Module):
    def __init__(self, causal: bool, key_heads: int) -> None:
        super().__init__()
        self.causal, self.key_heads, self.out = causal, key_heads, nn.Linear(16, 16)
        self.q, self.k, self.v = (nn.Linear(16, 4 * n) for n in (4, key_heads, key_heads))
        with torch.no_grad():
            self.q.weight.mul_(3), self.k.weight.mul_(3)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        n = x.shape[1]
        if mask is not None and self.causal:
            mask = mask & torch.ones(n, n, dtype=torch.bool).tril()
        causal = self.causal and mask is None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=self.key_heads != 4)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Model(nn.Module):
    def __init__(self, causal: bool = True, key_heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(causal, key_heads) for _ in range(layers))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask[:, None, None, :] > 0
        for layer in self.layers:
            x = layer(x, mask)
        return x


def model(**options: Any) -> Model:
    torch.manual_seed(2)
    return Model(**options).double().eval()


def calls(count: int, n: int = 21) -> list[Tensor]:
    return [torch.randn(3, n, 16, dtype=F64, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def put(subject: nn.Module, rewrite: SubstituteAttention, *args: Tensor, **options: Any) -> Any:
    fast = tautomer.optimize(subject, args or (calls(1)[0],), passes=[rewrite], check=False, **options)
    assert fast.report.applications, fast.report.refusals
    return fast


@pytest.mark.parametrize("rewrite", [KernelAttention(), HybridAttention(), GatedAttention()], ids=str)
def test_untrained_it_is_refused_unless_the_model_will_be_trained(rewrite: SubstituteAttention) -> None:
    fast = tautomer.optimize(model(), (calls(1)[0],), passes=[rewrite])
    assert not fast.report.applications and "architecture=True" in fast.report.refusals[0].reason
    assert isinstance(rewrite, GatedAttention) or "worse than its own window" in fast.report.refusals[0].reason
    assert put(model(), replace(rewrite, architecture=True)).report.applications[0].claim == "architecture"


@pytest.mark.parametrize(
    ("phi", "causal"), [(Relu(), True), (Hedgehog(3), False), (JointHedgehog(), True), (LogNormal(), False)], ids=str
)
def test_what_stands_in_the_graph_is_what_learnt(phi: FeatureMap, causal: bool) -> None:
    """The error that the transfer measured on tensors is that of the emitted nodes, weights, padding and shared keys included."""
    call = calls(1)[0], (torch.arange(21) < torch.tensor([[21], [9], [17]])).long()
    rewrite = KernelAttention(phi, chunk=8, transfer=Transfer(steps=5))
    fast = put(model(causal=causal, key_heads=2), rewrite, *call, data=[call] * 8)
    (learnt,) = [note.text for note in fast.report.notes if "held out" in note.text]
    before, after = (float(learnt.split(word)[1].split()[0]) for word in ("off by ", "is by "))
    assert after < before or not phi.trains
    assert f"off by {after:.2g} on data" in fast.report.applications[0].note


def test_the_weights_are_parameters_beside_their_attention_and_train() -> None:
    fast = put(model(key_heads=2, layers=2), HybridAttention(4, architecture=True))
    new = {name: p for name, p in fast.named_parameters() if "map" in name or "gate" in name}
    assert list(new) == [f"layers.{i}.{name}" for i in range(2) for name in ("gate", "query_map.weight", "key_map.weight")]
    assert new["layers.0.key_map.weight"].shape == (4, 4, 4) and new["layers.1.gate"].shape == (4,)
    assert set(new) < set(fast.state_dict())
    x, optimizer, losses = calls(1)[0], torch.optim.AdamW(fast.parameters(), 1e-2), []
    for _ in range(8):
        loss = fast(x).roll(1, 1).sub(x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in new.values())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_sixteen_bits_learns_in_thirty_two_and_stays_one(dtype: torch.dtype) -> None:
    data = [x.to(dtype) for x in calls(3)]
    fast = put(model().to(dtype), HybridAttention(4, transfer=Transfer(steps=1)), *data[:1], data=data)
    assert fast(data[0]).dtype is dtype and bool(fast(data[0]).isfinite().all())
    assert {p.dtype for p in fast.parameters()} == {dtype}
