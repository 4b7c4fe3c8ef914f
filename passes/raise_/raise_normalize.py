"""Recognise a vector brought to length one: the queries and keys of QKNorm, and of cosine attention.

    x / max(|x|, eps) = normalize(x, eps)

over the last axis, as ``F.normalize`` or by hand; without a floor, eps is 0. An epsilon that is added makes another function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, require, width

from .spellings import length


class RaiseNormalize(Rule):
    """x over its length → ``normalize``; see the module."""

    paper = "arXiv:2010.04245"
    claim = ALGEBRAIC("the squares may be summed in another order")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"

    def before(self, op: Ops, x: Tensor, eps: Scalar) -> Operand:
        norm = length(op, x)
        floored = op.any_of(op.clamp_min(norm, eps), op.clamp(norm, eps), norm)
        return op.any_of(op.div(x, floored), op.div(x, op(torch.ops.aten.expand_as.default)(floored, x)))

    def where(self, m: Match) -> None:
        require(m.eps is None or m.eps >= 0, f"eps is {m.eps}, negative")
        require(width(m.x) is not None, "the size of the last axis depends on the input")

    def after(self, op: Ops, x: Tensor, eps: Scalar) -> Operand:
        return op.normalize(x, 0.0 if eps is None else eps)

    def samples(self) -> Iterator[dict[str, Any]]:
        yield {"x": torch.randn(3, 4, 6, dtype=torch.float64), "eps": 1e-12}
        yield {"x": torch.randn(3, 4, 6, dtype=torch.float64), "eps": 2.5}
