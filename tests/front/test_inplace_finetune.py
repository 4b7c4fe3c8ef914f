"""What keeps less and stays inside one module is written back into it: the user's object, its keys, its seeded run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tautomer

X = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.RMSNorm(16), nn.GELU()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.inner, self.outer = nn.Dropout(0.1), nn.Dropout(0.2)
        self.down.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.outer(self.down(self.inner(self.act(self.up(self.norm(x))))))
        return result


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    model(X).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_dropouts_and_norms_keep_less_in_place(observed: Any) -> None:
    original = nn.Sequential(Layer(), Layer()).train()
    model = copy.deepcopy(original)
    done = tautomer.optimize_(model, (X,), recipe="finetune", skip=["recompute-inputs"])
    assert set(done.modules) == {f"{i}.{name}" for i in range(2) for name in ("norm", "inner", "outer")}
    assert done.report.fired("pack-dropout-masks") == 4 and done.report.fired("lean-rms-norm") == 2
    assert isinstance(model[0].norm, nn.RMSNorm) and isinstance(model[0].inner, nn.Dropout)
    dropouts, second_norm = 2 * (4 * 64 - 8 + 4 * 16 - 2), 4 * 16
    statistic_of_the_first = 4  # its input needs no gradient: there it keeps one number per row more
    assert observed(original, X) - observed(model, X) == 10 * (dropouts + second_norm - statistic_of_the_first)
    _require_the_same(model, original)


def test_what_spans_modules_becomes_code_of_their_block(observed: Any) -> None:
    original = nn.Sequential(Layer(), Layer()).train()
    model, leaves = copy.deepcopy(original), copy.deepcopy(original)
    tautomer.optimize_(leaves, (X,), recipe="finetune", skip=["recompute-inputs"])
    done = tautomer.optimize_(model, (X,), recipe="finetune")
    assert done.report.fired("recompute-inputs") and {"0", "1"} <= set(done.modules) and isinstance(model[0], Layer)
    assert observed(model, X) < observed(leaves, X) < observed(original, X)
    _require_the_same(model, original)


def _require_the_same(model: nn.Module, original: nn.Module) -> None:
    assert model.state_dict().keys() == original.state_dict().keys()
    for candidate in (model, copy.deepcopy(model)):
        for a, b in zip(gradients(candidate), gradients(original), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(X), original.eval()(X))


@pytest.mark.parametrize("exact", [True, False])
def test_two_bits_are_written_back_on_request_alone(exact: bool, observed: Any) -> None:
    original = nn.Sequential(Layer()).train()
    model = copy.deepcopy(original)
    done = tautomer.optimize_(model, (X,), recipe=tautomer.Finetune(exact=exact))
    assert done.report.fired("approximate-activations") == (not exact)
    assert type(model[0].act) is (nn.GELU if exact else type(model[0].act)) and isinstance(model[0].act, nn.GELU)
    assert (observed(model, X) < 0.4 * observed(original, X)) is (not exact)
