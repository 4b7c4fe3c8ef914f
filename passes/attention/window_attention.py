"""Let every position of an attention see the keys near it and the first ones, and no others.

    softmax over j: i - w < j ≤ i, or j < sinks          |i - j| < w where the future is seen

With at most w positions this is the attention itself. In blocks, n positions cost 4 n · 2w d operations (3w where the future is
seen) instead of 4 n² d. As a mask (``WindowMask``) the window costs what attention did, and any other mask stays beside it.

The first tokens carry much of the weight in trained decoders: arXiv:2309.17453 (attention sinks). The window: arXiv:2004.05150.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tautomer.rewrite.attentions import AttentionSite, Masking
from tautomer.rewrite.claims import APPROXIMATE
from tautomer.rewrite.emit import GraphOps
from tautomer.rewrite.errors import require
from tautomer.rewrite.options import least
from tautomer.rewrite.program import arguments
from tautomer.rewrite.rules import shape
from tautomer.rewrite.shapes import static

from .substitute_attention import SubstituteAttention


@dataclass(frozen=True, eq=False)
class WindowAttention(SubstituteAttention):
    """Attention → attention within a window; see the module.

    Attributes:
        window: how many positions one sees up to its own, w.
        sinks: how many positions at the front all see.
    """

    claim = APPROXIMATE("keys outside of the window weigh nothing")
    paper = "arXiv:2004.05150, arXiv:2309.17453"
    represents: ClassVar[Masking] = Masking.CAUSAL | Masking.PADDING | Masking.NUMBERS
    window: int = 256
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        least(self, window=1, sinks=0)

    def check(self, site: AttentionSite) -> None:
        super().check(site)
        n = static(shape(site.query)[-2])
        require(n is None or n > self.window, f"its {n} positions are within the window of {self.window}: nothing would change")
        left, right = site.band.left, site.band.right
        inside = left is not None and left < self.window and (right == 0 or (right is not None and right < self.window))
        require(not inside, f"its mask is {site.band} already, within the window of {self.window}")

    def emit(self, op: GraphOps, site: AttentionSite, fact: Any) -> Any:
        heads = (site.query, site.key, site.value)
        return op.window_attention(*heads, site.keys_kept(op), site.scale, self.window, self.sinks, site.causal)

    def flops(self, site: AttentionSite, n: int) -> float:
        keys = (2 if site.causal else 3) * self.window + self.sinks
        return 2.0 * n * keys * (site.width + int(shape(site.value)[-1]))


@dataclass(frozen=True, eq=False)
class WindowMask(WindowAttention):
    """The same as a mask: nothing is saved, whatever else the mask holds stays."""

    represents: ClassVar[Masking] = ~Masking(0)

    def emit(self, op: GraphOps, site: AttentionSite, fact: Any) -> Any:
        given = arguments(site.node)
        seen = (given["attn_mask"], site.scale, self.window, self.sinks, given["is_causal"])
        return op.window_attention(site.query, site.key, site.value, *seen, blocks=False)

    def flops(self, site: AttentionSite, n: int) -> float:
        return 2.0 * n * n * (site.width + int(shape(site.value)[-1]))
