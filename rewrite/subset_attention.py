"""Attention over a subset of the keys: what is left of softmax is softmax, over fewer scores.

    y_i = Σ_{j ∈ S(i)} exp(s_ij) v_j / Σ_{j ∈ S(i)} exp(s_ij)          s = scale q kᵀ

Bodies of semantic ops (library.py). q is ``[batch, heads, n, d]``; keys and values may have fewer heads, each of which serves as
many heads of the queries. A mask speaks of keys alone: boolean (True is kept) or added, broadcast to ``[batch, 1, 1, keys]``. A
query that sees no key at all gets a mean of values, so that it stays finite. Sizes may be symbols: nothing branches on them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int,
    sinks: int = 0,
    causal: bool = False,
    blocks: bool = True,
) -> Tensor:
    """Position i sees the positions j with |i - j| < window, of these only j ≤ i if causal, and the first ``sinks`` positions.

    In blocks of w queries against the 2w keys (causal) or 3w keys around them: O(n w). Without ``blocks`` all scores are
    computed, and the mask may be any that attention takes.
    """
    return (_window_of_blocks if blocks else _window_of_scores)(query, key, value, mask, scale, window, sinks, causal)


def _window_of_scores(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, window: int, sinks: int, causal: bool
) -> Tensor:
    rows = torch.arange(query.shape[2], device=query.device)[:, None]
    columns = torch.arange(key.shape[2], device=query.device)
    keep, bias = ((rows - columns).abs() < window) | (columns < sinks), None
    if causal:
        keep = keep & (columns <= rows)
    if mask is not None:
        keep, bias = masked(keep, mask)
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, visible(keep, bias, query.dtype), scale=scale, enable_gqa=shared)


def _window_of_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, window: int, sinks: int, causal: bool
) -> Tensor:
    batch, heads, n, _ = query.shape
    device, blocks = query.device, (n + window - 1) // window
    rows = torch.arange(blocks, device=device)[:, None] * window + torch.arange(window, device=device)
    columns = rows[:, :1] + torch.arange(-window, window if causal else 2 * window, device=device)
    away = rows[:, :, None] - columns[:, None]
    keep = (away.abs() < window) & (columns >= 0)[:, None]
    if sinks:
        first = torch.arange(sinks, device=device).expand(blocks, sinks)
        beyond = rows[:, :, None] - first[:, None]
        columns, away = torch.cat((first, columns), 1), torch.cat((beyond, away), 2)
        keep = torch.cat((beyond.abs() >= window, keep), 2)
    keep, bias = (keep & (columns < n)[:, None]).expand(batch, -1, -1, -1), None
    if causal:
        keep = keep & (away >= 0)
    rows, columns = rows.clamp(max=n - 1), columns.clamp(0, n - 1)
    if mask is not None:
        keep, bias = masked(keep, mask.expand(batch, 1, 1, n)[:, 0, 0, columns][:, :, None])
    seen = visible(keep, bias, query.dtype).flatten(0, 1).unsqueeze(1)
    # A block is a sequence of its own: [batch, h, n, d] → [batch · blocks, h, ·, d].
    q, k, v = (
        x.transpose(1, 2)[:, index].flatten(0, 1).transpose(1, 2)
        for x, index in ((query, rows), (key, columns), (value, columns))
    )
    y = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=heads != key.shape[1])
    return y.transpose(1, 2).unflatten(0, (batch, blocks)).flatten(1, 2)[:, :n].contiguous().transpose(1, 2)


def masked(keep: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """What ``keep`` and a mask of keys leave, and what that mask adds to it; -10⁴ and less masks."""
    if mask.dtype is torch.bool:
        return keep & mask, None
    return keep & (mask > -1e4), mask


def visible(keep: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A mask as attention takes it; a row of nothing but masked keys sees them all."""
    keep = keep | ~keep.any(-1, keepdim=True)
    return keep if bias is None else torch.where(keep, bias.to(dtype), -math.inf)
