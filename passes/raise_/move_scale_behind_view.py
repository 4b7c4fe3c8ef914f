"""Move the product with a number behind the view that follows it, so that what reads the view sees the number.

view(c x) = c view(x)        transpose, permute, reshape, unsqueeze, unflatten
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Operand, Ops, Rule, Scalar, Tensor


class MoveScaleBehindView(Rule):
    """A scaled value, viewed → a view, scaled; see the module."""

    claim = BITWISE("none: the same products in another place")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, x: Tensor, c: Scalar, d: Scalar, i: Operand, j: Operand, p: Operand, s: Operand,
               u: Operand, a: Operand, n: Operand) -> Operand:  # fmt: skip
        scaled = op.any_of(op.mul(x, c), op.div(x, d))
        more = op.unsqueeze(scaled, u), op.unflatten(scaled, a, n)
        return op.any_of(op.transpose(scaled, i, j), op.permute(scaled, p), op.reshape(scaled, s), *more)

    def after(self, op: Ops, x: Tensor, c: Scalar, d: Scalar, i: Operand, j: Operand, p: Operand, s: Operand,
              u: Operand, a: Operand, n: Operand) -> Operand:  # fmt: skip
        if i is not None:
            x = op.transpose(x, i, j)
        elif p is not None:
            x = op.permute(x, p)
        elif s is not None:
            x = op.reshape(x, s)
        else:
            x = op.unsqueeze(x, u) if u is not None else op.unflatten(x, a, n)
        return op.mul(x, c) if c is not None else op.div(x, d)

    def samples(self) -> Iterator[dict[str, Any]]:
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        yield {"x": x, "c": 0.25, "d": 3, "i": 0, "j": -1, "p": [2, 0, 1], "s": [6, 4], "u": 1, "a": -1, "n": [2, 2]}
