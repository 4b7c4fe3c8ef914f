"""Fold the scale of a residual in front of a norm into the branch that is added to it, as DeepNorm has it.

    norm(a x + linear(h, W, b); eps) = norm(x + linear(h, W/a, b/a); eps/a^2)        a > 0

for LayerNorm and RMSNorm: both divide out the scale of what they read, and eps with its square. So a must be a number: eps
is one, and could not follow a weight.

arXiv:2203.00555 (DeepNet).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Scalar, Tensor, Weight, require


class FoldResidualScale(Rule):
    """A factor on the residual → its inverse in the branch's weight; see the module."""

    claim = ALGEBRAIC("the quotient by a is rounded in W and b, not the product by it in the residual")
    paper = "arXiv:2203.00555"

    def before(
        self, op: Ops, x: Tensor, a: Operand, h: Tensor, W: Weight, b: OptionalWeight, shape: Operand, axes: Operand,
        g: OptionalWeight, c: OptionalWeight, eps: Scalar, epsilon: Scalar,
    ) -> Operand:  # fmt: skip
        y = op.add(op.mul(x, a), op.linear(h, W, b))
        return op.any_of(op.layer_norm(y, shape, g, c, eps), op.rms_norm(y, axes, g, epsilon))

    def where(self, m: Match) -> None:
        require(isinstance(m.a, (int, float)), "the factor of the residual is a tensor: eps, a number, could not follow it")
        require(m.a > 0, f"the factor of the residual is {m.a}, not positive")

    def after(
        self, op: Ops, x: Tensor, a: Operand, h: Tensor, W: Weight, b: OptionalWeight, shape: Operand, axes: Operand,
        g: OptionalWeight, c: OptionalWeight, eps: Scalar, epsilon: Scalar,
    ) -> Operand:  # fmt: skip
        y = op.add(x, op.linear(h, op.div(W, a), None if b is None else op.div(b, a)))
        if shape is None:
            return op.rms_norm(y, axes, g, _over_square(epsilon, a))
        return op.layer_norm(y, shape, g, c, _over_square(eps, a))

    def samples(self) -> Iterator[dict[str, Any]]:
        x, h, W, b, g, c = (torch.randn(n, dtype=torch.float64) for n in ((3, 2, 6), (3, 2, 4), (6, 4), (6,), (6,), (6,)))
        both = {"x": 0.01 * x, "h": 0.01 * h, "W": W, "shape": [6], "axes": [6], "eps": 1e-3, "epsilon": 1e-4}
        yield {**both, "a": 2.8, "b": 0.01 * b, "g": g, "c": c}
        yield {**both, "a": 3, "b": None, "g": None, "c": None}


def _over_square(eps: Any, a: Any) -> Any:
    return f"{eps}/{a}^2" if isinstance(eps, str) else eps / a**2
