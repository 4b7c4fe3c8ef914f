"""Let the positions of an attention that sees everything meet through landmarks.

    softmax(q kᵀ) v  →  softmax(q k̃ᵀ) A⁺ softmax(q̃ kᵀ) v          A = softmax(q̃ k̃ᵀ), q̃ and k̃: means of m segments

8 n m d operations and 48 m³ for the six steps that stand for A⁺, instead of 4 n² d. At most m positions attend as they are. Good
where attention is spread (images), poor where it is sharp (text): measure.

arXiv:2102.03902 (Nyströmformer), with the norm of A per head instead of over the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tautomer.rewrite.attentions import AttentionSite, Masking
from tautomer.rewrite.claims import APPROXIMATE
from tautomer.rewrite.emit import GraphOps
from tautomer.rewrite.errors import require
from tautomer.rewrite.options import least
from tautomer.rewrite.rules import shape
from tautomer.rewrite.shapes import static

from .substitute_attention import SubstituteAttention


@dataclass(frozen=True, eq=False)
class NystromAttention(SubstituteAttention):
    """Attention → attention through landmarks; see the module.

    Attributes:
        landmarks: m.
        iterations: the steps that stand for A⁺; more are not better.
    """

    claim = APPROXIMATE("the weights are a product of rank m, and some may be negative")
    paper = "arXiv:2102.03902"
    represents: ClassVar[Masking] = Masking.PADDING | Masking.NUMBERS
    landmarks: int = 64
    iterations: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        least(self, landmarks=1, iterations=1)

    def check(self, site: AttentionSite) -> None:
        super().check(site)
        n = static(shape(site.query)[-2])
        require(n is None or n > self.landmarks, f"its {n} positions are no more than {self.landmarks} landmarks")

    def emit(self, op: GraphOps, site: AttentionSite, fact: Any) -> Any:
        heads = (site.query, site.key, site.value)
        return op.nystrom_attention(*heads, site.keys_kept(op), site.scale, self.landmarks, self.iterations)

    def flops(self, site: AttentionSite, n: int) -> float:
        m, widths = self.landmarks, site.width + int(shape(site.value)[-1])
        return 4.0 * n * m * widths + 8 * m**3 * self.iterations
