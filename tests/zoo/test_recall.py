"""docs/recall.md says what is so: every line is counted anew, the program held to its claims.

A few models of each kind run with every test; all of them behind ``zoo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo.recall import Present, recall
from zoo.recall_models import RECALL

LINES = (Path(__file__).parents[2] / "docs/recall.md").read_text().splitlines()
ROWS = {line.split("|")[1].strip(): line for line in LINES if line.count("|") == 7 and "`" in line}
NAMED = ("gpt2", "llama", "t5", "swin", "wav2vec2", "gemma2")


def test_the_page_covers_the_models() -> None:
    assert list(ROWS) == list(RECALL)


def test_what_is_missing_says_why() -> None:
    for row in ROWS.values():
        _, _, _, norms, attentions, _, reason, _ = row.split("|")
        complete = all(found == present for found, present in (pair.split("/") for pair in map(_spaceless, (norms, attentions))))
        assert complete or len(reason.split()) > 5, row


def _spaceless(text: str) -> str:
    return text.replace(" ", "")


@pytest.mark.parametrize("name", [*NAMED, *(pytest.param(name, marks=pytest.mark.zoo) for name in ROWS if name not in NAMED)])
def test_the_line_of_a_model_is_so(name: str) -> None:
    found = recall(RECALL[name])
    assert found.row(name) == ROWS[name]
    assert found.forward <= 1e-12 and found.gradient <= 1e-10


class Counted(nn.Module):
    """Two norms, one of them by hand; attention by hand, by the library, and two softmaxes that are none."""

    class HandNorm(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * x.pow(2).mean(-1, keepdim=True).rsqrt()

    class NoNorm(nn.Module):
        def forward(self, x: Any) -> Any:
            return 2 * x + 1

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([self.HandNorm(), nn.LayerNorm(8), self.NoNorm(), nn.BatchNorm1d(8)])
        self.route, self.whole = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        for norm in self.norms:
            x = norm(x) if not isinstance(norm, nn.BatchNorm1d) else norm(x.mT).mT
        by_hand = F.dropout((x @ x.mT).float().masked_fill(x[..., :1].mT > 0, -1e9).softmax(-1), 0.1, False) @ x
        routed = self.route(x).softmax(-1) @ x.mT  # a softmax of no product
        capped = (x @ x.mT).softmax(-1).sum()  # a softmax that is no factor
        return F.scaled_dot_product_attention(x, x, x) + by_hand + self.whole(x, x, x)[0], routed, capped


def test_the_count_knows_what_it_counts() -> None:
    model = Counted().eval()
    with torch.no_grad(), Present(model) as present:
        model(torch.randn(2, 8, 8))
    assert (present.norms, present.attentions) == (2, 3)
