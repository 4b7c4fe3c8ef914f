"""A model as people write it by hand: norm, attention and activation spelled out between submodules."""

from __future__ import annotations

import math

import torch
from torch import nn

X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Attention(nn.Module):
    """As vision models write it: one projection, split by a permutation; an option that most callers leave alone."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(dropout)

    def forward(self, x, mask=None, *, weights=False):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(width // 2)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -math.inf)
        shares = self.drop(scores.softmax(-1))
        y = self.proj((shares @ v).transpose(1, 2).reshape(batch, length, width))
        return (y, shares) if weights else (y, None)


class Block(nn.Module):
    """A norm and an activation that are written out between submodules."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gain, self.attn = nn.Parameter(torch.rand(8) + 0.5), Attention(dropout)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, mask=None):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        x = x + self.attn(h, mask)[0]
        h = self.up(x)
        return x + self.down(0.5 * h * (1 + torch.erf(h / math.sqrt(2))))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(dropout), Block(dropout)]), nn.Linear(8, 3)

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


RAISED = ["raise-attention", "raise-gelu", "raise-rms-norm", "merge-permutes", "absorb-attention-scale"]


def net(dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout).double().eval()


def residual_stream() -> nn.Module:
    """Two such blocks, and a LayerNorm that reads what they write."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.LayerNorm(8), nn.Linear(8, 3)).double().eval()
