"""Fuse a residual sum and the RMSNorm that reads it into one op that returns both.

    rms_norm(x + r, g, eps), x + r = add_rms_norm(x, r, g, eps)

For targets that have one kernel for the two; elsewhere the op is what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Phase, Purpose
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, dtype, require, shape
from tautomer.rewrite.shapes import same_shape


class FuseAddRmsNorm(Rule):
    """Sum and RMSNorm → ``add_rms_norm``; see the module."""

    claim = BITWISE("none: a fused kernel may keep the sum in higher precision")
    phase: ClassVar[Phase] = "choose"
    purpose: ClassVar[Purpose] = "speed"
    interior = "shared"

    def before(self, op: Ops, x: Tensor, r: Tensor, n: Operand, g: Operand, eps: Operand) -> tuple[Operand, Operand]:
        total = op.add(x, r)
        return op.rms_norm(total, n, g, eps), total

    def where(self, m: Match) -> None:
        require_residual(m)

    def after(self, op: Ops, x: Tensor, r: Tensor, n: Operand, g: Operand, eps: Operand) -> tuple[Operand, Operand]:
        pair = op.add_rms_norm(x, r, n, g, eps)
        return op.getitem(pair, 0), op.getitem(pair, 1)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, r, g = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64), torch.randn(6).double()
        yield {"x": x, "r": r, "n": [6], "g": g, "eps": 1e-5}
        yield {"x": x, "r": r, "n": [6], "g": None, "eps": None}


def require_residual(m: Match) -> None:
    """Refuse a sum that broadcasts, converts or adds a weight: no fused kernel takes those."""
    require(same_shape(shape(m.x), shape(m.r)), "the sum broadcasts one of its operands")
    require(dtype(m.x) == dtype(m.r), f"the sum is of {dtype(m.x)} and {dtype(m.r)}")
