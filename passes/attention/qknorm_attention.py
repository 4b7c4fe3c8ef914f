"""Let the cosines of queries and keys, times a number per head, stand for their products.

    softmax(s q kᵀ + mask) v  →  softmax(g q̂ k̂ᵀ + mask) v                 q̂ = q / ‖q‖, k̂ = k / ‖k‖, per position

No cheaper, but bounded: no score is beyond g, in any precision, at any length. The same function where ‖q‖ ‖k‖ is one number per
head; elsewhere g starts as the mean of s ‖q‖ ‖k‖ over the data, learns by attention transfer, and the model is trained on.

arXiv:2010.04245 (QKNorm), with a g per head instead of per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tautomer.rewrite.attentions import AttentionSite, Masking
from tautomer.rewrite.claims import ARCHITECTURE
from tautomer.rewrite.errors import require
from tautomer.rewrite.ops import Operand, Ops
from tautomer.rewrite.program import arguments
from tautomer.rewrite.rules import shape

from .feature_maps import Heads
from .learned_attention import LearnedAttention


@dataclass(frozen=True, eq=False)
class QknormAttention(LearnedAttention):
    """Attention → attention of normalised queries and keys; see the module."""

    claim = ARCHITECTURE("lengths of queries and keys no longer weigh")
    paper = "arXiv:2010.04245"
    represents: ClassVar[Masking] = ~Masking(0)
    crosses: ClassVar[bool] = True
    measured: ClassVar[bool] = True

    def initial(self, given: Heads, draw: torch.Generator) -> dict[str, Tensor]:
        require(
            given.length is not None, "what its scores are multiplied by is measured: pass data=[…], an iterable of example calls"
        )
        assert given.length is not None
        return {"gain": (given.scale * given.length["query"] * given.length["key"])[:, None, None]}

    def core(self, op: Ops, site: AttentionSite, weights: Mapping[str, Operand]) -> Operand:
        q, k = op.mul(op.normalize(site.query), weights["gain"]), op.normalize(site.key)
        causal = bool(arguments(site.node)["is_causal"])
        return op.scaled_dot_product_attention(q, k, site.value, site.mask, 0.0, causal, scale=1.0, enable_gqa=site.groups > 1)

    def flops(self, site: AttentionSite, n: int) -> float:
        return 2.0 * n * n * (site.width + int(shape(site.value)[-1]))
