"""Take the sum that follows a LayerNorm without a shift into the norm.

layer_norm(x, g, eps) + b = layer_norm(x, g, b, eps)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import (
    Match,
    Operand,
    Ops,
    OptionalWeight,
    Rule,
    Scalar,
    Tensor,
    Weight,
    dtype,
    is_vector,
    require,
    width,
)


class AbsorbLayerNormShift(Rule):
    """A sum after a norm → the norm's shift; see the module."""

    claim = ALGEBRAIC("the kernel adds the shift before it rounds")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor, shape: Operand, g: OptionalWeight, eps: Scalar, b: Weight) -> Operand:
        return op.add(op.layer_norm(x, shape, g, None, eps), b)

    def where(self, m: Match) -> None:
        require(len(m.shape) == 1 and is_vector(m.b, width(m.x)), "the summand is not a vector over the norm's axis")
        require(dtype(m.b) == dtype(m.x), "the summand has another dtype than the norm")

    def after(self, op: Ops, x: Tensor, shape: Operand, g: OptionalWeight, eps: Scalar, b: Weight) -> Operand:
        return op.layer_norm(x, shape, g, op.weight(b), eps)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, g, b = (torch.randn(n, 6, dtype=torch.float64).squeeze(0) for n in (5, 1, 1))
        yield {"x": x, "shape": [6], "g": g, "eps": 1e-5, "b": b}
        yield {"x": x, "shape": [6], "g": None, "eps": 1e-5, "b": b}
