"""Fold a scale per channel into the convolution that it scales.

conv2d(x, W, b) * s = conv2d(x, s W, s b)        s one factor per output channel, or one for all
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Tensor, Weight, require, shape
from tautomer.rewrite.shapes import same


class FoldChannelScale(Rule):
    """A product after a convolution → its weight; see the module."""

    claim = ALGEBRAIC("the product by s is rounded in W and b, not in the activation")

    def before(
        self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, stride: Operand, padding: Operand, dilation: Operand,
        groups: Operand, s: Weight,
    ) -> Operand:  # fmt: skip
        return op.mul(op.conv2d(x, W, b, stride, padding, dilation, groups), s)

    def where(self, m: Match) -> None:
        sizes, channels = shape(m.s), shape(m.W)[0]
        per_channel = len(sizes) in (3, 4) and same(sizes[-3], channels) and all(same(n, 1) for n in (*sizes[:-3], *sizes[-2:]))
        require(per_channel or all(same(n, 1) for n in sizes), f"the factor has the shape {list(sizes)}, not one per channel")

    def after(
        self, op: Ops, x: Tensor, W: Weight, b: OptionalWeight, stride: Operand, padding: Operand, dilation: Operand,
        groups: Operand, s: Weight,
    ) -> Operand:  # fmt: skip
        bias = None if b is None else op.mul(b, op.reshape(s, [-1]))
        return op.conv2d(x, op.mul(W, op.reshape(s, [-1, 1, 1, 1])), bias, stride, padding, dilation, groups)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, W, b, s = (torch.randn(n, dtype=torch.float64) for n in ((2, 4, 5, 5), (6, 2, 3, 3), (6,), (6, 1, 1)))
        layout = {"stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "groups": 2}
        yield {"x": x, "W": W, "b": b, "s": s, **layout}
        yield {"x": x, "W": W, "b": None, "s": s[:1], **layout}
