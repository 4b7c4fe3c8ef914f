"""Ways to write one value by hand, shared by the rules that raise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tautomer.rewrite.evidence import FORWARD
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import Match, Operand, Ops, dtype, rank, require, shape
from tautomer.rewrite.shapes import same, show
from tautomer.rewrite.weights import Apply, Leaf


def mean_square(op: Ops, x: Operand) -> Operand:
    """mean(x^2) over the last axis, which is kept."""
    return op.any_of(op.mean(op.pow(x, 2), [-1], True), op.mean(op.mul(x, x), [-1], True), op.mean(op.square(x), [-1], True))


def root(op: Ops, x: Operand) -> Operand:
    """sqrt(x)."""
    return op.any_of(op.sqrt(x), op.pow(x, 0.5))


def inverse_root(op: Ops, x: Operand) -> Operand:
    """1 / sqrt(x)."""
    return op.any_of(op.rsqrt(x), op.pow(x, -0.5), op.reciprocal(root(op, x)))


def length(op: Ops, x: Operand) -> Operand:
    """|x| over the last axis, which is kept."""
    norms = op.vector_norm(x, 2, [-1], True), op(torch.ops.aten.linalg_norm.default)(x, None, [-1], True)
    return op.any_of(*norms, op.sqrt(op.sum(op.any_of(op.pow(x, 2), op.mul(x, x), op.square(x)), [-1], True)))


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


def halves(op: Ops, x: Operand, m: Operand, end: Operand) -> Iterator[tuple[Operand, Operand]]:
    """The first ``m`` channels of ``x`` and the ``m`` others."""
    yield op.slice(x, -1, 0, m), op.slice(x, -1, m, end)
    yield op.narrow(x, -1, 0, m), op.narrow(x, -1, m, m)
    for parts in (op.chunk(x, 2, -1), op.split(x, m, -1), op.split_sizes(x, [m, m], -1)):
        yield op.getitem(parts, 0), op.getitem(parts, 1)


def alternating(op: Ops, x: Operand, shape: Operand, pairs: Operand, end: Operand) -> Iterator[tuple[Operand, Operand]]:
    """The channels of ``x`` with even and with odd numbers; ``pairs`` are [d/2, 2], the last axes of ``shape``."""
    yield op.slice(x, -1, 0, end, 2), op.slice(x, -1, 1, end, 2)
    for paired in (op.reshape(x, shape), op.unflatten(x, -1, pairs)):
        unbound = op.unbind(paired, -1)
        yield op.getitem(unbound, 0), op.getitem(unbound, 1)
        yield op.select(paired, -1, 0), op.select(paired, -1, 1)


HALVES = (torch.float16, torch.bfloat16)


def require_half(m: Match, *weights: Any) -> None:
    """Refuse unless ``m.x`` and ``weights`` are of the type ``m.half``, or float32 copies of weights that are."""
    require(m.half in HALVES, f"{m.half} is no half-precision type")
    require(dtype(m.x) == m.half, f"the norm reads {dtype(m.x)} and returns {m.half}")
    for weight in weights:
        kind = _stored(weight, m.program)
        require(kind in (None, m.half), f"the gain or shift is {kind}, which {m.half} would round")


def _stored(weight: Any, program: Program) -> Any:
    """The dtype of a weight, of the stored one if ``weight`` is a cast of it."""
    match program.expression(weight) if isinstance(weight, fx.Node) else None:
        case Apply(target=torch.ops.aten.to.dtype, args=(Leaf(name=name), torch.float32)):
            return program.weights.leaves[name].dtype
    return dtype(weight)


def rounded(op: Ops, weight: Operand, half: Any) -> Operand:
    """A weight of the norm as a weight of its own, in the type ``half``."""
    return op.cast(weight, half) if dtype(weight) == torch.float32 else op.weight(weight)
