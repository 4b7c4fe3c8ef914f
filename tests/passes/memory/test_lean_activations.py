"""A gated unit lets go of the activation of its gate, quick GELU of its sigmoid."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.memory.lean_activations import LeanActivations
from tautomer.passes.memory.recompute_inputs import RecomputeInputs
from tautomer.passes.raise_.raise_glu import RaiseGlu
from tautomer.passes.raise_.raise_quick_gelu import RaiseQuickGelu

X = torch.randn(4, 3, 7)


class Glu(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act, self.both = act, nn.Linear(7, 10)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return self.act(gate) * up


@pytest.mark.parametrize("act", [F.silu, F.gelu, lambda u: F.gelu(u, approximate="tanh")])
def test_the_activation_goes(act):
    model = Glu(act)
    fast = tautomer.optimize(model, (X,), passes=[RaiseGlu(), LeanActivations()])
    assert fast.report.fired("lean-activations") == 1 and fast.report.evidence.gradient <= 1e-12
    before, after = tautomer.saved_tensors(model, (X,)), tautomer.saved_tensors(fast)
    assert before.bytes - after.bytes == 4 * 12 * 5


@pytest.mark.parametrize(("act", "name"), [(torch.sigmoid, "sigmoid"), (F.relu, "relu")])
def test_an_activation_that_keeps_its_result_frees_nothing(act, name):
    fast = tautomer.optimize(Glu(act), (X,), passes=[RaiseGlu(), LeanActivations()])
    assert [r.reason for r in fast.report.refusals] == [
        f"{name} keeps its result, which the product shares: nothing would be freed"
    ]
    gate, up = (torch.randn(5, 5, requires_grad=True) for _ in range(2))
    sizes = []
    for call in (torch.ops.tautomer.glu.v1, torch.ops.tautomer.lean_glu.v1):
        kept = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.add(t.data_ptr()) or t, lambda t: t):
            call(gate, up, name)
        sizes.append(len(kept))
    assert sizes == [2, 2], "as many as before"


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 7)

    def forward(self, x):
        u = self.up(x)
        return self.down(u * torch.sigmoid(1.702 * u))


def test_the_sigmoid_of_quick_gelu_goes_and_its_result_too():
    model, x = Mlp(), torch.randn(4, 7)
    fast = tautomer.optimize(model, (x,), passes=[RaiseQuickGelu(), LeanActivations(), RecomputeInputs()])
    assert fast.report.fired("lean-activations") == fast.report.fired("recompute-inputs") == 1
    before, after = tautomer.saved_tensors(model, (x,)).bytes, tautomer.saved_tensors(fast).bytes
    assert (before, after) == (4 * 4 * (7 + 9 + 9 + 9), 4 * 4 * (7 + 9))
    tautomer.verify(model, fast, (x,), gradients=True)


def test_a_stretched_gate_is_refused():
    class Stretched(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(7, 7)

        def forward(self, x):
            x = self.first(x)
            return torch.ops.tautomer.glu.v1(x[..., :1], x, "silu")

    fast = tautomer.optimize(Stretched(), (X,), passes=[LeanActivations()])
    assert [r.reason for r in fast.report.refusals] == ["one factor is stretched along the other"]
