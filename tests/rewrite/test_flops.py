"""FLOPs of kernels, against the count on paper."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import tautomer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.conv = nn.Linear(8, 24), nn.Conv1d(8, 4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.conv(F.gelu(y).transpose(1, 2))


def test_products_by_their_formula_and_the_rest_by_entries() -> None:
    flops = tautomer.saved_tensors(Attention(), (torch.randn(2, 5, 8),)).flops
    assert flops["linear"] == 2 * 10 * 8 * 24 or flops["linear"] == 2 * 10 * 8 * 24 + 10 * 24
    assert flops["scaled_dot_product_attention"] == 2 * (2 * 2 * 2 * 5 * 5 * 4)
    assert flops["gelu"] == 2 * 5 * 8
    assert flops["conv1d"] == 2 * 2 * 3 * 3 * 8 * 4
    assert not any(count for name, count in flops.items() if name.startswith(("unflatten", "permute", "select", "transpose")))


def test_what_is_computed_again_is_counted_by_step() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
    model.insert(0, nn.Linear(8, 8))
    fast = tautomer.optimize(model, (torch.randn(3, 8),), recipe="finetune")
    saved = tautomer.saved_tensors(fast)
    assert fast.report.fired("recompute-inputs") == 2 and saved.recomputed == 3 * 8 + 3 * 16
