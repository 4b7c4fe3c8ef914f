"""Expressions over weights: several results, casts, and shared subexpressions that would be 2^40 calls as a tree."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.program import Program
from tautomer.rewrite.weights import Apply, Expression, Leaf, Weights, evaluate, leaves

aten = torch.ops.aten


def deep() -> Expression:
    x: Expression = Leaf("W")
    for _ in range(40):
        x = Apply(aten.mul.Tensor, (Apply(aten.add.Tensor, (x, x)), 0.5))
    return x


class Computed(nn.Module):
    """A weight that the forward computes."""

    def __init__(self, weight) -> None:
        super().__init__()
        self.W, self.g, self.weight = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5, 1)), weight

    def forward(self, x):
        return nn.functional.linear(x, self.weight(self))


def expression(weight) -> tuple[Program, Expression | None]:
    program = capture(Computed(weight).eval(), (torch.randn(3, 4),))
    (linear,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    return program, program.expression(linear.args[1])


def test_a_shared_subexpression_is_walked_once():
    W = torch.randn(3, dtype=torch.float64)
    assert torch.equal(evaluate(deep(), lambda name: W), W)
    assert list(leaves(deep())) == ["W"]
    table = Weights.of({"W": nn.Parameter(torch.randn(3))}, {}, {})
    table.stage(deep(), torch.empty(3), "V")
    assert table.edits() == table.copy().edits()


def test_one_of_several_results_is_an_expression():
    def standardized(m):
        var, mean = torch.var_mean(m.W, 1, keepdim=True)
        return (m.W - mean) / var.sqrt() * m.g

    program, found = expression(standardized)
    assert found is not None and set(leaves(found)) == {"W", "g"}
    W, g = (program.weights.leaf(name) for name in ("W", "g"))
    expected = (W - W.mean(1, keepdim=True)) / W.std(1, keepdim=True) * g
    assert torch.allclose(evaluate(found, program.weights.leaf), expected, rtol=1e-14)


def test_a_cast_to_another_float_does_not_round_what_is_folded_in_float64():
    program, found = expression(lambda m: (m.W.half() * 0.1).float())
    assert torch.allclose(evaluate(found, program.weights.leaf), program.weights.leaf("W") * 0.1, rtol=1e-15)


def test_random_numbers_are_no_expression():
    _, found = expression(lambda m: nn.functional.dropout(m.W, 0.5, True))
    assert found is None
