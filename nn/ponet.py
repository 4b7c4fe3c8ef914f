"""PoNet: tokens meet through pooling of three kinds, of the whole sequence, of a segment, of the neighbours.

    y = (g' + S') ⊙ O + L'                 Q, K, O, S, L: five linear layers of x

g' is one attention of the mean of Q to K, whose values are K; S' the maximum of S over a segment, L' that of L over three
positions. O(n d²) operations, for models that will be trained; no causal form. arXiv:2110.02442. There the length of a segment is
n // segments + 1, with n counting padding; here positions that count are cut evenly, so that padding changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import tautomer


class PoNet(nn.Module):
    """One layer of it; see the module.

    Args:
        width: channels.
        heads: of the attention of the mean; ``width`` divided by them is d.
        segments: how many there are.
        window: positions that are neighbours, odd.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(self, width: int, heads: int, segments: int = 8, window: int = 3) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UsageError(f"{width} channels cannot be shared by {heads} heads")
        if segments < 1 or window < 1 or window % 2 == 0:
            raise UsageError(f"segments={segments}, window={window}", hint="one segment at least, and a window that has a middle")
        self.heads, self.segments, self.window = heads, segments, window
        self.query, self.key, self.gate, self.segment, self.local = (nn.Linear(width, width) for _ in range(5))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Mix ``[batch, n, width]``; ``keep`` is ``[batch, n]``, True where a position counts. The others become 0."""
        layers = (self.query, self.key, self.gate, self.segment, self.local)
        heads = (torch.unflatten(layer(x), -1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        kept = None if keep is None else keep.unsqueeze(1)
        y: Tensor = tautomer.ponet_attention.v1(*heads, kept, self.segments, self.window)
        return y.transpose(1, 2).flatten(2)
