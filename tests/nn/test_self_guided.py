"""The dense matrix leads by alpha, which falls from 1 to 0; then it is gone, from the model and from the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tautomer.nn import LowRankLinear, SelfGuidance, SelfGuidedLinear, replace_linears
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.structured import LowRank


def ffn() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()


@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.2, 0.0])
def test_it_is_the_mixture(alpha):
    layer, W = LowRankLinear(8, 16, 4, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    guided, x = SelfGuidedLinear(layer, W), torch.randn(3, 8, dtype=torch.float64)
    guided.alpha = alpha
    expected = nn.functional.linear(x, alpha * W + (1 - alpha) * layer.merged(), layer.bias)
    assert torch.allclose(guided(x), expected, atol=1e-13)
    gradients = torch.autograd.grad(guided(x).square().sum(), guided.parameters(), allow_unused=True)
    W.requires_grad_(True)
    y = nn.functional.linear(x, alpha * W + (1 - alpha) * layer.U @ layer.V, layer.bias)
    expected = torch.autograd.grad(y.square().sum(), (W, layer.V, layer.U, layer.bias))
    for name, ours, theirs in zip(("W", "V", "U", "bias"), gradients, expected, strict=True):
        assert (ours is None and name == "W" and alpha == 0) or torch.allclose(ours, theirs, atol=1e-11)


def test_it_starts_as_the_layer_or_as_the_dense_layer():
    layer, x = LowRankLinear(8, 16, 4), torch.randn(3, 8)
    assert torch.allclose(SelfGuidedLinear(layer)(x), layer(x), atol=1e-6)
    model = ffn()
    expected, weight, x = model(x.double()), model[0].weight, x.double()
    replace_linears(model, LowRank(2), guide=True)
    assert torch.allclose(model(x), expected, atol=1e-14) and model[0].weight is weight
    with pytest.raises(UsageError, match=r"dense matrix is \[8, 16\], the layer \[16, 8\]"):
        SelfGuidedLinear(layer, torch.zeros(8, 16))


def test_the_cosine_and_the_end():
    model = ffn()
    replace_linears(model, LowRank(4), guide=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    guidance, alphas, x = SelfGuidance(model, 4, optimizers=[optimizer]), [], torch.randn(5, 8, dtype=torch.float64)
    inner = model[0].layer
    for _ in range(6):
        alphas.append(guidance.alpha)
        assert {layer.alpha for layer in guidance.layers} <= {guidance.alpha}
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        guidance.step()
    assert alphas[4:] == [0, 0]
    assert alphas[:4] == pytest.approx([(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)], abs=1e-15)
    assert model[0] is inner and set(model.state_dict()) == {f"{i}.{name}" for i in (0, 2) for name in ("V", "U", "bias")}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}


def test_the_cheap_form_computes_the_dense_product_with_probability_alpha():
    model = nn.Sequential(*(SelfGuidedLinear(LowRankLinear(4, 4, 2), torch.eye(4)) for _ in range(50)))
    guidance, again = SelfGuidance(model, 10, cheap=True, seed=3), SelfGuidance(model, 10, cheap=True, seed=3)
    for count in range(10):
        shares = []
        for one in (guidance, again):
            one.seek(count)
            shares.append([layer.guided for layer in model])
        assert shares[0] == shares[1], "all ranks draw alike"
        assert abs(sum(shares[0]) / 50 - guidance.alpha) < 0.25
    layer, x = model[0], torch.randn(2, 4)
    layer.alpha, layer.guided = 0.5, False
    assert torch.equal(layer.train()(x), layer.layer(x)) and not torch.equal(layer.eval()(x), layer.layer(x))


def test_a_training_goes_on_where_it_was():
    model = nn.Sequential(SelfGuidedLinear(LowRankLinear(4, 4, 2)))
    guidance = SelfGuidance(model, 8)
    guidance.seek(2)
    assert model[0].alpha == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    guidance.seek(9)
    assert isinstance(model[0], LowRankLinear)


def test_a_compiled_training_is_compiled_once():
    model = nn.Sequential(SelfGuidedLinear(LowRankLinear(4, 4, 2)))
    compiled, guidance, x = torch.compile(model, backend="eager", fullgraph=True), SelfGuidance(model, 8), torch.randn(2, 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(6):
            assert torch.allclose(compiled(x), model(x))
            guidance.step()


def test_autocast_and_half_precision():
    layer, x = SelfGuidedLinear(LowRankLinear(4, 4, 2, dtype=torch.bfloat16)), torch.randn(2, 4)
    layer.alpha = 0.3
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16


def test_what_cannot_be_done_is_said():
    with pytest.raises(UsageError, match=r"no self-guided layer\n.*guide=True"):
        SelfGuidance(nn.Linear(2, 2), 10)
    with pytest.raises(UsageError, match="a step at least"):
        SelfGuidance(SelfGuidedLinear(LowRankLinear(4, 4, 2)), 0)
