"""BlockDenseLinear: y = U blkdiag(V) x + b.

arXiv:2406.16450 (Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers).
"""

from __future__ import annotations

from typing import Any

from tautomer.rewrite.structured import BlockDense

from .structured import StructuredLinear


class BlockDenseLinear(StructuredLinear):
    """A linear layer of ``rank (in / blocks + out)`` parameters: the first factor of a low rank layer is block diagonal.

    Args:
        blocks: how many; they divide the inputs and the rank.
        rank: the width of the middle. The rest is as of ``StructuredLinear``.

    State: ``V`` [blocks, rank / blocks, in / blocks], ``U`` [out, rank], ``bias``.

    Example:
        >>> BlockDenseLinear(8, 16, 2, 6)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    def __init__(self, in_features: int, out_features: int, blocks: int, rank: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, BlockDense(blocks, rank), bias, **options)
