"""Recognise a rotary embedding whose channels pair by halves, as in Llama and GPT-NeoX.

    x cos + [-b, a] sin = rotary(x, cos, sin)            x = [a, b]

The halves may be slices, a split or a chunk, and cos and sin have any leading axes that broadcast. [b, -a] turns the other way. A
rotation of complex numbers (``view_as_complex``) stays as it is: it is one op already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, require, width

from .spellings import halves

END = 2**63 - 1


class RaiseRotary(Rule):
    """Hand-written rotary embedding over halves → ``rotary``; see the module."""

    claim = ALGEBRAIC("none but, turned backwards, the sign of sin")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"  # a split is read twice, and its parts cost nothing

    def before(self, op: Ops, x: Tensor, cos: Tensor, sin: Tensor, minus: Tensor, m: Scalar, end: Scalar) -> Operand:
        def turned(a: Operand, b: Operand) -> Operand:
            forward, backward = op.mul(op.cat([op.neg(b), a], -1), sin), op.mul(op.cat([b, op.neg(a)], -1), minus)
            return op.add(op.mul(x, cos), op.any_of(forward, backward))

        return op.any_of(*(turned(a, b) for a, b in halves(op, x, m, end)))

    def where(self, m: Match) -> None:
        require_rotary(m, m.minus if m.sin is None else m.sin)

    def after(self, op: Ops, x: Tensor, cos: Tensor, sin: Tensor, minus: Tensor, m: Scalar, end: Scalar) -> Operand:
        return op.rotary(x, cos, op.neg(minus) if sin is None else sin)

    def misses(self, program: Program) -> Iterator[tuple[fx.Node, str]]:
        for pairs in program.graph.find_nodes(op="call_function", target=torch.ops.aten.view_as_complex.default):
            if any(user.target is torch.ops.aten.mul.Tensor for user in pairs.users):
                yield pairs, "a rotation of complex numbers is one product already, and stays as it is"

    def samples(self) -> Iterator[dict[str, Any]]:
        x, cos, sin = (torch.randn(*n, 6, dtype=torch.float64) for n in ((2, 3, 4), (4,), (4,)))
        yield {"x": x, "cos": cos, "sin": sin, "minus": sin, "m": 3, "end": END}
        yield {"x": x, "cos": cos[:, None][:3], "sin": sin[0], "minus": sin[0], "m": 3, "end": 6}


def require_rotary(m: Match, sin: Any) -> None:
    """Refuse what does not turn the whole last axis of x in two halves."""
    d = width(m.x)
    require(d is not None and d % 2 == 0, "the width of the rotated tensor depends on the input or is odd")
    assert d is not None
    require(width(m.cos) == width(sin) == d, f"cos and sin are {width(m.cos)} and {width(sin)} wide, what they rotate {d}")
    require(m.m is None or 2 * m.m == d, f"the first part has {m.m} of {d} channels, not half of them")
    require(m.end is None or m.end >= d, f"a slice ends at channel {m.end} of {d}")
