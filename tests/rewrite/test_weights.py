"""Expressions over weights."""

from __future__ import annotations

import torch

from tautomer.rewrite.weights import Apply, Leaf, evaluate

aten = torch.ops.aten


def test_a_cast_inside_does_not_narrow_what_is_folded_in_float64() -> None:
    """1 + float32(g), as in Gemma: its gradient in float64 was float32's."""
    g = torch.tensor([1 / 3], dtype=torch.float64)
    gain = Apply(aten.add.Tensor, (Apply(aten.to.dtype, (Leaf("g"), torch.float32)), 1.0))
    value = evaluate(gain, {"g": g}.__getitem__)
    assert value.dtype is torch.float64 and value.item() == 1 + 1 / 3
    narrow = evaluate(gain, {"g": g.bfloat16()}.__getitem__)
    assert narrow.dtype is torch.float32
