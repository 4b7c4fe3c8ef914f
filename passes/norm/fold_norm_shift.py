"""Fold a shift of the features into the linear layer that reads it.

    linear(x + c, W, b) = linear(x, W, b + W c)

This is where the shift of a LayerNorm goes. The sum disappears only if every reader can take the shift; otherwise it
stays for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.layers import layer_of
from tautomer.rewrite.program import place, target_name
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Tensor, Weight, is_vector, require, width

from .fold_into_readers import require_narrow

linear = torch.ops.aten.linear.default


class FoldNormShift(Rule):
    """A shift before a linear layer → its bias; see the module."""

    claim = ALGEBRAIC("W c is rounded in the bias, not in the activation")
    interior = "shared"  # every reader is asked in ``where``; the last one to fold takes the sum with it

    def before(self, op: Ops, x: Tensor, c: Weight, W: Weight, b: OptionalWeight) -> Operand:
        return op.linear(op.add(x, c), W, b)

    def where(self, m: Match) -> None:
        require(is_vector(m.c, width(m.x)), "the shift is not a vector over the features")
        _, shifted = m.nodes
        for reader in shifted.users:
            layer = layer_of(reader, shifted)
            if layer is None or reader.target is not linear:
                raise Refused(f"{target_name(reader)} at {place(reader)} reads the shifted features too, so the shift cannot go")
            require_narrow(layer)

    def after(self, op: Ops, x: Tensor, c: Weight, W: Weight, b: OptionalWeight) -> Operand:
        shift = op.mv(W, c)
        return op.linear(x, W, shift if b is None else op.add(b, shift))

    def samples(self) -> Iterator[dict[str, Any]]:
        x, c, W, b = (torch.randn(n, dtype=torch.float64) for n in ((3, 2, 5), (5,), (4, 5), (4,)))
        yield {"x": x, "c": c, "W": W, "b": b}
        yield {"x": x, "c": c, "W": W, "b": None}
