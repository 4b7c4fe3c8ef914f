"""Recognise an RMSNorm whose mean square alone is computed in float32, as T5 does.

    x / sqrt(mean(float32(x)^2) + eps) = rms_norm(float32(x), eps)
    x · half(1 / sqrt(mean(float32(x)^2) + eps)) = rms_norm(x, eps)             x of the half type

The first quotient is float32: a half-precision x is promoted when it meets the float32 root. DeepSeek V4 rounds the root first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, dtype, require

from .spellings import inverse_root, mean_square, root


class RaiseMixedRmsNorm(Rule):
    """RMSNorm with a float32 mean square → ``rms_norm``; see the module."""

    claim = ALGEBRAIC("the mean square is accumulated by the kernel in another order, and its root is rounded with the result")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"

    def before(self, op: Ops, x: Tensor, eps: Scalar, half: Operand) -> Operand:
        stabilised = op.add(mean_square(op, op.cast(x, torch.float32)), eps)
        inverse = inverse_root(op, stabilised)
        return op.any_of(op.div(x, root(op, stabilised)), op.mul(x, inverse), op.mul(x, op.cast(inverse, half)))

    def where(self, m: Match) -> None:
        require(m.eps > 0, f"eps is {m.eps}, not positive")
        require(m.half in (None, dtype(m.x)), f"the root is rounded to {m.half}, the norm's input is {dtype(m.x)}")

    def after(self, op: Ops, x: Tensor, eps: Scalar, half: Operand) -> Operand:
        return op.rms_norm(op.cast(x, torch.float32) if half is None else x, [op.width(x)], None, eps)

    def samples(self) -> Iterator[dict[str, Any]]:
        yield {"x": torch.randn(3, 4, 6, dtype=torch.float64).bfloat16(), "eps": 1e-5, "half": torch.bfloat16}
