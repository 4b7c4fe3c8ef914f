"""An expression is computed in the dtype that is asked for, casts in it included, and rounded by nobody on the way."""

from __future__ import annotations

import torch

from tautomer.rewrite.expressions import Apply, Leaf, evaluate, leaves

aten = torch.ops.aten


def test_a_cast_in_an_edit_does_not_round() -> None:
    plus_one = Apply(aten.add.Tensor, (Apply(aten.to.dtype, (Leaf("w"), torch.bfloat16)), 1.0))
    w = torch.randn(5, dtype=torch.float64)
    assert torch.equal(evaluate(plus_one, lambda name: w), w + 1)
    assert evaluate(plus_one, lambda name: w.float(), torch.float32).dtype is torch.float32


def test_an_integer_cast_stays() -> None:
    cut = Apply(aten.to.dtype, (Leaf("w"), torch.int64))
    assert torch.equal(evaluate(cut, lambda name: torch.tensor([1.7], dtype=torch.float64)), torch.tensor([1]))


def test_leaves_in_order_each_once() -> None:
    both = Apply(aten.cat.default, ((Leaf("a"), Apply(aten.mul.Tensor, (Leaf("b"), Leaf("a")))),))
    assert list(leaves(both)) == ["a", "b"]
    assert "mul" in str(both)
