"""Two bits per entry, on request alone, and only where nothing else keeps what the activation reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.memory.approximate_activations import ApproximateActivations
from tautomer.passes.memory.recompute_inputs import RecomputeInputs
from tautomer.passes.recipes import Finetune, Inference, Training

X = torch.randn(4, 7)


class Mlp(nn.Module):
    def __init__(self, act, frozen=True):
        super().__init__()
        self.act, self.up, self.down = act, nn.Linear(7, 9), nn.Linear(9, 7)
        self.down.requires_grad_(not frozen)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize("act", [F.gelu, lambda u: F.gelu(u, approximate="tanh"), F.silu])
def test_the_forward_keeps_its_bits_and_the_backward_two_per_entry(observed, act):
    model = Mlp(act)
    fast = tautomer.optimize(model, (X,), passes=[ApproximateActivations()])
    assert fast.report.fired("approximate-activations") == 1
    assert torch.equal(fast(X), model(X))
    assert observed(model, X) - observed(fast, X) == 4 * 4 * 9 - 4 * 3
    gradients = [torch.autograd.grad(m(X).square().sum(), m.up.weight)[0] for m in (model, fast)]
    assert not torch.allclose(*gradients) and F.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.8
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(fast(X).sum(), fast.up.weight, create_graph=True)


def test_an_operand_that_stays_is_refused():
    fast = tautomer.optimize(Mlp(F.gelu, frozen=False), (X,), passes=[RecomputeInputs(), ApproximateActivations()])
    (reason,) = [r.reason for r in fast.report.refusals]
    assert reason == "what it reads is kept by linear_from too: two bits would come on top"


def test_where_nothing_trains_nothing_is_kept():
    fast = tautomer.optimize(Mlp(F.gelu).requires_grad_(False), (X,), passes=[ApproximateActivations()])
    assert [r.reason for r in fast.report.refusals] == ["nothing before it trains: it keeps nothing"]


def test_no_recipe_has_it_unasked():
    for recipe in (Inference(), Training(), Finetune()):
        assert not any(isinstance(p, ApproximateActivations) for p in recipe.passes())
    assert any(isinstance(p, ApproximateActivations) for p in Finetune(exact=False).passes())


def test_exact_rewrites_beside_it_are_still_held_to_their_gradients():
    fast = tautomer.optimize(Mlp(F.gelu), (X,), recipe=Finetune(exact=False))
    assert fast.report.fired("approximate-activations") == 1 and fast.report.evidence.forward <= 1e-12
