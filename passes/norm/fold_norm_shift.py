"""Fold a shift of the features into the linear layer that reads it.

    linear(x + c, W, b) = linear(x, W, b + W c)

This is where the shift of a LayerNorm goes. The sum disappears only if every reader can take the shift; otherwise it
stays for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.program import place, target_name
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Tensor, Weight, is_vector, require, width

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
            takes = reader.target is linear and reader.args[0] is shifted and shifted not in reader.args[1:]
            require(takes, f"{target_name(reader)} at {place(reader)} reads the shifted features too, so the shift cannot go")
            out, d = width(reader) or 0, width(m.x) or 0
            cheaper = f"{place(reader)} has no bias: adding one over {out} features costs more than a shift over {d}"
            require(_has_bias(reader) or out <= d, cheaper)

    def after(self, op: Ops, x: Tensor, c: Weight, W: Weight, b: OptionalWeight) -> Operand:
        shift = op.mv(W, c)
        return op.linear(x, W, shift if b is None else op.add(b, shift))

    def samples(self) -> Iterator[dict[str, Any]]:
        x, c, W, b = (torch.randn(n, dtype=torch.float64) for n in ((3, 2, 5), (5,), (4, 5), (4,)))
        yield {"x": x, "c": c, "W": W, "b": b}
        yield {"x": x, "c": c, "W": W, "b": None}


def _has_bias(reader: fx.Node) -> bool:
    return len(reader.args) > 2 and reader.args[2] is not None
