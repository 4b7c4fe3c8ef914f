"""Let features of queries and keys stand for the exponential of their scores: attention in linear time.

    softmax(s q kᵀ) v  →  φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1)                 causal: the sums run up to each position

    with ``diagonal`` D:  the mean of this and of softmax attention within blocks of D positions

The result costs 4 n f e per head instead of 4 n² d, and decodes with a state of f (e + 1) numbers per head. φ learns by attention
transfer what attention gave (feature_maps.py has the maps). It keeps no weight of softmax exactly: expect it to be worse than a
window, and ``HybridAttention`` to be better.

arXiv:2006.16236 (linear attention), arXiv:2402.04347 (Hedgehog), arXiv:2311.13541 (LLN, LLN+Diag).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tautomer.rewrite.attentions import AttentionSite
from tautomer.rewrite.claims import ARCHITECTURE
from tautomer.rewrite.errors import require
from tautomer.rewrite.ops import Operand, Ops
from tautomer.rewrite.options import least
from tautomer.rewrite.rules import shape

from .feature_maps import FeatureMap, Heads, Hedgehog
from .learned_attention import LearnedAttention, kept, keys_for_queries, map_weights, mapped


@dataclass(frozen=True, eq=False)
class KernelAttention(LearnedAttention):
    """Attention → kernel attention; see the module.

    Attributes:
        feature_map: φ.
        chunk: positions to a chunk, where it is causal.
        diagonal: D; None is no softmax at all.
    """

    claim = ARCHITECTURE("features of queries and keys stand for the exponential of their scores")
    paper = "arXiv:2006.16236, arXiv:2402.04347, arXiv:2311.13541"
    crosses: ClassVar[bool] = True
    feature_map: FeatureMap = field(default_factory=Hedgehog)
    chunk: int = 64
    diagonal: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least(self, chunk=1, diagonal=1)

    def check(self, site: AttentionSite) -> None:
        super().check(site)
        aligned = site.own and not site.cached
        if site.causal or self.diagonal is not None:
            require(aligned, "its queries and keys are not of one sequence, and which of them is the later cannot be told")

    def initial(self, given: Heads, draw: torch.Generator) -> dict[str, Tensor]:
        return map_weights(self.feature_map, given, draw)

    def trains(self, name: str) -> bool:
        return self.feature_map.trains

    @property
    def measured(self) -> bool:
        return self.feature_map.measured

    def core(self, op: Ops, site: AttentionSite, weights: Mapping[str, Operand]) -> Operand:
        keep = kept(op, site)
        f = mapped(op, self.feature_map, site.query, "query", weights)
        h = mapped(op, self.feature_map, keys_for_queries(op, site), "key", weights)
        y = op.kernel_attention(f, h, site.value, None, keep, site.causal, True, self.chunk)
        if self.diagonal is None:
            return y
        blocks = op.block_attention(site.query, site.key, site.value, self.diagonal, site.causal, keep, site.scale)
        return op.mul(op.add(y, blocks), 0.5)

    def flops(self, site: AttentionSite, n: int) -> float:
        f, e, d = self.feature_map.count(site.width), int(shape(site.value)[-1]), site.width
        within = 2.0 * self.chunk * (f + e) if site.causal else 0.0
        return n * (within + 4.0 * f * e + 2.0 * (self.diagonal or 0) * (d + e))
