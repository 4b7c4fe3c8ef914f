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
from tautomer.passes.attention.hybrid_attention import GATE, HybridAttention
from tautomer.passes.attention.kernel_attention import KernelAttention
from tautomer.passes.attention.linformer_attention import LinformerAttention
from tautomer.passes.attention.ponet_attention import PonetAttention
from tautomer.passes.attention.substitute_attention import SubstituteAttention
from tautomer.passes.attention.transfer import Transfer
from tautomer.rewrite.attentions import Masking

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


UNTRAINED = (
    "it must learn what attention gave: pass data=[…] to optimize, an iterable of example calls. architecture=True puts it there "
    "untrained, for a model that will be trained: as it stands, "
)
LEARNED: dict[SubstituteAttention, str] = {
    KernelAttention(): "even with a window it is worse than its own window alone",
    KernelAttention(Relu()): "even with a window it is worse than its own window alone",
    HybridAttention(): "even with a window it is worse than its own window alone",
    LinformerAttention(3, longest=32): "its slots are means of segments",
    PonetAttention(4): "a position sees the largest values beside it",
}


@pytest.mark.parametrize("rewrite", LEARNED, ids=str)
def test_untrained_it_is_refused_unless_the_model_will_be_trained(rewrite: SubstituteAttention) -> None:
    causal = Masking.CAUSAL in rewrite.represents
    fast = tautomer.optimize(model(causal=causal), (calls(1)[0],), passes=[rewrite])
    (place,) = fast.report.attentions[0].places
    assert not fast.report.applications and place.reason == UNTRAINED + LEARNED[rewrite]
    there = put(model(causal=causal), replace(rewrite, architecture=True)).report
    assert there.applications[0].claim == "architecture" and "train it before it is used" in str(there)


def test_what_is_measured_is_refused_without_data_even_for_training() -> None:
    fast = tautomer.optimize(model(), (calls(1)[0],), passes=[KernelAttention(LogNormal(), architecture=True)])
    assert fast.report.attentions[0].places[0].reason.startswith("its two factors per head are measured: pass data=[…]")


def test_what_it_learnt_is_told_and_what_made_it_worse_is_not_kept() -> None:
    told: list[str] = []
    good = put(model(), HybridAttention(4, transfer=Transfer(steps=30)), data=calls(9), progress=told.append).report
    assert "30 steps, loss " in str(good) and "train it before" not in str(good)
    assert "attention transfer, step 30 of at most 30" in told
    wild = put(model(), HybridAttention(4, transfer=Transfer(steps=3, rate=1e3)), data=calls(9))
    (place,), gate = wild.report.attentions[0].places, wild.get_parameter("layers.0.gate")
    assert place.learning is not None and not place.learning.kept and place.learning.after == place.learning.before
    torch.testing.assert_close(gate, torch.full_like(gate, GATE))
    assert "(not kept)" in str(wild.report)


@pytest.mark.parametrize(
    ("phi", "causal"), [(Relu(), True), (Hedgehog(3), False), (JointHedgehog(), True), (LogNormal(), False)], ids=str
)
def test_what_stands_in_the_graph_is_what_learnt(phi: FeatureMap, causal: bool) -> None:
    """The error that the transfer measured on tensors is that of the emitted nodes, weights, padding and shared keys included."""
    call = calls(1)[0], (torch.arange(21) < torch.tensor([[21], [9], [17]])).long()
    rewrite = KernelAttention(phi, chunk=8, transfer=Transfer(steps=5))
    fast = put(model(causal=causal, key_heads=2), rewrite, *call, data=[call] * 8)
    (learnt,) = (place.learning for place in fast.report.attentions[0].places)
    assert learnt is not None and learnt.steps == (5 if phi.trains else 0)
    assert learnt.kept and (learnt.after < learnt.before or not phi.trains)
    assert fast.report.attentions[0].places[0].error == pytest.approx(learnt.after, rel=1e-6)


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
