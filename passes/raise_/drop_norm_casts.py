"""Drop the casts around an RMSNorm: the kernel accumulates in float32 and rounds once by itself.

    half(rms_norm(float32(x), eps)) = rms_norm(x, eps)        x of the half type

A float32 gain inside the casts stays where it is: only a norm without one is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, dtype, require


class DropNormCasts(Rule):
    """Casts around an RMSNorm → the kernel's own; see the module."""

    claim = ALGEBRAIC("the cast back to half precision is the kernel's own")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor, shape: Operand, eps: Scalar, half: Operand) -> Operand:
        return op.cast(op.rms_norm(op.cast(x, torch.float32), shape, None, eps), half)

    def where(self, m: Match) -> None:
        require(m.half in (torch.float16, torch.bfloat16), f"{m.half} is no half-precision type")
        require(dtype(m.x) == m.half, f"the norm reads {dtype(m.x)} and returns {m.half}")

    def after(self, op: Ops, x: Tensor, shape: Operand, eps: Scalar, half: Operand) -> Operand:
        return op.rms_norm(x, shape, None, eps)

    def samples(self) -> Iterator[dict[str, Any]]:
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        yield {"x": x.bfloat16(), "shape": [6], "eps": 1e-5, "half": torch.bfloat16}
