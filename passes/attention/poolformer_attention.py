"""Let the mean of the neighbours, less the position itself, stand for attention.

    softmax(q kᵀ) v  →  mean over p × p neighbours of v - v              on a grid of patches; over p positions in a line

No parameters, p² n d operations instead of 4 n² d; q and k go unread. The mean is over positions and the layers of v and of the
output are over channels, so they stand as they are: this is the mixer of PoolFormer behind one linear layer. Positions before the
grid (a class token, ``prefix``) have the whole grid for neighbours. Another architecture: the model must be trained.

arXiv:2111.11418 (PoolFormer).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod
from typing import Any, ClassVar

from tautomer.rewrite.attentions import AttentionSite, Masking
from tautomer.rewrite.claims import ARCHITECTURE
from tautomer.rewrite.emit import GraphOps
from tautomer.rewrite.errors import Refused, UsageError, require
from tautomer.rewrite.rules import shape
from tautomer.rewrite.shapes import static

from .learned_attention import for_queries, kept
from .untrained_attention import UntrainedAttention


@dataclass(frozen=True, eq=False)
class PoolformerAttention(UntrainedAttention):
    """Attention → mean of neighbours; see the module.

    Attributes:
        size: p, odd.
        grid: height and width in patches, row by row; None is the square that the positions make; () is a line, of any length,
            padded or not, and where attention is causal the last p positions.
        prefix: positions before the grid.
    """

    claim = ARCHITECTURE("the mean of neighbours stands for attention")
    paper = "arXiv:2111.11418"
    represents: ClassVar[Masking] = Masking.CAUSAL | Masking.PADDING
    size: int = 3
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or self.size % 2 == 0:
            raise UsageError(f"size={self.size}: neighbours have a middle", hint="an odd number")
        if (self.grid and (len(self.grid) != 2 or min(self.grid) < 1)) or (self.prefix and self.grid == ()) or self.prefix < 0:
            raise UsageError(
                f"grid={self.grid}, prefix={self.prefix}", hint="(height, width), None for a square, or () for a line"
            )

    def check(self, site: AttentionSite) -> None:
        super().check(site)
        if self.grid_of(site):
            padded = "some keys are padding, or it is causal, and a grid is seen whole: grid=() takes positions in a line"
            require(not site.masking, padded)

    def grid_of(self, site: AttentionSite) -> tuple[int, ...]:
        """
        Raises:
            Refused: its positions make no such grid.
        """
        if self.grid == ():
            return ()
        n = static(shape(site.query)[-2])
        unknown = "how many positions it has depends on the input, and how they lie in a grid is not known"
        require(n is not None, f"{unknown}: grid=() takes them in a line")
        patches = (n or 0) - self.prefix
        if self.grid is not None:
            require(
                prod(self.grid) == patches, f"its {n} positions are not {self.prefix} and {self.grid[0]} × {self.grid[1]} more"
            )
            return self.grid
        if patches < 1 or isqrt(patches) ** 2 != patches:
            raise Refused(f"its {n} positions are no square grid: {_advice(patches, self.prefix)}")
        return isqrt(patches), isqrt(patches)

    def emit(self, op: GraphOps, site: AttentionSite, fact: Any) -> Any:
        v = for_queries(op, site, site.value)
        return op.poolformer_attention(v, kept(op, site), self.size, list(self.grid_of(site)), self.prefix, site.causal)

    def flops(self, site: AttentionSite, n: int) -> float:
        return float(n * int(shape(site.value)[-1]) * (self.size if self.grid == () else self.size**2))


def _advice(patches: int, prefix: int) -> str:
    for extra in range(1, min(patches, 6)):
        side = isqrt(patches - extra)
        if side**2 == patches - extra:
            first = prefix + extra
            return f"{side} × {side} of them are, and prefix={first} says that the first {first} stand before it (a class token)"
    return "grid=(height, width) says how they lie, grid=() takes them in a line"
