"""Let query heads share the heads of keys and values that were repeated for them.

    attention(q, repeat_interleave(k, n), repeat_interleave(v, n)) = attention(q, k, v, enable_gqa)

The copies are not made. A single head may also be stretched over all query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.metadata import value_of
from tautomer.rewrite.pass_base import Phase
from tautomer.rewrite.rules import Match, Operand, Ops, Rule, Tensor, dtype, rank, require, shape
from tautomer.rewrite.shapes import same, same_shape

aten = torch.ops.aten


class ShareKeyHeads(Rule):
    """Attention over repeated key heads → ``enable_gqa``; see the module."""

    claim = ALGEBRAIC("the gradients of the copies of a head are summed in another order")
    phase: ClassVar[Phase] = "raise"
    interior = "shared"  # repeated keys that others read stay for them

    def before(self, op: Ops, q: Tensor, k: Tensor, k_: Tensor, n: Operand, e: Operand, v: Tensor, v_: Tensor, m: Operand,
               f: Operand, mask: Operand, p: Operand, causal: Operand, s: Operand) -> Operand:  # fmt: skip
        def copies(x: Operand, n: Operand, axis: int, e: Operand) -> Operand:
            return op.any_of(op(aten.repeat_interleave.self_int)(x, n, axis), op.expand(x, e))

        def heads(x: Operand, behind: Operand, n: Operand, e: Operand) -> Operand:
            """``x`` has its heads before its positions, ``behind`` after them."""
            return op.any_of(copies(x, n, -3, e), op.transpose(copies(behind, n, -2, e), -3, -2))

        return op.scaled_dot_product_attention(q, heads(k, k_, n, e), heads(v, v_, m, f), mask, p, causal, scale=s)

    def where(self, m: Match) -> None:
        K, V = (_before(x, behind) for x, behind in ((m.k, m.k_), (m.v, m.v_)))
        require(rank(m.q) == len(K) == len(V) == 4, f"queries of {rank(m.q)} axes: not 4")
        batch, heads, *_ = shape(m.q)
        own = (shape(x)[:2] for x in m.root.args[1:3])
        require(all(same_shape(x, (batch, heads)) for x in own), "not every query head has a key head of its own")
        require(same(K[1], V[1]), "keys and values are not repeated alike")
        require(same(K[0], batch) and same(V[0], batch), "the batch is stretched as well as the heads")
        require(isinstance(K[1], int) and isinstance(heads, int), "the number of heads depends on the input")
        kernel = fused(value_of(m.q).device, dtype(m.q), masked=m.mask is not None)
        require(kernel, "fused CUDA kernels share heads only in half precision without a mask")

    def after(self, op: Ops, q: Tensor, k: Tensor, k_: Tensor, n: Operand, e: Operand, v: Tensor, v_: Tensor, m: Operand,
              f: Operand, mask: Operand, p: Operand, causal: Operand, s: Operand) -> Operand:  # fmt: skip
        k, v = (op.transpose(b, -3, -2) if a is None else a for a, b in ((k, k_), (v, v_)))
        return op.scaled_dot_product_attention(q, k, v, mask, p, causal, scale=s, enable_gqa=True)

    def samples(self) -> Iterator[dict[str, Any]]:
        q, k, v = (torch.randn(2, h, n, 4, dtype=torch.float64) for h, n in ((4, 5), (1, 4), (1, 4)))
        copies = {"n": 4, "e": [2, 4, 4, 4], "m": 4, "f": [2, 4, 4, 4]}
        call = {"mask": torch.randn(5, 4, dtype=torch.float64), "p": 0.0, "causal": False, "s": 0.5}
        yield {"q": q, "k": k, "k_": k.transpose(1, 2), "v": v, "v_": v.transpose(1, 2), **copies, **call}


def fused(device: torch.device, kind: torch.dtype, *, masked: bool) -> bool:
    """Whether a fused kernel takes shared heads; where none does, PyTorch writes the scores out, and that is no gain."""
    return device.type != "cuda" or (kind in (torch.float16, torch.bfloat16) and not masked)


def _before(x: Any, behind: Any) -> tuple[Any, ...]:
    """The shape of keys or values before they were repeated, heads before positions."""
    if x is not None:
        return shape(x)
    batch, positions, heads, width = shape(behind)
    return batch, heads, positions, width
