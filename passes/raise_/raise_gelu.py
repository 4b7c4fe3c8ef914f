"""Recognise a GELU written by hand with the error function.

    x/2 (1 + erf(x / sqrt(2))) = gelu(x)

in any order of the products. The root is a literal of the user's code; one written with fewer digits is another function
and is refused (see ``raise_rounded_gelu``).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor

from .spellings import half_gated, require_constant


class RaiseGelu(Rule):
    """GELU by erf → ``gelu``; see the module."""

    claim = ALGEBRAIC("the kernel multiplies in another order")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor, divisor: Scalar, factor: Scalar) -> Operand:
        return half_gated(op, x, op.erf(op.any_of(op.div(x, divisor), op.mul(x, factor))))

    def where(self, m: Match) -> None:
        require_constant(m.divisor, sqrt(2), "sqrt(2)")
        require_constant(m.factor, sqrt(0.5), "1/sqrt(2)")

    def after(self, op: Ops, x: Tensor, divisor: Scalar, factor: Scalar) -> Operand:
        return op.gelu(x)

    def samples(self) -> Iterator[dict[str, Any]]:
        yield {"x": torch.randn(3, 4, 6, dtype=torch.float64), "divisor": sqrt(2), "factor": sqrt(0.5)}
