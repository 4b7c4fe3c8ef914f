"""Merge two permutations of axes into one, or none.

    permute(permute(x, p), q) = permute(x, p q)

A transposition is a permutation, and is written as one where the result exchanges two axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, rank, require


class MergePermutes(Rule):
    """Two permutations in a row → one; see the module."""

    claim = BITWISE("none: nothing is computed")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"  # what stays alive for another reader is a view

    def before(self, op: Ops, x: Tensor, p: Operand, a: Operand, b: Operand, q: Operand, c: Operand, d: Operand) -> Operand:
        inner = op.any_of(op.permute(x, p), op.transpose(x, a, b))
        return op.any_of(op.permute(inner, q), op.transpose(inner, c, d))

    def where(self, m: Match) -> None:
        require(m.program.expression(m.x) is None, "a weight that is transposed twice is another rewrite's business")

    def after(self, op: Ops, x: Tensor, p: Operand, a: Operand, b: Operand, q: Operand, c: Operand, d: Operand) -> Operand:
        if isinstance(p, str):
            return op.permute(x, f"{p} {q}")
        first, second = (_order(rank(x), *given) for given in ((p, a, b), (q, c, d)))
        order = [first[axis] for axis in second]
        moved = [axis for axis, source in enumerate(order) if axis != source]
        if not moved:
            return x
        return op.transpose(x, *moved) if len(moved) == 2 else op.permute(x, order)

    def samples(self) -> Iterator[dict[str, Any]]:
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        yield {"x": x, "p": [0, 2, 3, 1], "a": 1, "b": 3, "q": [-4, -1, -2, -3], "c": -2, "d": -1}
        yield {"x": x, "p": [0, 2, 1, 3], "a": -2, "b": -3, "q": [0, 2, 1, 3], "c": 1, "d": 2}


def _order(axes: int, order: Any, a: Any, b: Any) -> list[int]:
    """Where each axis of the result comes from."""
    result = list(range(axes)) if order is None else [int(axis) % axes for axis in order]
    if order is None:
        result[a], result[b] = result[b], result[a]
    return result
