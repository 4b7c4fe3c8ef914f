"""Let the positions of an attention see a fixed number of slots, each a learned combination of all keys.

    softmax(q kᵀ) v  →  softmax(q (Eᵀ k)ᵀ + log c) (Fᵀ v)          E, F: [longest, slots], parameters

8 n k d operations instead of 4 n² d with k slots, 2 k · longest parameters more. E and F begin as means over segments, c
positions in each: exact where keys and values are constant in segments, and far off elsewhere. They learn by attention transfer
what attention gave; the model must be trained on, and never sees more than ``longest`` positions.

arXiv:2006.04768 (Linformer), one E and one F for all heads of a layer.
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
from tautomer.rewrite.shapes import static

from .feature_maps import Heads
from .learned_attention import LearnedAttention, kept

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class LinformerAttention(LearnedAttention):
    """Attention → attention to slots; see the module.

    Attributes:
        slots: k.
        longest: the most positions there will ever be.
    """

    claim = ARCHITECTURE("a position sees combinations of keys that depend on where they stand")
    paper = "arXiv:2006.04768"
    represents: ClassVar[Masking] = Masking.PADDING
    stands: ClassVar[str] = "its slots are means of segments"
    slots: int = 64
    longest: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.slots <= self.longest:
            raise UsageError(f"{self.slots} slots for {self.longest} positions", hint="1 ≤ slots ≤ longest")

    def check(self, site: AttentionSite) -> None:
        super().check(site)
        n = static(shape(site.query)[-2])
        require(n is None or n <= self.longest, f"its {n} positions are more than the {self.longest} that E and F are made for")

    def initial(self, given: Heads, draw: torch.Generator) -> dict[str, Tensor]:
        segments = torch.arange(self.longest)[:, None] * self.slots // self.longest == torch.arange(self.slots)
        return {name: segments.float() for name in "EF"}

    def core(self, op: Ops, site: AttentionSite, weights: Mapping[str, Operand]) -> Operand:
        heads = (site.query, site.key, site.value, weights["E"], weights["F"])
        keep = kept(op, site)
        return op.linformer_attention(*heads, None if keep is None else op(aten.unsqueeze.default)(keep, -2), site.scale)

    def flops(self, site: AttentionSite, n: int) -> float:
        return 4.0 * n * self.slots * (site.width + int(shape(site.value)[-1]))
