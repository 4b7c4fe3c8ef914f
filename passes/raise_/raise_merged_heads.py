"""Recognise attention whose heads are merged with the batch for the products and apart for the mask.

    softmax(split(a + c q kᵀ) + b) v = merge(scaled_dot_product_attention(split(q), split(k), split(v), split(a) + b, scale=c))

``split`` makes [batch, heads, …] of [batch · heads, …], ``merge`` undoes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Scalar, Tensor, dtype, rank, require, shape
from tautomer.rewrite.shapes import same_shape

from .raise_attention import attention

aten = torch.ops.aten


class RaiseMergedHeads(Rule):
    """Attention over merged heads → ``scaled_dot_product_attention``; see the module."""

    claim = ALGEBRAIC("scores, softmax and product are accumulated by one kernel, in another order")
    phase: ClassVar[Phase] = "raise"

    def before(self, op: Ops, q: Tensor, K: Tensor, v: Tensor, a: Tensor, beta: Scalar, c: Scalar, b: Tensor,
               split: Operand, merge: Operand) -> Operand:  # fmt: skip
        product = op.matmul(q, K)
        scores = op.any_of(op(aten.baddbmm.default)(a, q, K, beta=beta, alpha=c), op.add(product, a), product)
        biased = op.add(op.reshape(scores, split), b)
        weights = op.any_of(op.reshape(op.softmax(biased, -1), merge), op.softmax(op.reshape(biased, merge), -1))
        return op.matmul(weights, v)

    def where(self, m: Match) -> None:
        require(rank(m.q) == rank(m.K) == rank(m.v) == 3 and len(m.split) == 4, "batch and heads are not one axis")
        require(isinstance(m.split[1], int) and m.split[1] > 0, "the number of heads depends on the input")
        require(m.c is None or m.c > 0, f"the scale is {m.c}, not positive")
        scores = (shape(m.q)[0], shape(m.q)[1], shape(m.K)[2])
        for node in m.nodes:
            if node.target is aten.reshape.default:
                kept = shape(node)[2:] if rank(node) == 4 else shape(node)
                require(same_shape(kept, scores[-len(kept) :]), "a view moves more than the heads")
        require(all(dtype(x) == dtype(m.q) for x in (m.K, m.v, m.b)), "queries, keys, values and bias are of several dtypes")

    def after(self, op: Ops, q: Tensor, K: Tensor, v: Tensor, a: Tensor, beta: Scalar, c: Scalar, b: Tensor,
              split: Operand, merge: Operand) -> Operand:  # fmt: skip
        def apart(x: Operand) -> Operand:
            return op.unflatten(x, 0, [-1, split[1]])

        if a is not None:
            b = op.add(apart(a) if beta in (None, 1) else op.mul(apart(a), beta), b)
        whole = attention(op, apart(q), op.transpose(apart(K), -2, -1), apart(v), b, 1.0 if c is None else c)
        return op.flatten(whole, 0, 1)

    def samples(self) -> Iterator[dict[str, Any]]:
        q, K, v, a = (torch.randn(6, *n, dtype=torch.float64) for n in ((4, 5), (5, 7), (7, 8), (1, 7)))
        b = torch.randn(2, 1, 4, 7, dtype=torch.float64)
        views = {"split": [2, 3, 4, 7], "merge": [6, 4, 7]}
        yield {"q": q, "K": K, "v": v, "a": a, "beta": 1.0, "c": 0.25, "b": b, **views}
        yield {"q": q, "K": K, "v": v, "a": a, "beta": 0.5, "c": 2, "b": b[0, 0], **views}
