"""Fold a factor on the output of a norm into its gain and its shift.

    layer_norm(x, g, b) * s = layer_norm(x, g s, b s)        rms_norm(x, g) * s = rms_norm(x, g s)

s is one factor for all, one per feature, or a number: 1/sqrt(l) of LayerNorm Scaling in layer l, d^-1/2 of a tied T5.

arXiv:2502.05795 (LayerNorm Scaling).
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
    width,
)


class FoldNormScale(Rule):
    """A product after a norm → its gain and shift; see the module."""

    claim = ALGEBRAIC("the product by s is rounded in the gain and the shift, not in the activation")
    paper = "arXiv:2502.05795"

    def before(
        self, op: Ops, x: Tensor, shape: Operand, axes: Operand, g: Weight, b: OptionalWeight, eps: Operand, epsilon: Operand,
        s: Weight, k: Scalar, d: Scalar,
    ) -> Operand:  # fmt: skip
        y = op.any_of(op.layer_norm(x, shape, g, b, eps), op.rms_norm(x, axes, g, epsilon))
        return op.any_of(op.mul(y, s), op.mul(y, k), op.div(y, d))

    def where(self, m: Match) -> None:
        one_for_all = m.s is None or rank(m.s) == 0 or is_vector(m.s, 1)
        per_feature = len(m.axes or m.shape) == 1 and is_vector(m.s, width(m.x))
        require(one_for_all or per_feature, "the factor is neither one for all nor a vector over the norm's axis")

    def after(
        self, op: Ops, x: Tensor, shape: Operand, axes: Operand, g: Weight, b: OptionalWeight, eps: Operand, epsilon: Operand,
        s: Weight, k: Scalar, d: Scalar,
    ) -> Operand:  # fmt: skip
        def scaled(v: Operand) -> Operand:
            return op.div(v, d) if d is not None else op.mul(v, k if k is not None else s)

        if shape is None:
            return op.rms_norm(x, axes, scaled(g), epsilon)
        return op.layer_norm(x, shape, scaled(g), None if b is None else scaled(b), eps)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, g, b, s = (torch.randn(n, 6, dtype=torch.float64).squeeze(0) for n in (5, 1, 1, 1))
        both = {"x": x, "shape": [6], "axes": [6], "g": g, "eps": 1e-5, "epsilon": 1e-3}
        yield {**both, "b": b, "s": s, "k": 0.5**0.5, "d": 3.0**0.5}
        yield {**both, "b": None, "s": s[0], "k": -2, "d": 4}
