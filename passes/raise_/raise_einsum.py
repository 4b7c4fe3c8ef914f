"""Recognise a batched product written as an einsum.

    einsum("bqhd,bkhd->bhqk", x, y) = matmul(permute(x, b h q d), permute(y, b h d k))

Of two operands; one axis is summed, each operand brings one of its own, and all others are common to both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, require, shape
from tautomer.rewrite.shapes import same

aten = torch.ops.aten


class RaiseEinsum(Rule):
    """An einsum of two operands → ``matmul``; see the module."""

    claim = ALGEBRAIC("the product may sum in another order")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, equation: Operand, x: Tensor, y: Tensor) -> Operand:
        return op(aten.einsum.default)(equation, [x, y])

    def where(self, m: Match) -> None:
        left, right, out = _letters(m.equation)
        own = [set(left) - set(right), set(right) - set(left)]
        summed = (set(left) | set(right)) - set(out)
        plain = all(len(set(letters)) == len(letters) and letters.isalpha() for letters in (left, right, out))
        require(plain and len(own[0]) == len(own[1]) == len(summed) == 1, f"'{m.equation}' is no batched product")
        require(summed <= set(left) & set(right), f"'{m.equation}' sums one operand alone")
        sizes = dict(zip(left, shape(m.x), strict=True))
        alike = all(same(sizes[letter], size) for letter, size in zip(right, shape(m.y), strict=True) if letter in sizes)
        require(alike, "an axis of one operand is stretched along the other's")

    def after(self, op: Ops, equation: Operand, x: Tensor, y: Tensor) -> Operand:
        left, right, out = _letters(equation)
        batch = "".join(letter for letter in out if letter in left and letter in right)
        summed = "".join(letter for letter in left if letter not in out)
        rows, columns = (
            "".join(letter for letter in letters if letter not in other) for letters, other in ((left, right), (right, left))
        )
        product = op.matmul(_permute(op, x, left, batch + rows + summed), _permute(op, y, right, batch + summed + columns))
        return _permute(op, product, batch + rows + columns, out)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, y = (torch.randn(2, n, 3, 4, dtype=torch.float64) for n in (5, 6))
        yield {"equation": "bqhd,bkhd->bhqk", "x": x, "y": y}
        yield {"equation": "bqhd, bkhd -> bqhk", "x": x, "y": y}
        yield {"equation": "bhqk,bkhd->bqhd", "x": torch.randn(2, 3, 5, 6, dtype=torch.float64), "y": y}
        yield {"equation": "ij,kj->ik", "x": x[0, :, 0], "y": y[0, :, 0]}


def _letters(equation: str) -> tuple[str, str, str]:
    """The letters of both operands and of the result; empty where the equation has another form."""
    operands, arrow, out = equation.replace(" ", "").partition("->")
    left, comma, right = operands.partition(",")
    return (left, right, out) if arrow and comma else ("", "", "")


def _permute(op: Ops, x: Operand, given: str, wanted: str) -> Operand:
    return x if given == wanted else op.permute(x, [given.index(letter) for letter in wanted])
