"""Recognise an RMSNorm written by hand.

    x / sqrt(mean(x^2) + eps) * g = rms_norm(x, g, eps)

eps stands under the root; the axis is the last one. Casts around it (Llama computes in float32) are no part of the norm
and stay; ``drop_norm_casts`` removes them where that changes no rounding but the kernel's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Scalar, Tensor, dtype, is_vector, require, width

from .spellings import inverse_root, mean_square, root


class RaiseRmsNorm(Rule):
    """Hand-written RMSNorm → ``rms_norm``; see the module."""

    claim = ALGEBRAIC("the mean square is accumulated by the kernel in another order")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"

    def before(self, op: Ops, x: Tensor, g: OptionalWeight, eps: Scalar) -> Operand:
        stabilised = op.add(mean_square(op, x), eps)
        scaled = op.any_of(x, op.mul(x, g))
        inverse = inverse_root(op, stabilised)
        return op.any_of(op.div(scaled, root(op, stabilised)), op.mul(scaled, inverse), op.mul(x, op.mul(inverse, g)))

    def where(self, m: Match) -> None:
        require(m.eps > 0, f"eps is {m.eps}, not positive")
        require(m.g is None or is_vector(m.g, width(m.x)), "the gain is not a vector over the last axis")
        require(m.g is None or dtype(m.g) == dtype(m.x), "the gain has another dtype than the norm's input")

    def after(self, op: Ops, x: Tensor, g: OptionalWeight, eps: Scalar) -> Operand:
        return op.rms_norm(x, [op.width(x)], op.weight(g), eps)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, g = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        yield {"x": x, "g": g, "eps": 1e-5}
        yield {"x": 0.01 * x + 0.2, "g": g, "eps": 1e-3}
