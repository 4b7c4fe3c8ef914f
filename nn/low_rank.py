"""LowRankLinear: y = U (V x) + b.

arXiv:2407.09835 (Investigating Low-Rank Training in Transformer Language Models).
"""

from __future__ import annotations

from typing import Any

from tautomer.rewrite.structured import LowRank

from .structured import StructuredLinear


class LowRankLinear(StructuredLinear):
    """A linear layer of ``rank (in + out)`` parameters instead of ``in · out``; starts from the SVD of a Gaussian matrix.

    Args:
        rank: of the matrix. The rest is as of ``StructuredLinear``.

    State: ``V`` [rank, in], ``U`` [out, rank], ``bias``.

    Example:
        >>> LowRankLinear(8, 16, 4)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, LowRank(rank), bias, **options)
