"""A dropout keeps a bit per entry and draws what it drew: a seeded run goes its way as before, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.memory.pack_dropout_masks import PackDropoutMasks
from tautomer.passes.memory.recompute_inputs import RecomputeInputs
from tautomer.passes.memory.share_norm_output import ShareNormOutput

D, H = 7, 12
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    """The MLP of a vision transformer: dropouts behind the activation and behind the second layer."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)
        self.inner, self.outer = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.down(self.inner(F.gelu(self.up(self.norm(x))))))


class Adapted(nn.Module):
    """A frozen norm and layer, with adapters that each drop out what they read."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        self.first, self.norm, self.W = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.requires_grad_(False)
        self.first.requires_grad_(first)
        self.drops = nn.ModuleList(nn.Dropout(0.2) for _ in range(2))
        self.A = nn.ModuleList(nn.Linear(D, 2, bias=False) for _ in range(2))
        self.B = nn.ModuleList(nn.Linear(2, D, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x + self.first(x))
        return self.W(z) + sum(B(A(drop(z))) for drop, A, B in zip(self.drops, self.A, self.B, strict=True))


def trajectory(model: nn.Module, steps: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return list(model.state_dict().values())


def test_the_mask_goes_and_not_a_bit_changes(observed: Any) -> None:
    model = nn.Sequential(Mlp(), Mlp()).train()
    program = tautomer.capture(copy.deepcopy(model), (X,), mode="both")
    fast = tautomer.optimize(program, passes=[PackDropoutMasks()])
    assert fast.report.fired("pack-dropout-masks") == 4 and fast.report.evidence.gradient == 0.0
    before, after = observed(model, X), observed(fast, X)
    assert before - after == 2 * 15 * (4 * (H + D) - 2 - 1), "12 bits are two bytes, 7 bits one"
    assert tautomer.saved_tensors(fast).bytes == after
    assert torch.equal(fast.eval()(X), model.eval()(X))
    ours, theirs = trajectory(fast.train()), trajectory(model.train())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_a_layer_reads_behind_it_is_computed_again_from_the_bits(observed: Any) -> None:
    model = Mlp().train()
    fast = tautomer.optimize(copy.deepcopy(model), (X,), passes=[PackDropoutMasks(), RecomputeInputs()])
    assert fast.report.fired("recompute-inputs") == 2 and fast.report.evidence.gradient <= 1e-12
    (drawing, *_), count = (
        [n for n in fast.graph.nodes if "lean_dropout" in str(n.target)],
        str(fast.graph).count("lean_dropout.v1"),
    )
    assert count == 2 and drawing.users, "each draws once"
    assert observed(model, X) - observed(fast, X) == 15 * (4 * (H + D) - 3 + 4 * (D + H))
    ours, theirs = trajectory(fast), trajectory(model)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_adapter_behind_a_dropout_shares_the_input_of_the_norm(observed: Any) -> None:
    model = Adapted().train()
    alone = tautomer.optimize(model, (X,), passes=[RecomputeInputs()])
    assert not alone.report.fired("recompute-inputs") and observed(alone, X) == observed(model, X)
    fast = tautomer.optimize(copy.deepcopy(model), (X,), passes=[PackDropoutMasks(), RecomputeInputs()])
    assert fast.report.fired("recompute-inputs") == 2
    assert observed(model, X) - observed(fast, X) == 2 * 15 * (4 * D - 1 + 4 * D), "mask and input of both adapters"
    for a, b in zip(trajectory(fast), trajectory(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_under_autocast_adapters_behind_dropouts_share_sixteen_bits(observed: Any) -> None:
    model, x = Adapted().train(), X.clone()
    passes = [PackDropoutMasks(), ShareNormOutput(torch.bfloat16)]
    fast = tautomer.optimize(copy.deepcopy(model), (x,), passes=passes)
    again = tautomer.optimize(copy.deepcopy(model), (x,), passes=[PackDropoutMasks(), RecomputeInputs(torch.bfloat16)])
    assert fast.report.fired("share-norm-output") == 1 and fast.report.evidence.gradient <= 1e-12
    other, ours = observed(again, x, autocast=True), observed(fast, x, autocast=True)
    assert other - ours == 15 * ((4 - 2) * D + 4), "16 bits in the place of 32, and one statistic less"
    found = []
    for m in (fast, model):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(x).float().square().mean()
        found.append(torch.autograd.grad(loss, [p for p in m.parameters() if p.requires_grad]))
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= 2**-5 * float(b.abs().max())


def test_a_source_that_is_not_kept_is_refused_whichever_way_it_goes(observed: Any) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.2), nn.Linear(D, 3)).train()
    fast = tautomer.optimize(model, (X,), passes=[PackDropoutMasks(), RecomputeInputs()])
    assert fast.report.fired("pack-dropout-masks") == 1
    (reason,) = [r.reason for r in fast.report.refusals]
    assert reason == "aten.linear 'linear', which it is computed from, is not kept: it would be, in its place"


def test_where_nothing_trains_before_it_nothing_is_kept(observed: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(D, 3)).train()
    fast = tautomer.optimize(model, (X,), passes=[PackDropoutMasks()])
    assert [r.reason for r in fast.report.refusals] == ["nothing before it trains: it keeps nothing"]
    forced = nn.Sequential(Packed(), model[1])
    assert observed(forced, X) == observed(model, X)


class Packed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.tautomer.lean_dropout.v1(x, 0.2, True)[0]
        return result


def test_the_dropout_of_an_attention_kernel_is_left_alone() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(D, 3 * D)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)

    fast = tautomer.optimize(Attention().train(), (X,), recipe="finetune")
    assert not fast.report.fired("pack-dropout-masks")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_too(dtype: torch.dtype) -> None:
    model = Mlp().to(dtype).train()
    fast = tautomer.optimize(copy.deepcopy(model), (X.to(dtype),), passes=[PackDropoutMasks()])
    found = []
    for m in (model, fast):
        torch.manual_seed(5)
        y = m(X.to(dtype))
        found.append((y, *torch.autograd.grad(y.float().sum(), list(m.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
