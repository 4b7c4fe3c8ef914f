"""Scale the input of a LayerNorm row by row, so that a target that sums in half precision neither overflows nor underflows.

    c = x - mean(x),  z = c / s        LayerNorm(x; eps) = z / sqrt(mean(z²) + (√eps / s)²)        for any s > 0

s is a power of two near max|c| (or near mean|c|), so that the division is exact, and no less than √eps, so that a constant row
gives zeros. The mean is taken of x less its first entry, in units of max|x|: nothing on the way leaves the range of float16.
Only for targets without float32 accumulation; elsewhere the norm has it and this only costs time.

arXiv:2312.10359 (pre-normalizers; the scaling by the maximum and its bounds are derived here).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, log2, sqrt
from typing import Any, ClassVar, Literal, get_args

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, OptionalWeight, Rule, Scalar, Tensor, require, width

aten = torch.ops.aten

Scale = Literal["max", "mean"]
_TINY = 2.0**-14  # the smallest normal number of float16
_LARGEST = 2.0**15  # what a sum may reach: half the largest


class Prescaled(Rule):
    """What the two norms share.

    Args:
        by: what a row is scaled by, its largest entry ("max") or its mean absolute deviation ("mean").
    """

    claim = ALGEBRAIC("a row is scaled by a power of two, exactly; sums are of smaller numbers")
    paper = "arXiv:2312.10359"
    phase: ClassVar[Phase] = "choose"

    def __init__(self, by: Scale = "max") -> None:
        if by not in get_args(Scale):
            raise UsageError(f"a row is scaled by its 'max' or its 'mean', not by {by!r}")
        self.by = by

    def normalized(self, op: Ops, c: Operand, n: int, root: Operand) -> Operand:
        """c / sqrt(mean(c²) + root²) over the last axis."""
        size = largest(op, c) if self.by == "max" else _mean(op, op.abs(c), n, 4.0)
        s = power_of_two(op, op.maximum(op(aten.clamp_min.default)(size, _TINY), root))
        z, root = op.div(c, s), op.div(root, s)
        return op.mul(z, op.rsqrt(op.add(self.mean_square(op, z, n), op.mul(root, root))))

    def mean_square(self, op: Ops, z: Operand, n: int) -> Operand:
        """|z| < 2 by its largest entry; by its mean deviation one entry may be n/2, whose square needs another scale."""
        if self.by == "max":
            return _mean(op, op.mul(z, z), n, 4.0)
        shrink = 2.0 ** -round(log2(sqrt(n)))
        small = op.mul(z, shrink)
        return op.mul(_mean(op, op.mul(small, small), n, 4.0), 1 / shrink**2)

    def affine(self, op: Ops, x: Operand, g: Operand, b: Operand) -> Operand:
        x = x if g is None else op.mul(x, g)
        return x if b is None else op.add(x, b)


def largest(op: Ops, x: Operand) -> Operand:
    """max|x| over the last axis, which is kept; no gradient goes through it, as the result depends on no scale."""
    return op.amax(op.abs(op.detach(x)), [-1], True)


def power_of_two(op: Ops, s: Operand) -> Operand:
    """The power of two below s, or the largest that float16 has."""
    exponent = op(aten.clamp_max.default)(op(aten.floor.default)(op(aten.log2.default)(s)), 15.0)
    return op.detach(op(aten.exp2.default)(exponent))


def _mean(op: Ops, x: Operand, n: int, bound: float) -> Operand:
    """The mean of n entries below ``bound``, whose sum stays in range."""
    if isinstance(n, str) or bound * n <= _LARGEST:  # a letter where the equation is read
        return op.mean(x, [-1], True)
    shrink = 2.0 ** -ceil(log2(bound * n / _LARGEST))
    return op.mul(op.mean(op.mul(x, shrink), [-1], True), 1 / shrink)


class PrescaleLayerNorm(Prescaled):
    """LayerNorm → a LayerNorm that survives float16 sums; see the module."""

    def before(self, op: Ops, x: Tensor, n: Operand, g: OptionalWeight, b: OptionalWeight, eps: Scalar) -> Operand:
        return op.layer_norm(x, n, g, b, eps)

    def where(self, m: Match) -> None:
        require_last_axis(m)

    def after(self, op: Ops, x: Tensor, n: Operand, g: OptionalWeight, b: OptionalWeight, eps: Scalar) -> Operand:
        d = op.width(x)
        unit = power_of_two(op, op(aten.clamp_min.default)(largest(op, x), root_of(eps)))
        z = op.div(x, unit)
        z = op.sub(z, op.slice(z, -1, 0, 1))  # a constant row is zero from here on, whatever its mean is rounded to
        c = op.sub(z, _mean(op, z, d, 4.0))
        root = op.mul(op.reciprocal(unit), root_of(eps))
        return self.affine(op, self.normalized(op, c, d, root), g, b)

    def samples(self) -> Iterator[dict[str, Any]]:
        x, g, b = torch.randn(3, 4, 6, dtype=torch.float64), *torch.randn(2, 6, dtype=torch.float64)
        yield {"x": x, "n": [6], "g": g, "b": b, "eps": 1e-5}
        yield {"x": 1e-3 * x + 0.1, "n": [6], "g": None, "b": None, "eps": 1e-3}


def root_of(eps: Any) -> Any:
    """√eps; as text where an equation is read."""
    return f"sqrt({eps})" if isinstance(eps, str) else sqrt(eps)


def require_last_axis(m: Match) -> None:
    """Refuse a norm over several axes, over a width that depends on the input, or without a positive eps."""
    require(len(m.n) == 1 and width(m.x) is not None, "the norm is not over the last axis alone, or its width is not fixed")
    require(m.eps is not None and m.eps > 0, f"eps is {m.eps}: the scale needs a positive one")
