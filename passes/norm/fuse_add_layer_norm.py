"""Fuse a residual sum and the LayerNorm that reads it into one op that returns both.

    layer_norm(x + r, g, b, eps), x + r = add_layer_norm(x, r, g, b, eps)

For targets that have one kernel for the two; elsewhere the op is what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Phase, Purpose
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor

from .fuse_add_rms_norm import require_residual


class FuseAddLayerNorm(Rule):
    """Sum and LayerNorm → ``add_layer_norm``; see the module."""

    claim = BITWISE("none: a fused kernel may keep the sum in higher precision")
    phase: ClassVar[Phase] = "choose"
    purpose: ClassVar[Purpose] = "speed"
    interior = "shared"

    def before(self, op: Ops, x: Tensor, r: Tensor, n: Operand, g: Operand, b: Operand, eps: Operand) -> tuple[Operand, Operand]:
        total = op.add(x, r)
        return op.layer_norm(total, n, g, b, eps), total

    def where(self, m: Match) -> None:
        require_residual(m)

    def after(self, op: Ops, x: Tensor, r: Tensor, n: Operand, g: Operand, b: Operand, eps: Operand) -> tuple[Operand, Operand]:
        pair = op.add_layer_norm(x, r, n, g, b, eps)
        return op.getitem(pair, 0), op.getitem(pair, 1)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, r = torch.randn(2, 3, 6, dtype=torch.float64)
        g, b = torch.randn(2, 6, dtype=torch.float64)
        yield {"x": x, "r": r, "n": [6], "g": g, "b": b, "eps": 1e-5}
        yield {"x": x, "r": r, "n": [6], "g": None, "b": None, "eps": 1e-3}
