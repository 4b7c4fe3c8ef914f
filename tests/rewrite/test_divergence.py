"""The loss of edited weights: KL where there are logits, relative error elsewhere, nothing where nothing changed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from tautomer.rewrite.capture import capture
from tautomer.rewrite.divergence import Divergence


@dataclass
class Output(ModelOutput):
    hidden: Tensor | None = None
    logits: Tensor | None = None


class Net(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named, self.first, self.head = named, nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Output | Tensor:
        hidden = self.first(x).tanh()
        return Output(hidden, self.head(hidden)) if self.named else self.head(hidden) * attention_mask.unsqueeze(-1)


def calls() -> list[list[Tensor]]:
    mask = torch.ones(2, 3, dtype=torch.long)
    mask[0, 2] = 0
    return [[torch.randn(2, 3, 4), mask] for _ in range(2)]


@pytest.mark.parametrize("named", [True, False])
def test_it_is_what_it_says(named: bool) -> None:
    model, given = Net(named).eval(), calls()
    divergence = Divergence(capture(model, tuple(given[0])), given)
    W = torch.randn(5, 6)
    assert divergence({}) == 0.0 and divergence.what.startswith("KL" if named else "relative error")
    was = [model(*x) for x in given]
    model.head.weight.data = W
    now = [model(*x) for x in given]
    wanted = 0.0
    for a, b, (_, mask) in zip(was, now, given, strict=True):
        if named:
            p, q = (out.logits[mask != 0].log_softmax(-1) for out in (a, b))
            wanted += F.kl_div(q, p, log_target=True, reduction="batchmean").item() / 2
        else:
            wanted += ((b - a).norm() / a.norm()).item() / 2
    model.head.weight.data = torch.zeros(5, 6)  # the program was captured with a weight of its own
    assert divergence({"head.weight": W}) == pytest.approx(wanted, rel=1e-4)
    assert divergence({"head.weight": W}, [1]) != divergence({"head.weight": W}, [0])
