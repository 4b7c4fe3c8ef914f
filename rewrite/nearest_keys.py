"""The last w keys and values, and attention to them from one position more: what a window must know of the past.

    ring:  position j stands at j mod w                y_p = softmax over { p - w < j ≤ p, or j < sinks } of the scores

In front of the ring stand the first positions (sinks), if there are any: w + sinks rows, however long the past is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def latest(x: Tensor, window: int, sinks: int = 0) -> Tensor:
    """The first ``sinks`` and the last ``window`` rows of ``[..., n, f]``, row j at sinks + j mod w; zero where there is none."""
    last, slot = x.shape[-2] - 1, torch.arange(window, device=x.device)
    rows = torch.cat((torch.arange(sinks, device=x.device), last - (last - slot) % window))
    found = x.index_select(-2, rows.clamp(0, last))
    return found.masked_fill(((rows < 0) | (rows > last)).unsqueeze(-1), 0.0)


def window_attention_state(key: Tensor, value: Tensor, window: int, sinks: int = 0) -> tuple[Tensor, Tensor]:
    """The keys and values that ``window_attention_step`` must know, of ``[batch, key_heads, n, ·]``."""
    return latest(key, window, sinks), latest(value, window, sinks)


def window_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: float | None,
    sinks: int = 0,
    aligned: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One position of a causal ``window_attention``, or ``aligned`` of a causal ``block_attention``, and what it leaves behind.

    Args:
        query: ``[batch, heads, 1, d]``; ``key`` and ``value`` of the same position, ``[batch, key_heads, 1, ·]``.
        keys: of the first positions and of the last w, ``[batch, key_heads, sinks + w, d]``, anything finite at first.
        values: as ``keys``.
        position: how many positions came before; a scalar, int64.
        scale: what scores are multiplied by, 1 / sqrt(d) if None.
        aligned: see the positions since the last multiple of w, not the last w.

    Returns:
        ``[batch, heads, 1, e]``, and the new keys and values.
    """
    slot = torch.arange(keys.shape[-2], device=keys.device)
    window = keys.shape[-2] - sinks
    front, ago = slot < sinks, (position - (slot - sinks)) % window
    here = torch.where(front, slot == position, ago == 0).unsqueeze(-1)
    keys, values = torch.where(here, key, keys), torch.where(here, value, values)
    # Those of the first positions that are in the ring too count once.
    first = position - position % window if aligned else sinks
    seen = torch.where(front, slot <= position, position - ago >= first)
    y = F.scaled_dot_product_attention(
        query, keys, values, seen.unsqueeze(0), scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
    )
    return y, keys, values
