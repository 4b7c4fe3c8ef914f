"""Recognise a LayerNorm written by hand.

    (x - mean(x)) / sqrt(var(x) + eps) * g = layer_norm(x, g, eps)

The variance is the population's, however it is spelled; eps stands under the root; the axis is the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Scalar, Tensor, dtype, is_vector, require, width

from .spellings import inverse_root, mean_square, root


class RaiseLayerNorm(Rule):
    """Hand-written LayerNorm → ``layer_norm``; see the module."""

    claim = ALGEBRAIC("mean and variance are accumulated by the kernel in another order")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"  # what stays alive for another reader (the mean, x - mean) is cheap

    def before(self, op: Ops, x: Tensor, g: OptionalWeight, eps: Scalar) -> Operand:
        mean = op.mean(x, [-1], True)
        centred = op.sub(x, mean)
        variance = op.any_of(
            op.var_unbiased(x, [-1], False, True),
            op.var(x, [-1], correction=0, keepdim=True),
            mean_square(op, centred),
            op.sub(mean_square(op, x), op.pow(mean, 2)),
        )
        stabilised = op.add(variance, eps)
        scaled = op.any_of(centred, op.mul(centred, g))
        inverse = inverse_root(op, stabilised)
        return op.any_of(op.div(scaled, root(op, stabilised)), op.mul(scaled, inverse), op.mul(centred, op.mul(inverse, g)))

    def where(self, m: Match) -> None:
        require(m.eps > 0, f"eps is {m.eps}, not positive")
        require(m.g is None or is_vector(m.g, width(m.x)), "the gain is not a vector over the last axis")
        require(m.g is None or dtype(m.g) == dtype(m.x), "the gain has another dtype than the norm's input")

    def after(self, op: Ops, x: Tensor, g: OptionalWeight, eps: Scalar) -> Operand:
        return op.layer_norm(x, [op.width(x)], op.weight(g), None, eps)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, g = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        yield {"x": x, "g": g, "eps": 1e-5}
        yield {"x": 0.01 * x + 0.2, "g": g, "eps": 1e-3}
