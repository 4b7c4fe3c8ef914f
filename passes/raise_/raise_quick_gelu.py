"""Recognise the quick GELU, of CLIP and others.

    x sigmoid(1.702 x) = x / (1 + exp(-1.702 x)) = silu(1.702 x) / 1.702 = quick_gelu(x)

Any other factor makes another function and stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Operand, Ops, Rule, Tensor

ALPHA = 1.702


class RaiseQuickGelu(Rule):
    """x sigmoid(1.702 x) → ``quick_gelu``; see the module."""

    claim = ALGEBRAIC("the sigmoid is one kernel, and x is multiplied last")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor) -> Operand:
        scaled = op.mul(x, ALPHA)
        power = op.any_of(op.neg(scaled), op.mul(op.neg(x), ALPHA), op.mul(x, -ALPHA))
        denominator = op.add(op.exp(power), 1)
        inverse = op.reciprocal(denominator)
        gate = op.any_of(op.sigmoid(scaled), inverse, op.mul(inverse, 1))
        return op.any_of(op.mul(x, gate), op.div(x, denominator), op.div(op.silu(scaled), ALPHA))

    def after(self, op: Ops, x: Tensor) -> Operand:
        return op.quick_gelu(x)

    def samples(self) -> Iterator[dict[str, Any]]:
        yield {"x": torch.randn(3, 4, 6, dtype=torch.float64)}
