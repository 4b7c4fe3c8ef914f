"""PoolFormer: an image's positions meet through the mean of their neighbours, less themselves.

    x ← x + s₁ ⊙ mixer(norm(x));   x ← x + s₂ ⊙ mlp(norm(x))          mixer(x) = mean over p × p neighbours - x

norm is GroupNorm with one group, mlp two linear layers per pixel with GELU between, s₁ and s₂ a number per channel, small first.
No parameters in the mixer, p² n d operations. arXiv:2111.11418.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.errors import UsageError


class PoolMixer(nn.Module):
    """The mean over the neighbours of a pixel, itself among them, less itself; what lies beyond the border does not count.

    Args:
        size: p, odd.

    Raises:
        UsageError: ``size`` is even.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise UsageError(f"size={size}: neighbours have a middle", hint="an odd number")
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``[batch, channels, height, width]``."""
        return F.avg_pool2d(x, self.size, 1, self.size // 2, count_include_pad=False) - x


class PoolFormerBlock(nn.Module):
    """The block; see the module.

    Args:
        width: channels.
        inner: channels within the mlp.
        size: as of ``PoolMixer``.
        scale: what s₁ and s₂ are at first.
    """

    def __init__(self, width: int, inner: int, size: int = 3, scale: float = 1e-5) -> None:
        super().__init__()
        self.mixer = PoolMixer(size)
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))
        self.up, self.down = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.scales = nn.Parameter(torch.full((2, width, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        """As of ``PoolMixer``."""
        x = x + self.scales[0] * self.mixer(self.norms[0](x))
        y: Tensor = self.down(F.gelu(self.up(self.norms[1](x))))
        return x + self.scales[1] * y
