"""Recognise a rotary embedding whose neighbouring channels pair, as in GPT-J and Cohere.

    x cos + y sin = rotary(x, cos, sin, interleaved)            y = -x1, x0, -x3, x2, …

y is stacked from strided slices or from pairs, and flattened. Ernie casts y where it casts x; that is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, rank, require, shape, width
from tautomer.rewrite.shapes import same_shape

from .spellings import alternating

aten = torch.ops.aten
END = 2**63 - 1


class RaiseInterleavedRotary(Rule):
    """Hand-written rotary embedding over neighbours → ``rotary``; see the module."""

    claim = BITWISE("none: the same products and the same sum")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"

    def before(self, op: Ops, x: Tensor, cos: Tensor, sin: Tensor, kind: Operand, end: Scalar, paired: Operand,
               pairs: Operand, whole: Operand) -> Operand:  # fmt: skip
        def across(even: Operand, odd: Operand) -> Operand:
            stacked = op.stack([op.neg(odd), even], -1)
            return op.any_of(op.flatten(stacked, -2, -1), op.reshape(stacked, whole))

        y = op.any_of(*(across(even, odd) for even, odd in alternating(op, x, paired, pairs, end)))
        terms = (x, y), (op.cast(x, kind), op.cast(y, kind))
        return op.any_of(*(op.add(op.mul(a, cos), op.mul(b, sin)) for a, b in terms))

    def where(self, m: Match) -> None:
        d, sizes = width(m.x), shape(m.x)
        require(d is not None and d % 2 == 0, "the width of the rotated tensor depends on the input or is odd")
        assert d is not None
        require(width(m.cos) == width(m.sin) == d, f"cos and sin are {width(m.cos)} and {width(m.sin)} wide, x {d}")
        require(m.end is None or m.end >= d, f"a slice ends at channel {m.end} of {d}")
        for node in m.nodes:
            if node.target in (aten.reshape.default, aten.unflatten.int):
                wanted = sizes if rank(node) == len(sizes) else (*sizes[:-1], d // 2, 2)
                require(same_shape(shape(node), wanted), "a view moves more than the pairs")

    def after(self, op: Ops, x: Tensor, cos: Tensor, sin: Tensor, kind: Operand, end: Scalar, paired: Operand,
              pairs: Operand, whole: Operand) -> Operand:  # fmt: skip
        return op.rotary(x if kind is None else op.cast(x, kind), cos, sin, True)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, cos, sin = (torch.randn(*n, 6, dtype=torch.float64) for n in ((2, 3), (3,), (3,)))
        views = {"paired": [2, 3, 3, 2], "pairs": [3, 2], "whole": [2, 3, 6]}
        yield {"x": x, "cos": cos, "sin": sin, "kind": torch.float64, "end": END, **views}
        yield {"x": x.float(), "cos": cos[:1], "sin": sin[0], "kind": torch.float64, "end": 6, **views}
