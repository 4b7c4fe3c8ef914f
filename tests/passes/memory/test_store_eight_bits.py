"""Inputs of linear layers in eight bits: where it keeps less, the gradient of the weight alone moves, and by how much."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tautomer
from tautomer.passes.memory.store_eight_bits import StoreEightBits
from tautomer.passes.recipes import Finetune
from tautomer.rewrite.claims import APPROXIMATE_GRADIENT
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.program import Program

X = torch.randn(6, 5, 70, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Two layers on one tensor, of a width that is no multiple of a group, and one on what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.q, self.k = nn.Linear(70, 70), nn.Linear(70, 8), nn.Linear(70, 8, bias=False)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).tanh()
        return self.leave(self.q(x) * self.k(x))


def captured(model: nn.Module) -> Program:
    return tautomer.capture(copy.deepcopy(model), (X,), mode="train", dynamic_shapes="static")


def gradients(model: nn.Module, autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(X).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_layers_on_one_tensor_share_eight_bits_and_the_forward_keeps_its_own(observed: Any) -> None:
    model = Heads().train()
    fast = tautomer.optimize(captured(model), passes=[StoreEightBits()])
    rows, wide, narrow = 30, 70 + 2 * 8, 8 + 8
    assert fast.report.fired("store-eight-bits") == 2, "of X, and of what goes to the last layer; tanh keeps its result"
    assert observed(model, X) - observed(fast, X) == rows * (4 * (70 + 8) - wide - narrow)
    assert tautomer.saved_tensors(fast).bytes == observed(fast, X)
    assert torch.equal(fast(X), model(X))
    (reason,) = {r.reason for r in fast.report.refusals}
    assert "is kept by tanh too: eight bits would come on top" in reason


@pytest.mark.parametrize("autocast", [False, True])
def test_a_weights_gradient_alone_moves_and_stays_near(autocast: bool, observed: Any) -> None:
    model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 8), nn.Linear(8, 3, bias=False)).train()
    passes = [StoreEightBits(torch.bfloat16 if autocast else None)]
    fast = tautomer.optimize(captured(model), passes=passes)
    assert fast.report.fired("store-eight-bits") == 3
    ours, theirs = gradients(fast, autocast), gradients(model, autocast)
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert error <= 1e-2, name
        assert autocast or (error > 1e-5) is name.endswith("weight"), name
    assert (
        observed(fast, X, autocast=autocast) == tautomer.saved_tensors(fast, autocast=torch.bfloat16 if autocast else None).bytes
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_that_copies_a_view_keeps_its_copy_in_eight_bits(autocast: bool, observed: Any) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(70, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.transpose(1, 0))

    model, dtype = Turned().train(), torch.bfloat16 if autocast else None
    fast = tautomer.optimize(captured(model), passes=[StoreEightBits(dtype)])
    assert fast.report.fired("store-eight-bits") == 1
    assert observed(fast, X, autocast=autocast) == tautomer.saved_tensors(fast, autocast=dtype).bytes
    assert observed(fast, X, autocast=autocast) < observed(model, X, autocast=autocast)
    assert torch.equal(fast(X), model(X))


def test_it_is_only_for_those_who_ask() -> None:
    names = [rewrite.name for rewrite in Finetune(exact=False).passes()]
    assert "store-eight-bits" not in names
    with pytest.raises(UsageError, match="eight bits make the gradients of weights approximate"):
        Finetune(eight_bits=True)


def test_a_budget_may_use_them(observed: Any) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(70, 70), nn.Tanh(), nn.Linear(70, 70)) for _ in range(3))).train()
    recipe = Finetune(exact=False, eight_bits=True, budget=0.7)
    fast = tautomer.optimize(captured(model), recipe=recipe, skip=["checkpoint-blocks"])
    assert fast.report.fired("store-eight-bits") and observed(fast, X) == fast.report.plan.after <= fast.report.plan.budget
    assert {a.claim for a in fast.report.applications if a.rewrite == "store-eight-bits"} == {APPROXIMATE_GRADIENT.name}


def test_frozen_layers_keep_no_input() -> None:
    model = Heads().requires_grad_(False)
    model.enter.requires_grad_()
    fast = tautomer.optimize(captured(model), passes=[StoreEightBits()])
    assert [a.id for a in fast.report.applications] == ["store-eight-bits@enter/linear"]
    assert all("does not train" in r.reason for r in fast.report.refusals)
