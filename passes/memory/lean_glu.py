"""Let a gated linear unit keep its gate and what it gates, not the activation of the gate as well.

    glu(u, v, by) = lean_glu(u, v, by)

The product keeps by(u) for the gradient of v; the activation keeps u (sigmoid and relu their result). by(u) is a pass over u.

Liger-Kernel, arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Purpose
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, require, shape
from tautomer.rewrite.shapes import same_shape

SMALLER = ("silu", "gelu", "gelu_tanh", "quick_gelu")


class LeanGlu(Rule):
    """Gated linear unit → one that keeps its two operands; see the module."""

    claim = ALGEBRAIC("none in the forward; a product of the gradient may be rounded in another order")
    paper: ClassVar[str] = "arXiv:2410.10989"
    purpose: ClassVar[Purpose] = "memory"

    def before(self, op: Ops, gate: Tensor, up: Tensor, by: Operand) -> Operand:
        return op.glu(gate, up, by)

    def where(self, m: Match) -> None:
        require(m.by in SMALLER, f"{m.by} keeps its result, which the product shares: nothing would be freed")
        require(same_shape(shape(m.gate), shape(m.up)), "one factor is stretched along the other")

    def after(self, op: Ops, gate: Tensor, up: Tensor, by: Operand) -> Operand:
        return op.lean_glu(gate, up, by)

    def samples(self) -> Iterator[dict[str, Any]]:
        gate, up = torch.randn(2, 3, 5, dtype=torch.float64)
        for by in SMALLER:
            yield {"gate": gate, "up": up, "by": by}
