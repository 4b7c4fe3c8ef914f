"""Fold a LayerScale into the linear layer that it scales.

linear(x, W, b) * s = linear(x, diag(s) W, s b)        s one factor per output feature, or one for all
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.rules import (
    Match,
    Operand,
    Ops,
    OptionalWeight,
    Rule,
    Tensor,
    Weight,
    is_vector,
    rank,
    require,
    shape,
    width,
)


class FoldLayerScale(Rule):
    """A product after a linear layer → its weight; see the module."""

    claim = ALGEBRAIC("the product by s is rounded in W and b, not in the activation")

    def before(self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, s: Weight) -> Operand:
        return op.mul(op.linear(x, W, b), s)

    def where(self, m: Match) -> None:
        one_for_all = rank(m.s) == 0 or is_vector(m.s, 1)
        require(one_for_all or is_vector(m.s, width(m.root)), f"the factor has the shape {list(shape(m.s))}, not one per feature")

    def after(self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, s: Weight) -> Operand:
        return op.linear(x, op.mul(W, op.unsqueeze(s, -1)), None if b is None else op.mul(b, s))

    def samples(self) -> Iterator[dict[str, Any]]:
        x, W, b, s = (torch.randn(n, dtype=torch.float64) for n in ((3, 2, 4), (5, 4), (5,), (5,)))
        yield {"x": x, "W": W, "b": b, "s": s}
        yield {"x": x, "W": W, "b": None, "s": s}
        yield {"x": x, "W": W, "b": b, "s": s[0]}
