"""Merge two linear layers with nothing between them into one, where that has no more parameters.

    linear(linear(x, A, c), B, b) = linear(x, B A, B c + b)          m n parameters instead of r (m + n)

The other way round from a factor of low rank: below the break-even m n / (m + n) two layers are the smaller form, and stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.equation import shape
from tautomer.rewrite.factors import cost
from tautomer.rewrite.pass_base import Purpose
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Tensor, Weight, require
from tautomer.rewrite.shapes import static


class MergeConsecutiveLinears(Rule):
    """Two linear layers in a row → one; see the module."""

    claim = ALGEBRAIC("the product of the weights is computed in float64 and rounded once")
    purpose: ClassVar[Purpose] = "size"

    def before(self, op: Ops, x: Tensor, A: Weight, c: OptionalWeight, B: Weight, b: OptionalWeight) -> Operand:
        return op.linear(op.linear(x, A, c), B, b)

    def where(self, m: Match) -> None:
        (rank, inputs), (outputs, _) = (tuple(static(size) or 0 for size in shape(W)) for W in (m.A, m.B))
        two, one = cost(outputs, inputs, rank), cost(outputs, inputs, None)
        require(one <= two, f"two layers through {rank} features have {two:,} parameters, and one has {one:,}")

    def after(self, op: Ops, x: Tensor, A: Weight, c: OptionalWeight, B: Weight, b: OptionalWeight) -> Operand:
        shift = None if c is None else op.mv(B, c)
        return op.linear(x, op.matmul(B, A), b if shift is None else shift if b is None else op.add(shift, b))

    def samples(self) -> Iterator[dict[str, Any]]:
        x, A, c, B, b = (torch.randn(n, dtype=torch.float64) for n in ((3, 4), (6, 4), (6,), (5, 6), (5,)))
        yield {"x": x, "A": A, "c": c, "B": B, "b": b}
        yield {"x": x, "A": A, "c": None, "B": B, "b": b}
        yield {"x": x, "A": A, "c": c, "B": B, "b": None}
