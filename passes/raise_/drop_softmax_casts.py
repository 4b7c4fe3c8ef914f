"""Drop the casts around a softmax: the kernel accumulates in float32 and rounds once by itself.

softmax(x, dtype of x) = softmax(x)
half(softmax(float32(x))) = softmax(x)        x of the half type
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, dtype, require


class DropSoftmaxCasts(Rule):
    """Casts around a softmax → the kernel's own; see the module."""

    claim = ALGEBRAIC("the cast back to half precision is the kernel's own")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor, dim: Operand, half: Operand) -> Operand:
        single = torch.float32
        return op.cast(op.any_of(op.softmax(op.cast(x, single), dim), op.softmax(x, dim, single)), half)

    def where(self, m: Match) -> None:
        require(m.half in (torch.float16, torch.bfloat16), f"{m.half} is no half-precision type")
        require(dtype(m.x) == m.half, f"the softmax reads {dtype(m.x)} and returns {m.half}")

    def after(self, op: Ops, x: Tensor, dim: Operand, half: Operand) -> Operand:
        return op.softmax(x, dim)

    def samples(self) -> Iterator[dict[str, Any]]:
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        yield {"x": x.bfloat16(), "dim": -1, "half": torch.bfloat16}
