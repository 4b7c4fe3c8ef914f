"""A linear layer lets go of its input where what it is computed from stays, and only there; bytes are observed, not estimated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.memory.lean_activations import LeanActivations
from tautomer.passes.memory.lean_rms_norm import LeanRmsNorm
from tautomer.passes.memory.recompute_inputs import RecomputeInputs
from tautomer.passes.raise_.raise_glu import RaiseGlu

D, H = 7, 12
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    def __init__(self, body: Callable[..., Any], bias: bool = True) -> None:
        super().__init__()
        self.first, self.up, self.gate = nn.Linear(D, D), nn.Linear(D, H, bias), nn.Linear(D, H, bias)
        self.down, self.other = nn.Linear(H, D, bias), nn.Linear(H, D)
        self.norm, self.rms = nn.LayerNorm(D), nn.RMSNorm(D, eps=1e-3)
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, self.first(x))


BODIES: dict[str, tuple[Callable[..., Any], int]] = {
    "gelu": (lambda m, x: m.down(F.gelu(m.up(x))), H),
    "tanh gelu": (lambda m, x: m.down(F.gelu(m.up(x), approximate="tanh")), H),
    "silu": (lambda m, x: m.down(F.silu(m.up(x))), H),
    "squared relu": (lambda m, x: m.down(F.relu(m.up(x)) ** 2), H),
    "mish": (lambda m, x: m.down(F.mish(m.up(x))), H),
    "two readers": (lambda m, x: m.down(F.gelu(u := m.up(x))) + m.other(F.gelu(u)), 2 * H),
    "swiglu": (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), 2 * H),
    "geglu": (lambda m, x: m.down(m.up(x) * F.gelu(m.gate(x))), 2 * H),
    "layer norm": (lambda m, x: m.up(m.norm(x)) + m.gate(m.norm(x)), 2 * D),
    "post norm": (lambda m, x: (z := m.norm(x)) @ torch.ones(D, H) + m.up(z), D),
    "rms norm": (lambda m, x: m.up(m.rms(x)), 2 * D),
}
PASSES = (RaiseGlu, LeanActivations, LeanRmsNorm, RecomputeInputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", BODIES)
def test_the_input_goes_and_gradients_stay(observed: Any, name: str, bias: bool) -> None:
    body, freed = BODIES[name]
    model = Mlp(body, bias)
    fast = tautomer.optimize(model, (X,), passes=[kind() for kind in PASSES])
    assert fast.report.fired("recompute-inputs") and fast.report.evidence.gradient <= 1e-12
    before, after = observed(model, X), observed(fast, X)
    assert before - after == 4 * 15 * freed
    assert tautomer.saved_tensors(fast).bytes == after
    grads = []
    for m in (model, fast):
        m.zero_grad()
        m(X).square().sum().backward()
        grads.append([p.grad for p in m.parameters() if p.grad is not None])
        assert torch.equal(m(X), model(X)) or name == "rms norm"
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_it_fires_at_any_batch_under_autocast_and_keeps_no_copy_of_a_weight(observed: Any) -> None:
    model = Mlp(lambda m, x: m.down(F.gelu(m.up(m.norm(x)))))
    fast = tautomer.optimize(model, (X,), passes=[RecomputeInputs(torch.bfloat16)])
    x = torch.randn(2, 9, D)
    before, after = observed(model, x, autocast=True), observed(fast, x, autocast=True)
    assert before - after == 2 * (18 * (D + H) + 2 * D * H)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = model(x), fast(x)
    assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b)
    a.float().square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    b.float().square().sum().backward()
    for name, p in fast.named_parameters():
        if name in wanted:
            assert float((p.grad - wanted[name]).abs().max()) <= 2**-7 * float(wanted[name].abs().max())


def refusals(observed: Any, model: nn.Module, *more: Any) -> list[str]:
    fast = tautomer.optimize(model, (X,), passes=[RecomputeInputs(), *more])
    assert not fast.report.fired("recompute-inputs")
    assert observed(fast, X) == observed(model, X)
    return [refusal.reason for refusal in fast.report.refusals]


def test_a_frozen_reader_keeps_nothing(observed: Any) -> None:
    model = Mlp(lambda m, x: m.down(F.gelu(m.up(x))))
    model.down.requires_grad_(False)
    assert refusals(observed, model) == ["the weight of down does not train, so its input is not kept"]


def test_an_input_that_something_else_keeps_stays(observed: Any) -> None:
    model = Mlp(lambda m, x: m.down(h := F.gelu(m.up(x))) + (h * h.sin()).sum())
    (reason,) = refusals(observed, model)
    assert reason.startswith("what aten.gelu returns is kept by ") and reason.endswith("computing it again would free nothing")


def test_a_source_that_is_not_kept_would_come_in_its_place(observed: Any) -> None:
    model = Mlp(lambda m, x: m.down(F.gelu(m.up(x))))
    model.requires_grad_(False)
    model.down.requires_grad_()
    (reason,) = refusals(observed, model)
    assert reason == "aten.linear 'linear_1', which it is computed from, is not kept: it would be, in its place"


def test_relu_keeps_its_result_and_is_left_alone(observed: Any) -> None:
    assert refusals(observed, Mlp(lambda m, x: m.down(F.relu(m.up(x))))) == []


def test_a_norm_over_two_axes_is_left_alone(observed: Any) -> None:
    assert refusals(observed, Mlp(lambda m, x: m.up(F.layer_norm(x, [5, D])))) == []


def test_a_layer_whose_weight_it_is_is_no_reader(observed: Any) -> None:
    assert refusals(observed, Mlp(lambda m, x: F.linear(torch.ones(2, D), F.gelu(x[0])))) == []


def test_a_tied_and_a_shared_layer() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.down(F.gelu(m.up(x))) @ m.up.weight.t() + m.down(F.gelu(m.gate(x))).sum()

    model = Mlp(body)
    fast = tautomer.optimize(model, (X,), passes=[RecomputeInputs()])
    assert fast.report.fired("recompute-inputs") == 2
    tautomer.verify(model, fast, (X,), gradients=True)
