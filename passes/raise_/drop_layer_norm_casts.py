"""Drop the casts around a LayerNorm: the kernel accumulates in float32 and rounds once by itself.

    half(layer_norm(float32(x), g, b, eps)) = layer_norm(x, g, b, eps)        x, g and b of the half type

as in OLMo and Cohere. A gain or shift in float32 that is no cast of a half one keeps the casts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Scalar, Tensor, Weight, is_vector, require, width

from .spellings import require_half, rounded


class DropLayerNormCasts(Rule):
    """Casts around a LayerNorm → the kernel's own; see the module."""

    claim = ALGEBRAIC("the cast back to half precision is the kernel's own, after the gain")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor, shape: Operand, g: OptionalWeight, b: OptionalWeight, w: Weight, eps: Scalar,
               half: Operand) -> Operand:  # fmt: skip
        wide = op.cast(x, torch.float32)
        scaled = op.mul(op.layer_norm(wide, shape, None, None, eps), w)
        return op.any_of(op.cast(op.layer_norm(wide, shape, g, b, eps), half), op.cast(scaled, half))

    def where(self, m: Match) -> None:
        require(len(m.shape) == 1 and (m.w is None or is_vector(m.w, width(m.x))), "the gain is not a vector over the last axis")
        require_half(m, m.g, m.b, m.w)

    def after(self, op: Ops, x: Tensor, shape: Operand, g: OptionalWeight, b: OptionalWeight, w: Weight, eps: Scalar,
              half: Operand) -> Operand:  # fmt: skip
        return op.layer_norm(x, shape, rounded(op, w if g is None else g, half), rounded(op, b, half), eps)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, w = torch.randn(3, 4, 6).bfloat16(), torch.randn(6).bfloat16()
        yield {"x": x, "shape": [6], "g": None, "b": None, "w": w, "eps": 1e-5, "half": torch.bfloat16}
