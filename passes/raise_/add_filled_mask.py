"""Add a mask to the scores of an attention instead of filling it in.

    softmax(where(keep, s, low)) v = softmax(s + where(keep, 0, low)) v

``low`` is -inf, or so low that a score drowns in it: then a row that is masked everywhere has uniform weights either way.
A boolean mask would not do, attention gives such a row zeros. Its gradient is another, which is all that
``add_mask_of_sizes`` does better.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import FORWARD
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, dtype, require

from .spellings import ZEROS, additive_mask

aten = torch.ops.aten


LOW = -1e30
"""One rounding of this, even in float64, is far more than any score."""


class AddFilledMask(Rule):
    """A filled mask → a mask that is added; see the module."""

    claim = FORWARD("none: a score drowns in the number that masks it; a row that is masked everywhere gets a gradient")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, s: Tensor, keep: Tensor, drop: Tensor, low: Scalar, b: Operand, v: Tensor) -> Operand:
        filled = op.any_of(op(aten.where.ScalarOther)(keep, s, low), op.masked_fill(s, drop, low))
        return op.matmul(op.softmax(op.any_of(filled, op.add(filled, b)), -1), v)

    def where(self, m: Match) -> None:
        require(m.low <= LOW, f"masked scores are {m.low}: a row that is masked everywhere would change")
        require(m.s.target not in ZEROS, "the mask is added to the scores already")
        require(dtype(m.keep if m.keep is not None else m.drop) == torch.bool, "the mask is not boolean")

    def after(self, op: Ops, s: Tensor, keep: Tensor, drop: Tensor, low: Scalar, b: Operand, v: Tensor) -> Operand:
        keeps = keep is not None
        mask = additive_mask(op, keep if keeps else drop, dtype(s), low, keeps=keeps)
        masked = op.add(s, mask)
        return op.matmul(op.softmax(masked if b is None else op.add(masked, b), -1), v)

    def samples(self) -> Iterator[dict[str, Any]]:
        s, v, b = (torch.randn(2, 3, *n, dtype=torch.float64) for n in ((4, 5), (5, 6), (4, 5)))
        keep = torch.ones(4, 5).tril() > 0
        yield {"s": s, "keep": keep, "drop": ~keep, "low": -3.4028234663852886e38, "b": b, "v": v}
        yield {"s": s, "keep": keep, "drop": ~keep, "low": -float("inf"), "b": b, "v": v}
