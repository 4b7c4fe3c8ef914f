"""Two linear layers in a row are one, where one is not larger; what stands or reads between them keeps them two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tautomer

NAME = "merge-consecutive-linears"
CLEAN = ["drop-dead-code", "drop-unused-weights", "name-weights"]
X = torch.randn(3, 5, 8, dtype=torch.float64)


def merged(*layers: nn.Module) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(*layers).double().eval()
    return model, tautomer.optimize(model, (X,), passes=[NAME, *CLEAN])


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_one_layer_of_the_same_answers(bias: bool) -> None:
    model, fast = merged(nn.Linear(8, 16, bias=bias), nn.Linear(16, 6), nn.Linear(6, 6, bias=bias))
    assert fast.report.fired(NAME) == 2 and sorted(p.ndim for p in fast.parameters()) == [1, 2]
    torch.testing.assert_close(fast(X), model(X), rtol=1e-12, atol=1e-12)
    assert fast(X[:1, :4]).shape == (1, 4, 6)


def test_weights_stored_transposed() -> None:
    model, fast = merged(Conv1D(16, 8), Conv1D(8, 16))
    assert fast.report.fired(NAME) == 1
    torch.testing.assert_close(fast(X), model(X), rtol=1e-12, atol=1e-12)


def test_factors_of_low_rank_stay() -> None:
    _, fast = merged(nn.Linear(8, 2), nn.Linear(2, 8))
    (refusal,) = fast.report.refusals
    assert refusal.reason == "two layers through 2 features have 32 parameters, and one has 64"


def test_what_stands_or_reads_between_keeps_them() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.second(y), y

    assert not merged(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))[1].report.fired(NAME)
    fast = tautomer.optimize(Read().double().eval(), (X,), passes=[NAME])
    assert not fast.report.fired(NAME)


def test_the_recipe_merges_before_it_factors() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).eval()
    data = [torch.randn(16, 32) for _ in range(4)]
    fast = tautomer.optimize(model, (data[0],), recipe=tautomer.Compress(ratio=0.5), data=data)
    assert fast.report.fired(NAME) == 1 and fast.report.fired("factor-linears") == 1
    assert sum(p.numel() for p in fast.parameters() if p.ndim == 2) <= 0.5 * 32 * 32
