"""Gather what is added to the scores of an attention, one part after the other, into one bias.

(s + a) + b = s + (a + b)        s = q kᵀ, scaled or not
(s + a) - b = s + (a - b)
softmax(s - b) = softmax(s + (-b)),    softmax(baddbmm(a, q, kᵀ)) = softmax(q kᵀ + a)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor

from .spellings import require_bias

aten = torch.ops.aten


class GatherBiases(Rule):
    """Several summands of scores → one; see the module."""

    claim = ALGEBRAIC("the summands are added up before they meet the scores")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, q: Tensor, K: Tensor, c: Operand, d: Operand, a: Tensor, b: Tensor, less: Tensor, z: Tensor,
               beta: Scalar, alpha: Scalar) -> Operand:  # fmt: skip
        product = op.matmul(q, K)
        scores = op.any_of(op.mul(product, c), op.div(product, d), product)
        sums = op.add(op.add(scores, a), b), op.sub(op.add(scores, a), less)
        written = op.any_of(op.sub(scores, less), op(aten.baddbmm.default)(z, q, K, beta=beta, alpha=alpha))
        return op.any_of(*sums, op.softmax(written, -1))

    def where(self, m: Match) -> None:
        for bias in (m.a, m.b, m.less):
            require_bias(bias, m.q, m.K)

    def after(self, op: Ops, q: Tensor, K: Tensor, c: Operand, d: Operand, a: Tensor, b: Tensor, less: Tensor, z: Tensor,
              beta: Scalar, alpha: Scalar) -> Operand:  # fmt: skip
        scores = op.matmul(q, K)
        if c is not None:
            scores = op.mul(scores, c)
        elif d is not None:
            scores = op.div(scores, d)
        if a is not None:
            return op.add(scores, op.add(a, b) if less is None else op.sub(a, less))
        if z is None:
            return op.softmax(op.add(scores, op.neg(less)), -1)
        scores, bias = (x if one == 1 else op.mul(x, one) for x, one in ((scores, alpha), (z, beta)))
        return op.softmax(op.add(scores, bias), -1)

    def samples(self) -> Iterator[dict[str, Any]]:
        q, K, a, b, z = (torch.randn(3, *n, dtype=torch.float64) for n in ((4, 6), (6, 5), (4, 5), (1, 5), (1, 5)))
        scale = {"c": 0.25, "d": torch.rand(3, 1, 1).double() + 0.5, "beta": 1, "alpha": 1}
        yield {"q": q, "K": K, "a": a, "b": b, "less": b, "z": z, **scale}
        yield {"q": q, "K": K, "a": a, "b": b, "less": a, "z": z[0], **scale, "beta": 0.5, "alpha": 2}
