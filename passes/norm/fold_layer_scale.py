"""Fold a LayerScale into the linear layer that it scales.

linear(x, W, b) * s = linear(x, diag(s) W, s b)        s one factor per output feature, or one for all
linear(x, W, b) * k = linear(x, k W, k b)              k a number, or a division by one: x + 0.22 f(x)
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
    Scalar,
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

    def before(self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, s: Weight, k: Scalar, d: Scalar) -> Operand:
        y = op.linear(x, W, b)
        return op.any_of(op.mul(y, s), op.mul(y, k), op.div(y, d))

    def where(self, m: Match) -> None:
        one_for_all = rank(m.s) == 0 or is_vector(m.s, 1)
        require(one_for_all or is_vector(m.s, width(m.root)), f"the factor has the shape {list(shape(m.s))}, not one per feature")

    def after(self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, s: Weight, k: Scalar, d: Scalar) -> Operand:
        def scaled(v: Operand, s: Operand) -> Operand:
            return op.div(v, d) if d is not None else op.mul(v, k if k is not None else s)

        column = None if s is None else op.unsqueeze(s, -1)
        return op.linear(x, scaled(W, column), None if b is None else scaled(b, s))

    def samples(self) -> Iterator[dict[str, Any]]:
        x, W, b, s = (torch.randn(n, dtype=torch.float64) for n in ((3, 2, 4), (5, 4), (5,), (5,)))
        yield {"x": x, "W": W, "b": b, "s": s, "k": -0.22, "d": 3.0}
        yield {"x": x, "W": W, "b": None, "s": s, "k": 2, "d": 4}
        yield {"x": x, "W": W, "b": b, "s": s[0], "k": 0.0, "d": 0.5}
