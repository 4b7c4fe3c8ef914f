"""Scale the input of an RMSNorm row by row, so that a target that sums in half precision neither overflows nor underflows.

    z = x / s        RMSNorm(x; eps) = z / sqrt(mean(z²) + (√eps / s)²)        for any s > 0

As for a LayerNorm (``prescale_layer_norm``), without the mean.

arXiv:2312.10359.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Tensor

from .prescale_layer_norm import Prescaled, largest, power_of_two, require_last_axis, root_of

aten = torch.ops.aten


class PrescaleRmsNorm(Prescaled):
    """RMSNorm → an RMSNorm that survives float16 sums; see the module."""

    def before(self, op: Ops, x: Tensor, n: Operand, g: OptionalWeight, eps: Operand) -> Operand:
        return op.rms_norm(x, n, g, eps)

    def where(self, m: Match) -> None:
        require_last_axis(m)

    def after(self, op: Ops, x: Tensor, n: Operand, g: OptionalWeight, eps: Operand) -> Operand:
        unit = power_of_two(op, op(aten.clamp_min.default)(largest(op, x), root_of(eps)))
        root = op.mul(op.reciprocal(unit), root_of(eps))
        return self.affine(op, self.normalized(op, op.div(x, unit), op.width(x), root), g, None)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, g = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        yield {"x": x, "n": [6], "g": g, "eps": 1e-5}
        yield {"x": 1e-3 * x, "n": [6], "g": None, "eps": 1e-3}
