"""BlockShuffleLinear (Monarch): y = P2 blkdiag(B2) P1 blkdiag(B1) x + b.

arXiv:2204.00595 (Monarch: Expressive Structured Matrices for Efficient and Accurate Training), as arXiv:2406.16450 uses it.
"""

from __future__ import annotations

from typing import Any

from tautomer.rewrite.structured import BlockShuffle

from .structured import StructuredLinear


class BlockShuffleLinear(StructuredLinear):
    """A linear layer of ``min(in, out) (in + out) / blocks`` parameters: two block diagonal factors with a shuffle behind each.

    Args:
        blocks: how many; they divide the inputs and the outputs. The rest is as of ``StructuredLinear``.

    State: ``B1`` [blocks, s / blocks, in / blocks], ``B2`` [blocks, out / blocks, s / blocks], s = min(in, out), ``bias``.

    Example:
        >>> BlockShuffleLinear(8, 16, 4)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    def __init__(self, in_features: int, out_features: int, blocks: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, BlockShuffle(blocks), bias, **options)
