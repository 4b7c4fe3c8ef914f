"""Let quick GELU keep its input alone, not the sigmoid as well.

quick_gelu(u) = lean_activation(u, "quick_gelu")
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Purpose
from tautomer.rewrite.rules import Operand, Ops, Rule, Tensor


class LeanQuickGelu(Rule):
    """Quick GELU → one that keeps its input alone; see the module."""

    claim = ALGEBRAIC("none in the forward; the gradient is rounded in another order")
    purpose: ClassVar[Purpose] = "memory"

    def before(self, op: Ops, u: Tensor) -> Operand:
        return op.quick_gelu(u)

    def after(self, op: Ops, u: Tensor) -> Operand:
        return op.lean_activation(u, "quick_gelu")

    def samples(self) -> Iterator[dict[str, Any]]:
        yield {"u": torch.randn(3, 5, dtype=torch.float64)}
