"""Leave the heads of an attention where linear layers write and read them: side by side in the last axis.

    transpose(attention(transpose(q), transpose(k), transpose(v))) = heads(packed_attention(pack(q), pack(k), pack(v)))

q is [batch, t, heads, d] on both sides, its transpose [batch, heads, t, d]; the batch may be missing. ``pack`` makes
[batch, t, heads · d] of it and ``heads`` undoes that: both are views, and cancel against those of the model (``merge_views``).
What stands between the transposition and the attention goes through it first (``move_transpose``). For targets whose kernel
takes packed heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase, Purpose
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, rank, require, shape
from tautomer.rewrite.shapes import same_shape


class PackAttention(Rule):
    """Attention between transpositions → ``packed_attention``; see the module."""

    claim = ALGEBRAIC("another kernel sums in another order")
    phase: ClassVar[Phase] = "choose"
    purpose: ClassVar[Purpose] = "speed"
    interior = "shared"  # what stays alive for another reader is a view

    def before(self, op: Ops, q: Tensor, k: Tensor, v: Tensor, mask: Operand, causal: Operand, scale: Operand,
               shared: Operand) -> Operand:  # fmt: skip
        heads = [op.transpose(x, -3, -2) for x in (q, k, v)]
        attended = op.scaled_dot_product_attention(*heads, mask, 0.0, causal, scale=scale, enable_gqa=shared)
        return op.transpose(attended, -3, -2)

    def where(self, m: Match) -> None:
        require(rank(m.q) in (3, 4), f"queries of {rank(m.q)} axes: not 3 or 4")
        require_packable(m)

    def after(self, op: Ops, q: Tensor, k: Tensor, v: Tensor, mask: Operand, causal: Operand, scale: Operand,
              shared: Operand) -> Operand:  # fmt: skip
        batched = rank(q) != 3
        packed = (pack(op, x) if batched else op.unsqueeze(pack(op, x), 0) for x in (q, k, v))
        y = op.packed_attention(*packed, mask, heads(q), heads(k), causal, scale)
        return op.unflatten(y if batched else op.squeeze(y, 0), -1, [heads(q), -1])

    def samples(self) -> Iterator[dict[str, Any]]:
        q, k, v = (torch.randn(2, *n, dtype=torch.float64) for n in ((5, 4, 6), (7, 2, 6), (7, 2, 8)))
        mask = torch.randn(5, 7, dtype=torch.float64)
        yield {"q": q, "k": k, "v": v, "mask": mask, "causal": False, "scale": 0.3, "shared": True}
        yield {"q": q, "k": k[:, :, :1], "v": v[:, :, :1], "mask": None, "causal": False, "scale": None, "shared": False}
        yield {"q": q[0], "k": k[0], "v": v[0], "mask": mask, "causal": False, "scale": 0.3, "shared": True}
        yield {"q": q, "k": q.sin(), "v": q.cos(), "mask": None, "causal": True, "scale": None, "shared": False}


def require_packable(m: Match) -> None:
    """Refuse heads whose number depends on the input or differs between keys and values, and a batch that is stretched."""
    require(rank(m.q) == rank(m.k) == rank(m.v), "queries, keys and values have not the same axes")
    require(all(isinstance(heads(x), int) for x in (m.q, m.k, m.v)), "the number of heads depends on the input")
    require(heads(m.k) == heads(m.v), f"{heads(m.k)} heads of keys and {heads(m.v)} of values")
    *batch, _, _, _ = shape(m.q)
    require(
        all(same_shape(shape(x)[:-3], batch) for x in (m.k, m.v)), "one batch of keys or values serves all batches of the queries"
    )


def pack(op: Ops, x: Operand) -> Operand:
    """[batch, t, heads, d] → [batch, t, heads · d]."""
    return op.flatten(x, -2, -1)


def heads(x: Operand) -> Any:
    """How many heads [batch, t, heads, d] has."""
    return shape(x)[-2] if shape(x) else "heads"
