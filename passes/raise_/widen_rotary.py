"""Let a rotary embedding of the first channels take the whole tensor, and pass the others.

[rotary(a, cos, sin), b] = rotary([a, b], cos, sin)            as in GPT-NeoX, GPT-J and Phi
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, dtype, require, width

END = 2**63 - 1


class WidenRotary(Rule):
    """A rotary embedding of a slice beside the rest → of the whole; see the module."""

    claim = BITWISE("none: the op cuts and joins as the model does")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"

    def before(self, op: Ops, x: Tensor, cos: Tensor, sin: Tensor, interleaved: Operand, r: Scalar, end: Scalar,
               rest: Scalar) -> Operand:  # fmt: skip
        parts = op.split_sizes(x, [r, rest], -1)
        cuts = ((op.slice(x, -1, 0, r), op.slice(x, -1, r, end)), (op.getitem(parts, 0), op.getitem(parts, 1)))
        return op.any_of(*(op.cat([op.rotary(a, cos, sin, interleaved), b], -1) for a, b in cuts))

    def where(self, m: Match) -> None:
        require(width(m.x) is not None, "the width of the tensor depends on the input")
        require(m.end is None or m.end >= width(m.x), f"a slice ends at channel {m.end} of {width(m.x)}")
        require(width(m.cos) == m.r, f"{m.r} channels are cut off, {width(m.cos)} turned")
        require(dtype(m.root) == dtype(m.x), f"the rotated channels are {dtype(m.root)}, the others {dtype(m.x)}")

    def after(self, op: Ops, x: Tensor, cos: Tensor, sin: Tensor, interleaved: Operand, r: Scalar, end: Scalar,
              rest: Scalar) -> Operand:  # fmt: skip
        return op.rotary(x, cos, sin, interleaved)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, cos, sin = (torch.randn(*n, dtype=torch.float64) for n in ((2, 3, 10), (3, 6), (3, 6)))
        yield {"x": x, "cos": cos, "sin": sin, "interleaved": True, "r": 6, "end": END, "rest": 4}
        yield {"x": x, "cos": cos, "sin": sin, "interleaved": False, "r": 6, "end": 10, "rest": 4}
