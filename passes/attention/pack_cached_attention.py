"""Leave the heads of an attention with a cache side by side, and let the attention keep the cache.

    K, V = cat([past_k, transpose(k)]), cat([past_v, transpose(v)])
    transpose(attention(transpose(q), K, V, mask)), K, V = heads(y), K, V

    y, K, V = cached_attention(pack(q), pack(k), pack(v), past_k, past_v, mask)

As ``pack_attention``; the caches keep their heads before their positions. A mask that keeps what is causal behind the past
goes afterwards (``raise_cached_mask``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase, Purpose
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, rank, require, shape
from tautomer.rewrite.shapes import same_shape

from .pack_attention import heads, pack, require_packable

Roots = tuple[Operand, Operand, Operand]


class PackCachedAttention(Rule):
    """Attention over a cache and what is joined to it → ``cached_attention``; see the module."""

    claim = ALGEBRAIC("another kernel sums in another order")
    phase: ClassVar[Phase] = "choose"
    purpose: ClassVar[Purpose] = "speed"
    interior = "shared"

    def before(self, op: Ops, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Operand, scale: Operand,
               shared: Operand) -> Roots:  # fmt: skip
        K, V = (op.cat([past, op.transpose(x, -3, -2)], -2) for past, x in ((past_k, k), (past_v, v)))
        call = {"scale": scale, "enable_gqa": shared}
        attended = op.scaled_dot_product_attention(op.transpose(q, -3, -2), K, V, mask, 0.0, False, **call)
        return op.transpose(attended, -3, -2), K, V

    def where(self, m: Match) -> None:
        require(rank(m.q) == 4, f"queries of {rank(m.q)} axes: not 4")
        require_packable(m)
        require(all(map(m.other_reader, m.roots[1:])), "nobody reads the cache that the kernel would return")
        for past, x in ((m.past_k, m.k), (m.past_v, m.v)):
            batch, _, number, width = shape(x)
            alike = rank(past) == 4 and same_shape((*shape(past)[:2], shape(past)[3]), (batch, number, width))
            require(alike, "the cache has other heads, another width or another batch than what is joined to it")

    def after(self, op: Ops, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Operand, scale: Operand,
              shared: Operand) -> Roots:  # fmt: skip
        packed = [pack(op, x) for x in (q, k, v)]
        parts = op.cached_attention(*packed, past_k, past_v, mask, heads(q), heads(k), False, scale)
        return op.unflatten(op.getitem(parts, 0), -1, [heads(q), -1]), op.getitem(parts, 1), op.getitem(parts, 2)

    def samples(self) -> Iterator[dict[str, Any]]:
        q, k, v = (torch.randn(2, *n, dtype=torch.float64) for n in ((5, 4, 6), (5, 2, 6), (5, 2, 8)))
        past = {"past_k": torch.randn(2, 2, 3, 6, dtype=torch.float64), "past_v": torch.randn(2, 2, 3, 8, dtype=torch.float64)}
        mask = torch.randn(5, 8, dtype=torch.float64)
        yield {"q": q, "k": k, "v": v, **past, "mask": mask, "scale": 0.3, "shared": True}
        yield {"q": q[:, :, :2], "k": k, "v": v, **past, "mask": None, "scale": None, "shared": False}
