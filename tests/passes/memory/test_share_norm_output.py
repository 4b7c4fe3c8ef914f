"""A norm keeps its output only where a layer keeps that anyway; where it does not, forcing it would free nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tautomer
from tautomer.passes.memory.lean_rms_norm import LeanRmsNorm
from tautomer.passes.memory.recompute_inputs import RecomputeInputs
from tautomer.passes.memory.share_norm_output import ShareNormOutput

D = 7
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-4, 30.0])[:, None, None]


class Attention(nn.Module):
    """A norm of a projection, read by q, k and v; ``lora`` freezes the three and adds an adapter to q behind a dropout."""

    def __init__(self, norm: nn.Module, lora: float | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(D, D), norm, nn.Dropout(lora or 0.0)
        self.q, self.k, self.v = (nn.Linear(D, 2 * D, bias=i > 0) for i in range(3))
        self.A, self.B = nn.Linear(D, 2, bias=False), nn.Linear(2, 2 * D, bias=False)
        self.lora = lora
        if lora is not None:
            nn.ModuleList([self.norm, self.q, self.k, self.v]).requires_grad_(False)
        else:
            nn.ModuleList([self.A, self.B]).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.norm(x + self.first(x))
        y = self.q(z) + self.k(z) + self.v(z)
        return y if self.lora is None else y + self.B(self.A(self.drop(z) if self.lora else z))


NORMS = {
    "layer": lambda: nn.LayerNorm(D, eps=1e-3),
    "layer, no shift": lambda: nn.LayerNorm(D, bias=False),
    "layer, plain": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(D, eps=1e-3),
    "rms, default eps": lambda: nn.RMSNorm(D),
}


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("lora", [None, 0.0])
def test_the_input_goes_and_gradients_stay(observed: Any, name: str, lora: float | None) -> None:
    model = Attention(NORMS[name](), lora)
    with torch.no_grad():
        for p in model.norm.parameters():
            p.normal_()
    model.double()
    fast = tautomer.optimize(model, (X.double(),), passes=[LeanRmsNorm(), ShareNormOutput()])
    assert fast.report.fired("share-norm-output") == 1
    before, after = observed(model, X.double()), observed(fast, X.double())
    assert before - after >= 8 * 15 * D if "layer" in name else after < before
    assert tautomer.saved_tensors(fast).bytes == after
    mine, theirs = gradients(fast, X.double()), gradients(model, X.double())
    assert mine.keys() == theirs.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for key, wanted in theirs.items():
        assert float((mine[key] - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max()), key


def test_under_autocast_the_output_has_sixteen_bits_and_one_copy(observed: Any) -> None:
    model, x = Attention(nn.LayerNorm(D)), X
    before = observed(model, x, autocast=True)
    fast = tautomer.optimize(model, (x,), passes=[ShareNormOutput(torch.bfloat16)])
    again = tautomer.optimize(model, (x,), passes=[RecomputeInputs(torch.bfloat16)])
    after, other = observed(fast, x, autocast=True), observed(again, x, autocast=True)
    weights, copies = 2 * 3 * 2 * D * D, 3 * 2 * 15 * D
    assert tautomer.saved_tensors(model, (x,), autocast=torch.bfloat16).bytes == before
    assert before - other == copies + weights, "the input of the norm has 32 bits and stays"
    assert before - after == copies + weights + (4 - 2) * 15 * D + 4 * 15, "16 bits in its place, one statistic less"
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = gradients(fast, x), gradients(model, x)
    for key, wanted in theirs.items():
        assert float((mine[key] - wanted).abs().max()) <= 2**-6 * float(wanted.abs().max()), key


def refusals(model: nn.Module, *passes: object) -> list[str]:
    fast = tautomer.optimize(model, (X,), passes=[*passes, ShareNormOutput()])
    assert not fast.report.fired("share-norm-output")
    return [refusal.reason for refusal in fast.report.refusals if refusal.rewrite == "share-norm-output"]


def forced(observed: Any, model: nn.Module) -> int:
    """What is kept if the norm keeps its output although nobody else does."""
    norm = model.norm

    class Forced(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.tautomer.ms_layer_norm.v1(x, norm.weight, norm.bias, norm.eps)[0]

    model.norm = Forced()
    return observed(model, X)


def test_a_dropout_before_the_adapter_is_refused_and_would_free_nothing(observed: Any) -> None:
    model = Attention(nn.LayerNorm(D), 0.1)
    (reason,) = refusals(model)
    assert reason == (
        "the weight of q, k, v does not train, so its input is not kept; "
        "drop drops entries out and what reads that keeps another tensor"
    )
    before = observed(model, X)
    assert before - forced(observed, model) <= 4 * 15, "the mean of each row at most"


def test_frozen_readers_are_refused_and_would_free_nothing(observed: Any) -> None:
    model = Attention(nn.LayerNorm(D), 0.0)
    model.A.requires_grad_(False)
    assert refusals(model) == ["the weight of q, k, v, A does not train, so its input is not kept"]
    before = observed(model, X)
    assert before - forced(observed, model) <= 4 * 15


def test_a_norm_without_a_linear_reader_is_refused() -> None:
    assert refusals(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))) == ["no linear layer reads it"]


def test_an_input_that_something_else_keeps_is_refused(observed: Any) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(self.norm(x)) + x.sin()

    (reason,) = refusals(Kept())
    assert reason == "60 bytes would be freed, and 420 if the layers computed it again from its input, which stays"
