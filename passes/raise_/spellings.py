"""Ways to write one value by hand, shared by the rules that raise."""

from __future__ import annotations

from typing import Any

import torch

from tautomer.rewrite.evidence import FORWARD
from tautomer.rewrite.rules import Operand, Ops, dtype, rank, require, shape
from tautomer.rewrite.shapes import same, show


def mean_square(op: Ops, x: Operand) -> Operand:
    """mean(x^2) over the last axis, which is kept."""
    return op.any_of(op.mean(op.pow(x, 2), [-1], True), op.mean(op.mul(x, x), [-1], True), op.mean(op.square(x), [-1], True))


def root(op: Ops, x: Operand) -> Operand:
    """sqrt(x)."""
    return op.any_of(op.sqrt(x), op.pow(x, 0.5))


def inverse_root(op: Ops, x: Operand) -> Operand:
    """1 / sqrt(x)."""
    return op.any_of(op.rsqrt(x), op.pow(x, -0.5), op.reciprocal(root(op, x)))


def half_gated(op: Ops, x: Operand, y: Operand) -> Operand:
    """x/2 (1 + y)."""

    def halves(z: Operand) -> tuple[Operand, Operand]:
        return op.mul(z, 0.5), op.div(z, 2)

    gate, half = op.add(y, 1), op.any_of(*halves(x))
    expanded = op.add(half, op.mul(half, y)), *halves(op.add(x, op.mul(x, y)))
    return op.any_of(op.mul(half, gate), op.mul(x, op.any_of(*halves(gate))), *halves(op.mul(x, gate)), *expanded)


def require_constant(literal: float | None, constant: float, name: str, tolerance: float = FORWARD) -> None:
    """Refuse a literal that is not ``constant``, to a relative ``tolerance``; none is no wrong one."""
    difference = 0.0 if literal is None else abs(literal / constant - 1)
    require(difference <= tolerance, f"the literal {literal!r} is not {name} but {difference:.1e} (relative) away from it")


def require_bias(bias: Any, q: Any, K: Any) -> None:
    """Refuse a summand that need not fit the scores q K at every length, or has another dtype; none is no wrong one."""
    if bias is None:
        return
    require(dtype(bias) == dtype(q), f"a bias of {dtype(bias)} is added to scores of {dtype(q)}")
    require(rank(bias) <= rank(q), "the bias has more axes than the scores")
    scores = (*shape(q)[:-1], shape(K)[-1])
    fits = all(same(own, 1) or same(own, size) for own, size in zip(shape(bias)[::-1], scores[::-1], strict=False))
    require(fits, f"a bias of {show(shape(bias))} may not fit the scores at every length: they are {show(scores)}")


ZEROS = {torch.ops.aten.zeros_like.default, torch.ops.aten.zeros.default}
"""What a mask that is added is filled into."""


def additive_mask(op: Ops, mask: Operand, kind: Any, low: Any, *, keeps: bool) -> Operand:
    """Zero where a boolean mask keeps, ``low`` where it does not; the mask says what it keeps, or what it drops."""
    zeros = op(torch.ops.aten.zeros_like.default)(mask, dtype=kind)
    return op(torch.ops.aten.where.ScalarOther)(mask, zeros, low) if keeps else op.masked_fill(zeros, mask, low)
