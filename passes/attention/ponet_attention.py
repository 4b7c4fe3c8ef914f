"""Let pooling of three kinds stand for attention: of the whole sequence, of a segment, of the neighbours.

    softmax(q kᵀ) v  →  (g' + S') ⊙ O + L'                 O, S, L = three linear layers of v

    g = mean q,  g' = Σ_j softmax(g·k_j) k_j       S' = max of S in the segment       L' = max of L over the window

O(n d²) operations instead of 4 n² d. Q and K of the paper are q and k; where the layer of v is square, linear layers of v are
linear layers of what it reads. S and L begin as v itself, O near 0: at first a position sees the largest values beside it. The
three learn by attention transfer what attention gave; the model must be trained on.

arXiv:2110.02442 (PoNet).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tautomer.rewrite.attentions import AttentionSite, Masking
from tautomer.rewrite.claims import ARCHITECTURE
from tautomer.rewrite.errors import UsageError, require
from tautomer.rewrite.ops import Operand, Ops
from tautomer.rewrite.rules import shape

from .feature_maps import Heads
from .learned_attention import LearnedAttention, for_queries, kept, keys_for_queries

LAYERS = ("gate", "segment", "local")
"""O, S and L."""


@dataclass(frozen=True, eq=False)
class PonetAttention(LearnedAttention):
    """Attention → pooling; see the module.

    Attributes:
        segments: how many there are.
        window: positions that are neighbours, odd.
    """

    claim = ARCHITECTURE("positions meet through means and maxima alone")
    paper = "arXiv:2110.02442"
    represents: ClassVar[Masking] = Masking.PADDING
    stands: ClassVar[str] = "a position sees the largest values beside it"
    segments: int = 16
    window: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments < 1 or self.window < 1 or self.window % 2 == 0:
            hint = "one segment at least, and a window that has a middle"
            raise UsageError(f"segments={self.segments}, window={self.window}", hint=hint)

    def check(self, site: AttentionSite) -> None:
        super().check(site)
        require(site.width == int(shape(site.value)[-1]), "keys are values of its mean, and have another width")

    def initial(self, given: Heads, draw: torch.Generator) -> dict[str, Tensor]:
        d = given.heads * given.width
        weights = dict(zip(LAYERS, (0.02 * torch.randn(d, d, generator=draw), torch.eye(d), torch.eye(d)), strict=True))
        return {f"{name}.{part}": x for name, W in weights.items() for part, x in (("weight", W), ("bias", torch.zeros(d)))}

    def core(self, op: Ops, site: AttentionSite, weights: Mapping[str, Operand]) -> Operand:
        v = op.flatten(op.transpose(for_queries(op, site, site.value), 1, 2), 2)
        made = (op.linear(v, weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in LAYERS)
        heads = (op.transpose(op.unflatten(x, -1, [site.heads, site.width]), 1, 2) for x in made)
        return op.ponet_attention(site.query, keys_for_queries(op, site), *heads, kept(op, site), self.segments, self.window)

    def flops(self, site: AttentionSite, n: int) -> float:
        return n * site.width * (6.0 * site.heads * site.width + self.window + 10)
