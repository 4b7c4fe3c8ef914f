"""Recognise an RMSNorm without an epsilon.

    x / sqrt(mean(x^2)) = x / (|x| / sqrt(d)) = rms_norm(x, eps=0)

An epsilon that is added to the root, as in the first code of the paper (arXiv:1910.07467), makes x / (rms + eps), which is
another function than the norm with eps under the root: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, require, width

from .spellings import inverse_root, length, mean_square, require_constant, root


class RaiseBareRmsNorm(Rule):
    """x over its root mean square → ``rms_norm``; see the module."""

    claim = ALGEBRAIC("the mean square is accumulated by the kernel in another order")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"

    def before(self, op: Ops, x: Tensor, divisor: Scalar, factor: Scalar, outside: Scalar) -> Operand:
        squares, norm = mean_square(op, x), length(op, x)
        rms = op.any_of(root(op, squares), op.div(norm, divisor), op.mul(norm, factor))
        return op.any_of(op.div(x, rms), op.div(x, op.add(rms, outside)), op.mul(x, inverse_root(op, squares)))

    def where(self, m: Match) -> None:
        d = width(m.x)
        require(d is not None, "the size of the last axis depends on the input")
        assert d is not None
        require_constant(m.divisor, sqrt(d), f"sqrt({d})")
        require_constant(m.factor, 1 / sqrt(d), f"1/sqrt({d})")
        outside = m.outside or 0
        require(outside == 0, f"{outside} is added to the root, not under it: x / (rms + eps) is no rms_norm")

    def after(self, op: Ops, x: Tensor, divisor: Scalar, factor: Scalar, outside: Scalar) -> Operand:
        return op.rms_norm(x, [op.width(x)], None, 0.0)

    def samples(self) -> Iterator[dict[str, Any]]:
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        yield {"x": x, "divisor": sqrt(6), "factor": 6**-0.5, "outside": 0}
