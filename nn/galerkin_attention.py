"""Attention without softmax, for models that learn operators between functions: two products, a norm on two of the three factors.

    Fourier:   y = (norm(q) norm(k)ᵀ) v / n          Galerkin:   y = q (norm(k)ᵀ norm(v)) / n

norm is LayerNorm over the channels of a head, with a gain and a shift per head. Both are computed as q (kᵀ v), 4 n d² operations
per head. n counts the positions that are kept. arXiv:2105.14995.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer

Kind = Literal["fourier", "galerkin"]


class GalerkinAttention(nn.Module):
    """One layer of it; see the module.

    Args:
        width: channels of the input.
        heads: ``width`` divided by them is d.
        kind: "fourier" or "galerkin".
        positions: how many coordinates of a position stand beside the channels of every head; an output layer then brings
            ``width + heads * positions`` channels back to ``width``.
        gain, diagonal: projections start as ``gain`` times a Xavier draw, plus ``diagonal`` times the identity.
        eps: of the norms.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self, width: int, heads: int, kind: Kind = "galerkin", *, positions: int = 0, gain: float = 1e-2, diagonal: float = 1e-2,
        eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in ("fourier", "galerkin"):
            raise UsageError(f"there is no kind {kind!r}", hint="'fourier' or 'galerkin'")
        if heads < 1 or width % heads:
            raise UsageError(f"{width} channels cannot be shared by {heads} heads")
        self.heads, self.kind, self.eps = heads, kind, eps
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            for layer in (self.query, self.key, self.value):
                nn.init.xavier_uniform_(layer.weight, gain)
                layer.weight += diagonal * torch.eye(width)
                nn.init.zeros_(layer.bias)
        self.gains = nn.Parameter(torch.ones(2, heads, 1, width // heads))
        self.shifts = nn.Parameter(torch.zeros(2, heads, 1, width // heads))
        self.out = nn.Linear(width + heads * positions, width) if positions else nn.Identity()

    def forward(self, x: Tensor, positions: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``[batch, n, width]``.
            positions: ``[batch, n, positions]``, if the layer was made for some.
            keep: ``[batch, n]``, True where a position counts.
        """
        layers = (self.query, self.key, self.value)
        q, k, v = (torch.unflatten(layer(x), -1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        if self.kind == "fourier":
            q, k = self.normed(q, 0), self.normed(k, 1)
        else:
            k, v = self.normed(k, 0), self.normed(v, 1)
        if positions is not None:
            p = positions.unsqueeze(1).expand(-1, self.heads, -1, -1)
            q, k, v = (torch.cat((p, y), -1) for y in (q, k, v))
        y = tautomer.kernel_attention.v1(q, k, v, None, None if keep is None else keep.unsqueeze(1), False, False)
        n = x.shape[1] if keep is None else keep.sum(-1).clamp_min(1)[:, None, None, None]
        out: Tensor = self.out((y / n).transpose(1, 2).flatten(2))
        return out

    def normed(self, x: Tensor, which: int) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.gains[which] + self.shifts[which]
