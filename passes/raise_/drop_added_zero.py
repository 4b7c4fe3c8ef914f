"""Drop the zero that a sum starts from, or adds where a part is missing.

x + 0 = x
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Operand, Ops, Rule, Tensor


class DropAddedZero(Rule):
    """x + 0 → x; see the module."""

    claim = ALGEBRAIC("none, but -0.0 + 0 is 0.0")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor) -> Operand:
        return op.add(x, 0)

    def after(self, op: Ops, x: Tensor) -> Operand:
        return x

    def samples(self) -> Iterator[dict[str, Any]]:
        yield {"x": torch.randn(3, 4, dtype=torch.float64)}
