"""Take the product that follows a LayerNorm without a gain into the norm.

layer_norm(x, eps) * g = layer_norm(x, g, eps)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, Weight, dtype, is_vector, require, width


class AbsorbLayerNormGain(Rule):
    """A product after a norm → the norm's gain; see the module."""

    claim = ALGEBRAIC("the kernel multiplies by the gain before it rounds")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor, shape: Operand, eps: Operand, g: Weight) -> Operand:
        return op.mul(op.layer_norm(x, shape, None, None, eps), g)

    def where(self, m: Match) -> None:
        require(len(m.shape) == 1 and is_vector(m.g, width(m.x)), "the factor is not a vector over the norm's axis")
        require(dtype(m.g) == dtype(m.x), "the factor has another dtype than the norm")

    def after(self, op: Ops, x: Tensor, shape: Operand, eps: Operand, g: Weight) -> Operand:
        return op.layer_norm(x, shape, op.weight(g), None, eps)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, g = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        yield {"x": x, "shape": [6], "eps": 1e-5, "g": g}
