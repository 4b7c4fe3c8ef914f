"""Keep softmax for the nearest keys, and let features stand for the exponential of all other scores.

    y_i = (Σ_{j near} a_ij v_j + Σ_{j far} b_ij v_j) / (Σ_{j near} a_ij + Σ_{j far} b_ij)

    a_ij = γ exp(s q_i·k_j - max_near)     b_ij = φ(q_i)·φ(k_j)        γ = sigmoid(gate), learned per head

For causal attention. The last w keys are near, or ("terraced") the block of w and the one before; with w ≥ n nothing changes,
whatever φ and γ are. It decodes with a state of f (e + 1) numbers and the last w keys and values per head. φ and γ learn by
attention transfer what attention gave: without that it is worse than its own window.

arXiv:2410.10254 (LoLCATs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

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

GATE = math.log(0.1 / 0.9)
"""γ = 0.1 at first."""


@dataclass(frozen=True, eq=False)
class HybridAttention(LearnedAttention):
    """Attention → softmax near, a kernel far; see the module.

    Attributes:
        window: w.
        feature_map: φ.
        terraced: windows end at blocks of w.
    """

    claim = ARCHITECTURE("beyond the window, features of queries and keys stand for the exponential of their scores")
    paper = "arXiv:2410.10254"
    window: int = 64
    feature_map: FeatureMap = field(default_factory=Hedgehog)
    terraced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        least(self, window=1)

    def check(self, site: AttentionSite) -> None:
        super().check(site)
        require(site.causal, "it is not causal: a window and what came before it is for causal attention")

    def initial(self, given: Heads, draw: torch.Generator) -> dict[str, Tensor]:
        return {**map_weights(self.feature_map, given, draw), "gate": torch.full((given.heads,), GATE)}

    def trains(self, name: str) -> bool:
        return name == "gate" or self.feature_map.trains

    @property
    def measured(self) -> bool:
        return self.feature_map.measured

    def core(self, op: Ops, site: AttentionSite, weights: Mapping[str, Operand]) -> Operand:
        f = mapped(op, self.feature_map, site.query, "query", weights)
        h = mapped(op, self.feature_map, keys_for_queries(op, site), "key", weights)
        heads = (site.query, site.key, site.value, f, h, weights["gate"])
        return op.hybrid_attention(*heads, self.window, self.terraced, kept(op, site), site.scale)

    def flops(self, site: AttentionSite, n: int) -> float:
        f, e, w = self.feature_map.count(site.width), int(shape(site.value)[-1]), self.window * -(-32 // self.window)
        return n * (4.0 * w * (site.width + f + e) + 4.0 * f * e)
