"""Softmax over a window of the nearest keys, and a kernel for the rest, in one denominator.

    y_i = (Σ_{j near i} a_ij v_j + Σ_{j far} b_ij v_j) / (Σ_{j near i} a_ij + Σ_{j far} b_ij)

    a_ij = γ exp(s q_i·k_j - max_near)     b_ij = φ(q_i)·φ(k_j)        γ = sigmoid(gate), a number per head

Both are causal. Near are the last w keys, the query's own included, or ("terraced") its own block of w and the one before.
With w ≥ n it is softmax attention, whatever γ and φ are. Work and memory are O(n (w + f)).

arXiv:2410.10254 (LoLCATs).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernel_attention import divided, from_chunks, in_chunks, in_turn, kept_at, pieces, served, shifted, side_by_side, widened
from .nearest_keys import latest


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gate: Tensor,
    window: int,
    terraced: bool = False,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax near, a kernel far; see the module.

    Args:
        query: ``[batch, heads, n, d]``.
        key: ``[batch, key_heads, n, d]``; each head serves ``heads / key_heads`` heads of the queries.
        value: ``[batch, key_heads, n, e]``.
        query_features: φ(q), ``[batch, heads, n, f]``.
        key_features: φ(k), ``[batch, heads or key_heads, n, f]``.
        gate: ``[heads]``.
        window: w.
        keep: True where a key counts, broadcast to ``[batch, key_heads, n]``.
        scale: s, by default 1 / sqrt(d).

    Returns:
        ``[batch, heads, n, e]``.
    """
    heads, n, width = query.shape[-3:]
    window = max(1, min(window, n)) if isinstance(n, int) else window
    if in_turn(query):
        return blocks_in_turn(query, key, value, query_features, key_features, gate, window, terraced, keep, scale)
    q, k, v = widened(query, key, value, keep, True)
    f, h, _ = widened(query_features, key_features, value, keep, False)
    real = torch.ones_like(v[..., :1]) if keep is None else served(keep.unsqueeze(-1).to(q.dtype), heads)
    block = window * -(-32 // window)  # small windows share a block
    q, k, v, f, h, real = (in_chunks(x, block) for x in (q, k, v, f, h, real))
    before = shifted((h.mT @ v).cumsum(-3), 2)
    k, v, h, real = (torch.cat((shifted(x, 1), x), -2) for x in (k, v, h, real))
    i, j = torch.arange(block, 2 * block, device=q.device)[:, None], torch.arange(2 * block, device=q.device)
    near = (j <= i) & (i // window - j // window <= 1 if terraced else i - j < window)
    scores = (q @ k.mT * (width**-0.5 if scale is None else scale)).masked_fill(~(near & (real.mT > 0)), -torch.inf)
    a = (scores - top_of(scores)).exp() * torch.sigmoid(gate.to(q.dtype))[:, None, None, None]
    b = (f @ h.mT).masked_fill(near | (j > i), 0.0)
    return side_by_side(divided(from_chunks((a + b) @ v + f @ before, n), True).to(value.dtype))


def blocks_in_turn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gate: Tensor,
    window: int,
    terraced: bool,
    keep: Tensor | None,
    scale: float | None,
) -> Tensor:
    """``hybrid_attention``, one block of queries after the other; each sees its own block and the one before."""
    block, scale = window * -(-32 // window), query.shape[-1] ** -0.5 if scale is None else scale
    gamma = F.logsigmoid(gate.to(torch.promote_types(query.dtype, torch.float32)))[:, None, None]
    state, rows = torch.zeros(()), list[Tensor]()
    for at in pieces(query.shape[-2], block):
        first = max(0, at.start - block)
        both = slice(first, at.stop)
        now = kept_at(keep, both)
        q, k, v = widened(query[..., at, :], key[..., both, :], value[..., both, :], now, True)
        f, h, _ = widened(query_features[..., at, :], key_features[..., both, :], value[..., both, :], now, False)
        i, j = torch.arange(at.start, at.stop)[:, None], torch.arange(first, at.stop)
        seen = near = (j <= i) & (i // window - j // window <= 1 if terraced else i - j < window)
        if now is not None:
            seen = near & served(now.unsqueeze(-1), query.shape[-3]).mT
        scores = (q * scale @ k.mT).masked_fill(~seen, -torch.inf)
        a = (scores - (top_of(scores) - gamma)).exp()
        y = torch.where(near | (j > i), a, f @ h.mT) @ v
        rows.append(divided(y + f @ state if at.start > block else y, True).to(value.dtype).transpose(1, 2))
        gone = at.start - first
        state = state + h[..., :gone, :].mT @ v[..., :gone, :]
    return torch.cat(rows, 1).transpose(1, 2)


def hybrid_attention_state(
    query: Tensor, key: Tensor, value: Tensor, key_features: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``hybrid_attention_step`` goes on from behind the last position: state, keys, values and features.

    Args: as of ``hybrid_attention``.
    """
    n = key.shape[-2]
    _, h, v = widened(query, key_features, value, torch.arange(n, device=key.device) < n - window, True)
    return h.mT @ v, latest(key, window), latest(value, window), latest(key_features, window)


def hybrid_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gate: Tensor,
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    features: Tensor,
    position: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One position of ``hybrid_attention`` with a sliding window, and what it leaves behind: constant work and memory.

    Args:
        query: ``[batch, heads, 1, d]``; the others as of ``hybrid_attention``, of one position.
        state: Σ φ(k_j)ᵀ (v_j, 1) of the keys that left the window: ``[batch, heads, f, e + 1]``, in float32 at least, zero at
            first.
        keys: the last w keys, position j at j mod w: ``[batch, key_heads, w, d]``, anything finite at first.
        values: as ``keys``, ``[batch, key_heads, w, e]``.
        features: as ``keys``, φ(k), ``[batch, heads or key_heads, w, f]``, zero at first.
        position: how many positions came before; a scalar, int64.

    Returns:
        ``[batch, heads, 1, e]``, and the new state, keys, values and features.
    """
    window, width = keys.shape[-2], query.shape[-1]
    slot = torch.arange(window, device=keys.device)
    here = (slot == position % window).unsqueeze(-1)
    _, left, leaving = widened(query, features, values, here.squeeze(-1), True)
    state = state + left.mT @ leaving
    keys, values, features = (torch.where(here, x, y) for x, y in ((key, keys), (value, values), (key_features, features)))
    q, k, v = widened(query, keys, values, None, True)
    scores = (q @ k.mT * (width**-0.5 if scale is None else scale)).masked_fill(slot > position, -torch.inf)
    a = (scores - top_of(scores)).exp() * torch.sigmoid(gate.to(q.dtype))[:, None, None]
    y = divided(a @ v + query_features.to(q.dtype) @ state, True).to(value.dtype)
    return y, state, keys, values, features


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    causal: bool = False,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention within consecutive blocks of positions.

    Args: as of ``hybrid_attention``; ``block`` positions make a block, the last may be shorter.
    """
    heads, n, width = query.shape[-3:]
    q, k, v = widened(query, key, value, keep, True)
    real = torch.ones_like(v[..., :1]) if keep is None else served(keep.unsqueeze(-1).to(q.dtype), heads)
    q, k, v, real = (in_chunks(x, block) for x in (q, k, v, real))
    seen = real.mT > 0
    if causal:
        seen = seen & torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT * (width**-0.5 if scale is None else scale)).masked_fill(~seen, -torch.inf)
    y = from_chunks((scores - top_of(scores)).exp() @ v, n)
    return side_by_side(divided(y, True).to(value.dtype))


def top_of(scores: Tensor) -> Tensor:
    """The largest score of each row; finite where there is none."""
    return scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
