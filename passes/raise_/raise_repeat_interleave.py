"""Recognise entries that are repeated in place, each n times in a row, as key heads are for their query heads.

    reshape(expand(x[…, h, 1, …], n), [… h n …]) = repeat_interleave(x, n)

Whole rounds (``x.repeat``) are another order, and stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, rank, require, shape
from tautomer.rewrite.shapes import Size, same, same_shape

aten = torch.ops.aten


class RaiseRepeatInterleave(Rule):
    """A stretched axis merged into the one before it → ``repeat_interleave``; see the module."""

    claim = BITWISE("none: nothing is computed")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"  # what stays alive for another reader is a view

    def before(self, op: Ops, x: Tensor, i: Operand, y: Tensor, e: Operand, c: Operand, s: Operand, a: Operand,
               b: Operand) -> Operand:  # fmt: skip
        one = op.any_of(op.unsqueeze(x, i), y)
        stretched = op.any_of(op.expand(one, e), op(aten.repeat.default)(one, c))
        return op.any_of(op.reshape(stretched, s), op.flatten(stretched, a, b))

    def where(self, m: Match) -> None:
        require(m.program.expression(m.root) is None, "a weight that is repeated is another rewrite's business")
        before = _with_one(m.x, m.i, m.y)
        axis, times = _stretch(before, m.e or m.c)
        require(axis > 0, "not one axis of size 1 is stretched by a known number")
        after = (*before[: axis - 1], before[axis - 1] * times, *before[axis + 1 :])
        require(same_shape(shape(m.root), after), "the copies are not merged with the axis they follow")

    def after(self, op: Ops, x: Tensor, i: Operand, y: Tensor, e: Operand, c: Operand, s: Operand, a: Operand,
              b: Operand) -> Operand:  # fmt: skip
        if isinstance(e, str):
            return op(aten.repeat_interleave.self_int)(x, "n", "h")
        axis, times = _stretch(_with_one(x, i, y), e or c)
        return op(aten.repeat_interleave.self_int)(op.squeeze(y, axis) if x is None else x, times, axis - 1)

    def samples(self) -> Iterator[dict[str, Any]]:
        y = torch.randn(2, 3, 1, 4, 5, dtype=torch.float64)
        sizes, counts = {"e": [2, 3, 6, 4, -1], "c": [1, 1, 6, 1, 1]}, {"s": [2, 18, 4, -1], "a": 1, "b": 2}
        yield {"x": y.squeeze(2), "i": 2, "y": y, **sizes, **counts}


def _with_one(x: Any, i: Any, y: Any) -> tuple[Size, ...]:
    """The shape before the stretch."""
    if x is None:
        return shape(y)
    at = i + rank(x) + 1
    return (*shape(x)[:at], 1, *shape(x)[at:])


def _stretch(before: Sequence[Size], sizes: Sequence[Any]) -> tuple[int, int]:
    """The one axis of size 1 that is stretched, and how many times; (0, 0) if there is none, or more than one."""
    ones = [axis for axis, size in enumerate(before) if same(size, 1) and sizes[axis : axis + 1] != [1] and sizes[axis] != -1]
    fits = len(before) == len(sizes) and len(ones) == 1 and isinstance(sizes[ones[0]], int) and sizes[ones[0]] > 1
    return (ones[0], sizes[ones[0]]) if fits else (0, 0)
