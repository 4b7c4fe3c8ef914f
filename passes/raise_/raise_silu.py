"""Recognise a SiLU written by hand.

    x sigmoid(x) = x / (1 + exp(-x)) = silu(x)

x sigmoid(1.702 x), the quick GELU, has no op of its own and stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Operand, Ops, Rule, Tensor


class RaiseSilu(Rule):
    """x sigmoid(x) → ``silu``; see the module."""

    claim = ALGEBRAIC("the kernel divides by 1 + exp(-x) instead of multiplying by its inverse")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor) -> Operand:
        denominator = op.add(op.exp(op.neg(x)), 1)
        inverse = op.reciprocal(denominator)
        sigmoid = op.any_of(op.sigmoid(x), inverse, op.mul(inverse, 1))
        return op.any_of(op.mul(x, sigmoid), op.div(x, denominator))

    def after(self, op: Ops, x: Tensor) -> Operand:
        return op.silu(x)

    def samples(self) -> Iterator[dict[str, Any]]:
        yield {"x": torch.randn(3, 4, 6, dtype=torch.float64)}
