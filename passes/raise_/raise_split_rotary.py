"""Recognise a rotary embedding that turns each half by itself and joins them, as in GPT-OSS.

[a cos - b sin, b cos + a sin] = rotary([a, b], [cos, cos], [sin, sin])            cos and sin half as wide as [a, b]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, require, width

from .spellings import halves

END = 2**63 - 1


class RaiseSplitRotary(Rule):
    """Hand-written rotary embedding of two halves, joined → ``rotary``; see the module."""

    claim = ALGEBRAIC("none forward; the gradients of cos and sin are summed in another order")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"  # each half is read twice, and costs nothing

    def before(self, op: Ops, x: Tensor, cos: Tensor, sin: Tensor, m: Scalar, end: Scalar) -> Operand:
        def turned(a: Operand, b: Operand) -> Operand:
            first, second = op.sub(op.mul(a, cos), op.mul(b, sin)), op.add(op.mul(b, cos), op.mul(a, sin))
            return op.cat([first, second], -1)

        return op.any_of(*(turned(a, b) for a, b in halves(op, x, m, end)))

    def where(self, m: Match) -> None:
        d = width(m.x)
        require(d is not None and d % 2 == 0, "the width of the rotated tensor depends on the input or is odd")
        assert d is not None
        require(m.m is None or 2 * m.m == d, f"the first part has {m.m} of {d} channels, not half of them")
        require(m.end is None or m.end >= d, f"a slice ends at channel {m.end} of {d}")
        wide = f"cos and sin are {width(m.cos)} and {width(m.sin)} wide, what they rotate 2 x {d // 2}"
        require(width(m.cos) == width(m.sin) == d // 2, wide)

    def after(self, op: Ops, x: Tensor, cos: Tensor, sin: Tensor, m: Scalar, end: Scalar) -> Operand:
        return op.rotary(x, op.cat([cos, cos], -1), op.cat([sin, sin], -1))

    def samples(self) -> Iterator[dict[str, Any]]:
        x, cos, sin = (torch.randn(*n, dtype=torch.float64) for n in ((2, 3, 4, 6), (4, 3), (4, 3)))
        yield {"x": x, "cos": cos, "sin": sin, "m": 3, "end": END}
        yield {"x": x, "cos": cos[:, None][:3], "sin": sin[0], "m": 3, "end": 6}
