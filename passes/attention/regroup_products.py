"""Multiply keys with values first, where nothing but a number stands between the products of an attention.

    s (q kᵀ) v = s q (kᵀ v)        n d e + m d e products instead of n m d + n m e

Attention without a softmax, as in Galerkin transformers and linear attention written out: what was quadratic in the number of
positions becomes linear. It pays where positions are more than features; sizes that are free count as in the example.

arXiv:2105.14995 (Choose a Transformer: Fourier or Galerkin).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, rank, require, shape
from tautomer.rewrite.shapes import exemplary


class RegroupProducts(Rule):
    """(q kᵀ) v → q (kᵀ v); see the module."""

    claim = ALGEBRAIC("products are summed over features before positions")
    paper = "arXiv:2105.14995"

    def before(self, op: Ops, q: Tensor, k: Tensor, s: Scalar, n: Operand, v: Tensor) -> Operand:
        scores = op.matmul(q, k)
        return op.matmul(op.any_of(op.mul(scores, s), op.div(scores, n), scores), v)

    def where(self, m: Match) -> None:
        require(min(map(rank, (m.q, m.k, m.v))) > 1, "one of its operands is a vector")
        require(not _is_weight(m.k) and not _is_weight(m.v), "it multiplies with a weight, as a layer does")
        is_number = not isinstance(m.n, fx.Node) or not isinstance(m.n.meta["val"], torch.Tensor)
        require(is_number, "its scores are divided by a tensor")
        n, d, length, e = (exemplary(size) for size in (*shape(m.q)[-2:], *shape(m.v)[-2:]))
        require(None not in (n, d, length, e), "its sizes are computed from values")
        assert n is not None and d is not None and length is not None and e is not None
        now, then = n * length * (d + e), d * e * (n + length)
        require(then < now, f"{n} positions and {length} keys of {d} features: {now:,} products now, {then:,} then")

    def after(self, op: Ops, q: Tensor, k: Tensor, s: Scalar, n: Operand, v: Tensor) -> Operand:
        y = op.matmul(q, op.matmul(k, v))
        return op.mul(y, s) if s is not None else y if n is None else op.div(y, n)

    def samples(self) -> Iterator[dict[str, Any]]:
        q, k, v = (torch.randn(2, *n, dtype=torch.float64) for n in ((9, 3), (3, 7), (7, 4)))
        yield {"q": q, "k": k, "s": 0.1, "n": 9, "v": v}
        yield {"q": q[0], "k": k, "s": 0.5, "n": 7.0, "v": v}


def _is_weight(value: Any) -> bool:
    """Whether a weight is behind the views and casts that make ``value``."""
    while isinstance(value, fx.Node) and value.op == "call_function" and len(value.all_input_nodes) == 1:
        (value,) = value.all_input_nodes
    return isinstance(value, fx.Node) and value.op == "get_attr"
