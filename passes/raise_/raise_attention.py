"""Recognise attention written by hand.

    softmax(c q kᵀ + b) v = scaled_dot_product_attention(q, k, v, b, scale=c)
    softmax(c (q kᵀ + b)) v = scaled_dot_product_attention(q, k, v, c b, scale=c)

The keys come in any layout, and one head of them may serve all heads of the queries; the scale is a number or one per
row. Biases in parts (``gather_biases``), filled masks (``add_mask_of_sizes``, ``add_filled_mask``), casts
(``drop_softmax_casts``) and einsums (``raise_einsum``) are brought to this form first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, dtype, rank, require, shape
from tautomer.rewrite.shapes import same, same_shape

from .spellings import require_bias

aten = torch.ops.aten


class RaiseAttention(Rule):
    """Hand-written attention → ``scaled_dot_product_attention``; see the module."""

    claim = ALGEBRAIC("scores, softmax and product are accumulated by one kernel, in another order")
    phase: ClassVar[Phase] = "raise"

    def before(
        self, op: Ops, q: Tensor, K: Tensor, v: Tensor, c: Operand, d: Operand, e: Operand, f: Operand, a: Tensor
    ) -> Operand:
        scores = op.matmul(q, K)
        scaled = op.any_of(op.mul(scores, c), op.div(scores, d), scores)
        whole = op.add(scores, a)
        biased = op.any_of(op.add(scaled, a), scaled, op.div(whole, e), op.mul(whole, f))
        return op.matmul(op.softmax(biased, -1), v)

    def where(self, m: Match) -> None:
        require(rank(m.q) == rank(m.K) == rank(m.v) and rank(m.q) in (3, 4), f"queries of {rank(m.q)} axes: not 3 or 4")
        for what, x in (("keys", m.K), ("values", m.v)):
            alike = same_shape(shape(x)[:-2], shape(m.q)[:-2]) or _share_one_head(m.q, m.K, m.v)
            require(alike, f"the {what} have other leading axes than the queries")
            require(dtype(x) == dtype(m.q), f"the {what} are {dtype(x)}, the queries {dtype(m.q)}")
        for scale in (m.c, m.d, m.e, m.f):
            per_row = rank(scale) == 0 or (rank(scale) <= rank(m.q) and same(shape(scale)[-1], 1))
            fits = scale is None or (scale > 0 if _is_number(scale) else per_row)
            require(fits, "the scale is not positive, or varies along the keys")
        require_bias(m.a, m.q, m.K)

    def after(
        self, op: Ops, q: Tensor, K: Tensor, v: Tensor, c: Operand, d: Operand, e: Operand, f: Operand, a: Tensor
    ) -> Operand:
        c, d = c if f is None else f, d if e is None else e
        scale = float(c) if _is_number(c) else 1 / d if _is_number(d) else 1.0
        if c is not None and not _is_number(c):
            q = op.mul(q, c)
        if d is not None and not _is_number(d):
            q = op.div(q, d)
        bias = op.div(a, e) if e is not None else op.mul(a, f) if f is not None else a
        return attention(op, q, op.transpose(K, -2, -1), v, bias, scale)

    def misses(self, program: Program) -> Iterator[tuple[fx.Node, str]]:
        for softmax in program.graph.find_nodes(op="call_function", target=aten.softmax.int):
            reason = _obstacle(softmax)
            if reason is not None:
                yield softmax, reason

    def samples(self) -> Iterator[dict[str, Any]]:
        q, K, v, a = (torch.randn(2, 3, *n, dtype=torch.float64) for n in ((4, 6), (6, 5), (5, 8), (4, 5)))
        per_head, number = torch.rand(3, 1, 1) + 0.5, torch.tensor(3.0)
        yield {"q": q, "K": K, "v": v, "c": 0.25, "d": 4.0, "e": 0.5, "f": 2.0, "a": a}
        yield {"q": q[0], "K": K[0], "v": v[0], "c": 2, "d": 3, "e": 2, "f": 2, "a": a[0, 0]}
        yield {"q": q, "K": K, "v": v, "c": per_head, "d": number, "e": number, "f": per_head, "a": a[0, 0, 0]}


def attention(op: Ops, q: Operand, k: Operand, v: Operand, bias: Operand, scale: Operand) -> Operand:
    """``scaled_dot_product_attention`` of four axes: fused kernels know no other rank."""
    if rank(bias) == 3:
        bias = op.unsqueeze(bias, 0)
    elif bias is not None and rank(bias) < 2:
        bias = op.unsqueeze(bias, 0) if rank(bias) else op.reshape(bias, [1, 1])
    if rank(q) != 3:
        return op.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=_share_one_head(q, k, v))
    q, k, v = (op.unsqueeze(x, 0) for x in (q, k, v))
    return op.squeeze(op.scaled_dot_product_attention(q, k, v, bias, scale=scale), 0)


_ON_THE_WAY = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.ScalarOther, aten.where.self,
    aten.masked_fill.Scalar, aten.reshape.default, aten.to.dtype, aten.tanh.default, aten.cat.default,
}  # fmt: skip


def _obstacle(softmax: fx.Node) -> str | None:
    """What stands between the product of queries and keys and this softmax that attention has no place for, in words."""
    scores = softmax.args[0]
    assert isinstance(scores, fx.Node)
    dropped = any(user.target is aten.dropout.default for user in softmax.users)
    seen, stack = set[fx.Node](), [(scores, "the weights are dropped out: a kernel would draw other ones" if dropped else "")]
    while stack:
        at, obstacle = stack.pop()
        if at.target is aten.matmul.default and obstacle:
            return obstacle
        if at in seen or at.target not in _ON_THE_WAY:
            continue
        seen.add(at)
        for operand in at.all_input_nodes:
            stack.append((operand, obstacle or _named(at, operand)))
    return None


def _named(at: fx.Node, operand: fx.Node) -> str:
    """The obstacle that ``at`` is for the scores ``operand``; "" if it is none."""
    if at.target is aten.tanh.default:
        return "the scores are capped by a tanh, for which attention has no place"
    if at.target is aten.cat.default:
        return "more columns are joined to the scores (attention sinks), for which attention has no place"
    if at.target is aten.add.Tensor and dtype(at) != dtype(operand):
        return f"a mask or bias of {dtype(at)} is added to scores of {dtype(operand)}, for which attention has no place"
    others = [x for x in at.all_input_nodes if x is not operand]
    if at.target is aten.mul.Tensor and others and rank(others[0]) and not same(shape(others[0])[-1], 1):
        return "the scores are multiplied by what varies along the keys, for which attention has no place"
    return ""


def _share_one_head(q: Any, *others: Any) -> bool:
    """Whether keys and values have one head for all heads of the queries."""
    if rank(q) != 4:
        return False
    batch, heads, *_ = shape(q)
    return isinstance(heads, int) and heads > 1 and all(same_shape(shape(x)[:2], (batch, 1)) for x in others)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float))
