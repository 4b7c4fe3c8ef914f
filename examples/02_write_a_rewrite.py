"""A rewrite of your own, in one file: two linear layers with nothing in between are one.

    linear(linear(x, W, b), V, c) = linear(x, V W, V b + c)

The class below is all there is to write. It is tried without any model, then used in ``optimize``, then both models are
compared the way a test would. Takes about ten seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import tautomer
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Tensor, Weight, require, shape
from tautomer.rewrite.trial import try_rule


class ComposeLinears(Rule):
    """Two linear layers in a row → one."""

    claim = ALGEBRAIC("V W is rounded once, in the weight; the value between the layers is not rounded at all")

    def before(self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, V: Weight, c: OptionalWeight) -> Operand:
        return op.linear(op.linear(x, W, b), V, c)

    def where(self, m: Match) -> None:
        (middle, inputs), (outputs, _) = shape(m.W), shape(m.V)
        product, factors = outputs * inputs, middle * (inputs + outputs)
        require(product <= factors, f"the product has {product} entries, its factors {factors}: a low rank is kept")

    def after(self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, V: Weight, c: OptionalWeight) -> Operand:
        if b is not None:
            c = op.mv(V, b) if c is None else op.add(op.mv(V, b), c)
        return op.linear(x, op.matmul(V, W), c)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, W, b, V, c = (torch.randn(n, dtype=torch.float64) for n in ((3, 4), (6, 4), (6,), (5, 6), (5,)))
        yield {"x": x, "W": W, "b": b, "V": V, "c": c}
        yield {"x": x, "W": W, "b": None, "V": V, "c": None}


class Model(nn.Module):
    """A head of two layers, and an adapter of rank 2 that had better stay two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16))
        self.adapter = nn.Sequential(nn.Linear(32, 2, bias=False), nn.Linear(2, 16, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).relu() + self.adapter(x)


def test_the_rule_holds_on_its_own_samples() -> None:
    trial = try_rule(ComposeLinears())
    print(f"{trial.spellings} spellings fired, {trial.refused} of {trial.near_misses} near misses refused "
          f"(the others are equal all the same), worst error {trial.error:.0e}")  # fmt: skip
    assert trial.error <= 1e-12


def test_the_rule_in_a_model() -> None:
    model, x = Model().eval(), torch.randn(4, 32)
    fast = tautomer.optimize(model, (x,), passes=[ComposeLinears(), "drop-unused-weights"])
    print(fast.report)
    assert fast.report.fired("compose-linears") == 1
    assert any("a low rank is kept" in refusal.reason for refusal in fast.report.refusals)
    evidence = tautomer.verify(model, fast, (x,), gradients=True)
    print(f"verify: {evidence}")


if __name__ == "__main__":
    print(ComposeLinears().equation, end="\n\n")
    test_the_rule_holds_on_its_own_samples()
    test_the_rule_in_a_model()
