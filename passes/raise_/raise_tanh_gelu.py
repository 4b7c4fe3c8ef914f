"""Recognise the tanh form of GELU written by hand.

    x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = gelu(x, approximate="tanh")

in any order of the products, x^3 as a power or as products, x factored out or not. sqrt(2/pi) is a literal of the user's
code; one written with fewer digits is another function: 0.79788456, as in BLOOM, is off by 1e-9, a thousand times what
equality in float64 admits. It is refused here; ``raise_rounded_gelu`` takes it, and must be asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import pi, sqrt
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.evidence import FORWARD
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor

from .spellings import half_gated, require_constant

CUBIC = 0.044715


class RaiseTanhGelu(Rule):
    """GELU by tanh → ``gelu(approximate="tanh")``; see the module."""

    claim = ALGEBRAIC("the kernel multiplies in another order")
    phase: ClassVar[Phase] = "raise"
    tolerance: ClassVar[float] = FORWARD

    def before(self, op: Ops, x: Tensor, c: Scalar) -> Operand:
        cubic = op.any_of(
            op.mul(op.any_of(op.pow(x, 3), op.mul(op.mul(x, x), x)), CUBIC),
            op.mul(op.mul(op.mul(x, CUBIC), x), x),
        )
        quadratic = op.any_of(op.mul(op.any_of(op.pow(x, 2), op.mul(x, x), op.square(x)), CUBIC), op.mul(op.mul(x, CUBIC), x))
        factored = op.add(quadratic, 1)
        inner = op.any_of(op.mul(op.any_of(op.add(x, cubic), op.mul(x, factored)), c), op.mul(op.mul(x, c), factored))
        return half_gated(op, x, op.tanh(inner))

    def where(self, m: Match) -> None:
        require_constant(m.c, sqrt(2 / pi), "sqrt(2/pi)", self.tolerance)

    def after(self, op: Ops, x: Tensor, c: Scalar) -> Operand:
        return op.gelu(x, approximate="tanh")

    def samples(self) -> Iterator[dict[str, Any]]:
        yield {"x": torch.randn(3, 4, 6, dtype=torch.float64), "c": sqrt(2 / pi)}
