"""What every substitute for attention has in common: which places it takes, what it refuses and in which words, what it notes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.window_attention import WindowAttention
from tautomer.rewrite.errors import UsageError

X = torch.randn(2, 9, 8)


class Attention(nn.Module):
    def __init__(self, mask: Callable[..., Any] | None = None, other: bool = False, **options: Any) -> None:
        super().__init__()
        self.qkv, self.mask, self.other, self.options = nn.Linear(8, 24), mask, other, options
        self.table = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.other:
            k = self.qkv(x.flip(1)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)[1]
        mask = self.mask(self, x) if self.mask else None
        return x + F.scaled_dot_product_attention(q, k, v, mask, **self.options).transpose(1, 2).flatten(2)


def away(x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1])
    return at[:, None] - at


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "other": (Attention(lambda m, x: (x[..., :1] > x[..., 0][:, None])[:, None]), "its mask is nothing that window-"),
    "window": (Attention(lambda m, x: away(x).abs() < 7), "its mask is a band of 6 before and 6 after, for which"),
    "bias": (Attention(lambda m, x: m.table[away(x).abs()]), "a bias of positions is added to its scores"),
    "crossed": (Attention(other=True), "its queries and keys are not of one sequence"),
    "dropout": (Attention(dropout_p=0.1), "attention weights are dropped out"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_represent_is_refused_in_a_sentence(name: str) -> None:
    model, sentence = REFUSED[name]
    fast = tautomer.optimize(model.eval(), (X,), passes=[WindowAttention(3)])
    assert not fast.report.applications
    assert sentence in fast.report.refusals[0].reason


def stack() -> nn.Module:
    return nn.Sequential(*(Attention(is_causal=True) for _ in range(3))).eval()


def places(**options: Any) -> list[str]:
    passing = {name: options.pop(name) for name in ("skip", "fuel") if name in options}
    fast = tautomer.optimize(stack(), (X,), passes=[WindowAttention(3, sinks=0, **options)], **passing)
    return [application.id.split("@")[1][0] for application in fast.report.applications]


def test_layers_are_chosen_by_number_or_by_path() -> None:
    assert places() == ["0", "1", "2"]
    assert places(layers=(-1, 0)) == ["0", "2"]
    assert places(layers=["1"], skip=["2"]) == ["1"]
    assert (places(layers=1), places(layers="2")) == (["1"], ["2"])
    assert places(fuel=2) == ["0", "1"]
    with pytest.raises(UsageError, match="there is no attention 7"):
        places(layers=[7])


def test_the_report_says_what_it_saves() -> None:
    fast = tautomer.optimize(stack(), (X,), passes=[WindowAttention(64, sinks=0)])
    assert fast.report.applications[0].note == "0.031 of its operations at 4096 positions, fewer from 256 on"
    assert fast.report.applications[0].claim == "approximate"
