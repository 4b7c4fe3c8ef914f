"""Pooling in the place of attention: positions meet through means and maxima, of all, of their segment, of their neighbours.

Bodies of semantic ops (library.py). Positions that do not count change nothing, and neither does how many of them there are.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def ponet_attention(
    query: Tensor, key: Tensor, gate: Tensor, segment: Tensor, local: Tensor, keep: Tensor | None, segments: int, window: int = 3
) -> Tensor:
    """(g' + S') ⊙ O + L': one attention of the mean query, maxima over segments, maxima over neighbours. arXiv:2110.02442

        g = mean_i q_i,  a = softmax_j(g·k_j / √d),  g' = Σ_j a_j k_j        per head
        S'_i = max of S over the segment of i          the r-th of m that count is of segment ⌊r segments / m⌋
        L'_i = max of L over the ``window`` positions around i

    Args:
        query, key, gate, segment, local: ``[batch, heads, n, d]``; gate is O, segment S, local L.
        keep: broadcast to ``[batch, heads, n]``, True where a position counts; the others are 0 in the result.
        window: odd.
    """
    batch, heads, n, d = query.shape
    kind = torch.promote_types(query.dtype, torch.float32)
    low = torch.finfo(kind).min
    q, k, o, s, x = (y.to(kind) for y in (query, key, gate, segment, local))
    kept = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device) if keep is None else keep
    kept = kept.expand(batch, 1, n)
    away, count = ~kept.unsqueeze(-1), kept.sum(-1, keepdim=True).clamp(min=1)
    g = q.masked_fill(away, 0.0).sum(-2, keepdim=True) / count.unsqueeze(-1)
    a = (g @ k.mT * d**-0.5).masked_fill(away.mT, low).softmax(-1)
    at = (kept.cumsum(-1) - 1).clamp(min=0) * segments // count
    index = at.unsqueeze(-1).expand(batch, heads, n, d)
    tops = torch.full((batch, heads, segments, d), low, dtype=kind, device=query.device)
    tops = tops.scatter_reduce(2, index, s.masked_fill(away, low), "amax")
    around = F.pad(x.masked_fill(away, low), (0, 0, window // 2, window // 2), value=low)
    near = torch.stack([around[:, :, i : i + n] for i in range(window)]).amax(0)
    y = ((a @ k + tops.gather(2, index)) * o + near).masked_fill(away, 0.0)
    return y.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def poolformer_attention(
    value: Tensor, keep: Tensor | None, size: int = 3, grid: Sequence[int] = (), prefix: int = 0, causal: bool = False
) -> Tensor:
    """The mean over the neighbours of a position, itself among them, less itself. arXiv:2111.11418

    Args:
        value: ``[batch, heads, n, e]``.
        keep: as of ``ponet_attention``; not with a grid.
        size: neighbours along an axis, odd. What lies beyond the ends does not count.
        grid: height and width, row by row; () is a line.
        prefix: positions before the grid, each of which has the whole grid for neighbours.
        causal: in a line, the last ``size`` positions.
    """
    batch, heads, n, e = value.shape
    x = value.to(torch.promote_types(value.dtype, torch.float32))
    if grid:
        image = x[:, :, prefix:].transpose(-1, -2).reshape(-1, e, grid[0], grid[1])
        mean = F.avg_pool2d(image, size, 1, size // 2, count_include_pad=False).reshape(batch, heads, e, -1).transpose(-1, -2)
        whole = x[:, :, prefix:].mean(-2, keepdim=True).expand(batch, heads, prefix, e)
        y = torch.cat((whole, mean), -2) - x
    else:
        kept = torch.ones(1, 1, 1, dtype=torch.bool, device=value.device) if keep is None else keep
        kept = kept.expand(batch, 1, n).unsqueeze(-1)
        before, after = (size - 1, 0) if causal else (size // 2, size // 2)
        both = torch.cat((x.masked_fill(~kept, 0.0), kept.to(x.dtype).expand(batch, heads, n, 1)), -1)
        around = F.pad(both, (0, 0, before, after))
        total = torch.stack([around[:, :, i : i + n] for i in range(size)]).sum(0)
        y = (total[..., :e] / total[..., e:].clamp(min=1) - x).masked_fill(~kept, 0.0)
    return y.to(value.dtype).transpose(1, 2).contiguous().transpose(1, 2)
