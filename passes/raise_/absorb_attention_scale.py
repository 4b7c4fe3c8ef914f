"""Take a scale of the queries or keys into the attention that reads them.

    attention(c q, k, v, scale=s) = attention(q, k, v, scale=c s)

Without a scale, s is one over the root of the head's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, require


class AbsorbAttentionScale(Rule):
    """A product before an attention → its scale; see the module."""

    claim = ALGEBRAIC("the scores are scaled after they are summed, not before")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, q: Tensor, k: Tensor, v: Tensor, c: Scalar, d: Scalar, mask: Operand, p: Operand,
               causal: Operand, s: Operand, shared: Operand) -> Operand:  # fmt: skip
        def attention(q: Operand, k: Operand) -> Operand:
            return op.scaled_dot_product_attention(q, k, v, mask, p, causal, scale=s, enable_gqa=shared)

        return op.any_of(
            attention(op.mul(q, c), k), attention(op.div(q, d), k), attention(q, op.mul(k, c)), attention(q, op.div(k, d))
        )

    def where(self, m: Match) -> None:
        factor = m.d if m.c is None else m.c
        require(factor > 0, f"the scale is {factor}, not positive")

    def after(self, op: Ops, q: Tensor, k: Tensor, v: Tensor, c: Scalar, d: Scalar, mask: Operand, p: Operand,
              causal: Operand, s: Operand, shared: Operand) -> Operand:  # fmt: skip
        return op.scaled_dot_product_attention(q, k, v, mask, p, causal, scale=_scale(op, q, c, d, s), enable_gqa=shared)

    def samples(self) -> Iterator[dict[str, Any]]:
        q, k, v = (torch.randn(2, 3, n, 6, dtype=torch.float64) for n in (4, 5, 5))
        plain = {"q": q, "k": k, "v": v, "mask": None, "p": 0.0, "causal": False, "shared": False}
        yield {**plain, "c": 0.25, "d": 4.0, "s": 0.5}
        yield {**plain, "c": 3, "d": 2, "s": None}


def _scale(op: Ops, q: Operand, c: Any, d: Any, s: Any) -> Any:
    if isinstance(s, str):
        return f"{c} {s}"
    s = op.width(q) ** -0.5 if s is None else s
    return s / d if c is None else s * c
