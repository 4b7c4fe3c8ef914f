"""Let an RMSNorm keep its input and one number per row.

    rms_norm(x, g, eps) = lean_rms_norm(x, g, eps)[0]

On a CPU PyTorch has no kernel for it: it runs the steps, and the product by the gain keeps its other factor, another tensor of
the size of x. Without a gain, or elsewhere, nothing more is kept than by the lean op.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.metadata import value_of
from tautomer.rewrite.pass_base import Purpose
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, require


class LeanRmsNorm(Rule):
    """RMSNorm on a CPU → one that keeps its input and a number per row; see the module."""

    claim = ALGEBRAIC("the gradient takes another way through the same sums")
    purpose: ClassVar[Purpose] = "memory"

    def before(self, op: Ops, x: Tensor, shape: Operand, g: Operand, eps: Operand) -> Operand:
        return op.rms_norm(x, shape, g, eps)

    def where(self, m: Match) -> None:
        require(len(m.shape) == 1, f"it norms over {len(m.shape)} axes, the lean one over the last alone")
        require(m.g is not None, "without a gain it keeps no more than that")
        device = value_of(m.x).device.type
        require(device == "cpu", f"the kernel of {device} keeps no more than that")

    def after(self, op: Ops, x: Tensor, shape: Operand, g: Operand, eps: Operand) -> Operand:
        return op.getitem(op.lean_rms_norm(x, g, eps), 0)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, g = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        yield {"x": x, "shape": [5], "g": g, "eps": 1e-5}
        yield {"x": x, "shape": [5], "g": g, "eps": None}
