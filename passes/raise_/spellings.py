"""Ways to write one value by hand, shared by the rules that raise norms."""

from __future__ import annotations

from tautomer.rewrite.rules import Operand, Ops


def mean_square(op: Ops, x: Operand) -> Operand:
    """mean(x^2) over the last axis, which is kept."""
    return op.any_of(op.mean(op.pow(x, 2), [-1], True), op.mean(op.mul(x, x), [-1], True), op.mean(op.square(x), [-1], True))


def root(op: Ops, x: Operand) -> Operand:
    """sqrt(x)."""
    return op.any_of(op.sqrt(x), op.pow(x, 0.5))


def inverse_root(op: Ops, x: Operand) -> Operand:
    """1 / sqrt(x)."""
    return op.any_of(op.rsqrt(x), op.pow(x, -0.5), op.reciprocal(root(op, x)))
