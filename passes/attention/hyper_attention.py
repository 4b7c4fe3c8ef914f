"""Let every position of an attention see the keys that hash like it, and a sample that stands for the rest.

    Σ_j exp(s_ij) v_j  ≈  Σ_{j in the block} exp(s_ij) v_j + n/m Σ_{j in the sample, not in the block} exp(s_ij) v_j

Keys are sorted by the signs of r random projections and cut into blocks of b; m keys are drawn for each head.
Causal attention is exact within leaves; above them the second of two neighbouring pieces sees the first in this way, and so on
with pieces twice as large. 4 n (b + m) d operations, times log₂(n / leaf) / 2 if causal, instead of 4 n² d.

arXiv:2310.05869 (HyperAttention). Different from its code: a query sees the block of keys that its hash falls into, whatever
other queries hash to, or positions would learn from the future which keys they see; hashes are ranked by the inverse Gray code,
so that neighbours differ in one sign; a key of the block is not counted again in the sample; padding is in no block and no
sample; the random numbers are constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tautomer.rewrite.attentions import AttentionSite, Masking
from tautomer.rewrite.claims import APPROXIMATE
from tautomer.rewrite.emit import GraphOps
from tautomer.rewrite.errors import UsageError, require
from tautomer.rewrite.options import least
from tautomer.rewrite.rules import dtype, shape
from tautomer.rewrite.shapes import static

from .substitute_attention import SubstituteAttention, weight_name

MOST_PLANES = 16
"""Keys are counted by their hash."""


@dataclass(frozen=True, eq=False)
class HyperAttention(SubstituteAttention):
    """Attention → attention within hashed blocks and to a sample; see the module.

    Attributes:
        block: b.
        samples: m.
        leaf: how many positions see each other exactly, if causal.
        planes: r.
        longest: the most positions a causal model sees once its graph is compiled or exported with free sizes; those beyond
            become nan. Run as it is, it takes any number.
        seed: of the random numbers.
    """

    claim = APPROXIMATE("keys that do not hash like a query count through a sample alone")
    paper = "arXiv:2310.05869"
    represents: ClassVar[Masking] = Masking.CAUSAL | Masking.PADDING | Masking.NUMBERS
    block: int = 256
    samples: int = 256
    leaf: int = 512
    planes: int = 7
    longest: int = 32768
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        least(self, block=1, samples=1, leaf=1, planes=1, longest=1)
        if self.planes > MOST_PLANES:
            raise UsageError(f"{self.name}: {self.planes} planes make 2^{self.planes} hashes", hint=f"at most {MOST_PLANES}")

    def check(self, site: AttentionSite) -> None:
        super().check(site)
        n, exact = static(shape(site.query)[-2]), self.leaf if site.causal else self.block
        require(n is None or n > exact, f"its {n} positions are one leaf: nothing would change")

    def emit(self, op: GraphOps, site: AttentionSite, fact: Any) -> Any:
        random = torch.Generator().manual_seed(self.seed)
        planes = torch.randn(site.width, self.planes, generator=random).to(dtype(site.query))
        draws = torch.randint(2**40, (site.heads, self.samples), generator=random)
        new = [op.tensor(weight_name(site, name), x, site.query) for name, x in (("planes", planes), ("draws", draws))]
        sizes = (self.block, self.leaf, self.longest, site.causal)
        return op.hyper_attention(site.query, site.key, site.value, *new, site.keys_kept(op), site.scale, *sizes)

    def flops(self, site: AttentionSite, n: int) -> float:
        widths = site.width + int(shape(site.value)[-1])
        per_position = 2.0 * (min(self.block, n) + self.samples) * widths + 4 * site.width * self.planes
        if not site.causal:
            return n * per_position
        levels = max(0, ((n - 1) // self.leaf).bit_length())
        return n * (2.0 * min(self.leaf, n) * widths + levels * per_position / 2)
