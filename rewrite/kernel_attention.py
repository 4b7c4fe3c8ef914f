"""Attention by a kernel: features q_i·k_j stand where softmax has exp(q_i·k_j). One mathematics, three forms.

    y_i = Σ_{j≤i} w_ij (q_i·k_j) v_j / Σ_{j≤i} w_ij (q_i·k_j)        w_ij = exp(g_{j+1} + … + g_i)

quadratic:  ((Q Kᵀ) ⊙ W) V. Recurrent: S_t = exp(g_t) S_{t-1} + k_tᵀ v_t, y_t = q_t S_t, constant work per token. Chunked: the
first within a chunk and the second from chunk to chunk, O(n). g is nothing, a number per step (Lightning, RetNet), or one per
step and channel (gated linear attention). The denominator is the same sum over a column of ones beside v. Without causality,
Q (Kᵀ V).

On a CPU chunks are taken one after the other, so that nothing but the result is as long as the sequence: a chunk stays in the
cache. In a graph, and where chunks should run side by side, there is no loop: the states before all chunks are a cumulative
sum; where they decay, they are a kernel attention again, of ones over the chunks. What counts rows gathers them if their number
is a symbol, so that no size is ever compared. States and denominators are in float32 at least.

arXiv:2006.16236 (linear attention), arXiv:2401.04658 (Lightning), arXiv:2312.06635 (gated linear attention).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._fla import fused, fused_sum


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    keep: Tensor | None = None,
    causal: bool = False,
    normalized: bool = True,
    chunk: int = 64,
) -> Tensor:
    """Σ_j w_ij (q_i·k_j) v_j, divided by Σ_j w_ij (q_i·k_j) if it is normalised.

    Args:
        query: features ``[batch, heads, t, f]``.
        key: features ``[batch, key_heads, s, f]``; each head serves ``heads / key_heads`` heads of the queries.
        value: ``[batch, value_heads, s, e]``.
        log_decay: g, broadcast to ``[batch, heads, t, 1]`` (a number per step) or ``[batch, heads, t, f]`` (per channel too).
        keep: True where a key counts, broadcast to ``[batch, key_heads, s]``.
        causal: position i sees the positions j ≤ i; a decay needs it.
        chunk: positions to a chunk; with as many as there are positions the form is quadratic.

    Returns:
        ``[batch, heads, t, e]``, heads side by side in memory, as attention returns it; zero where nothing counts.
    """
    if log_decay is not None and not causal:
        raise ValueError("a decay is from one position to a later one: it needs causal=True")
    g = None
    if log_decay is not None:
        g = served(log_decay.to(torch.promote_types(query.dtype, torch.float32)), query.shape[-3])
        g = g.expand(*g.shape[:-2], query.shape[-2], g.shape[-1])
    if causal and in_turn(query):
        return one_by_one(query, key, value, g, keep, normalized, chunk)
    q, k, v = widened(query, key, value, keep, normalized)
    if causal and fused(query):
        y = fused_sum(q.to(query.dtype), k.to(query.dtype), v.to(query.dtype), g).to(q.dtype)
    else:
        y = causal_sum(q, k, v, g, chunk) if causal else q @ (k.mT @ v)
    return side_by_side(divided(y, normalized).to(value.dtype))


MILD = 32.0
"""A decay over a chunk, as a logarithm, whose inverse is a number in single precision, like its products with all others."""


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor | None, keep: Tensor | None, normalized: bool, chunk: int
) -> Tensor:
    """A causal ``kernel_attention``, one chunk after the other."""
    state, rows = torch.zeros(()), list[Tensor]()
    for at in pieces(query.shape[-2], chunk):
        q, k, v = widened(query[..., at, :], key[..., at, :], value[..., at, :], kept_at(keep, at), normalized)
        G = None if g is None else g[..., at, :].cumsum(-2)
        f = q if G is None else q * G.exp()
        if G is None or G.shape[-1] == 1 or bool(G.amin() < -MILD):
            y = weighted(q, k, G) @ v
        else:  # exp(G_i - G_j) apart: its parts are far from overflow
            y = (f @ (k * (-G).exp()).mT).tril() @ v
        if rows:
            y = y + f @ state
        if at.stop < query.shape[-2]:
            state = behind(k, v, G, state)
        rows.append(divided(y, normalized).to(value.dtype).transpose(1, 2))
    return torch.cat(rows, 1).transpose(1, 2)


def behind(k: Tensor, v: Tensor, G: Tensor | None, state: Tensor) -> Tensor:
    """The state behind the last of these positions, of that before the first; G is the decay summed up to each."""
    if G is None:
        return state + k.mT @ v
    whole = G[..., -1:, :]
    return whole.mT.exp() * state + (k * (whole - G).exp()).mT @ v


def kernel_attention_state(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None, normalized: bool = True
) -> Tensor:
    """The state behind the last position of a causal ``kernel_attention``, which ``kernel_attention_step`` goes on from.

    Args: as of ``kernel_attention``.

    Returns:
        ``[batch, heads, f, e]``, with one more column if it is normalised.
    """
    q, k, v = widened(query, key, value, None, normalized)
    if log_decay is None:
        return k.mT @ v
    g = served(log_decay.to(q.dtype), q.shape[-3])
    return behind(k, v, g.expand(*g.shape[:-2], q.shape[-2], g.shape[-1]).cumsum(-2), torch.zeros((), device=q.device))


def kernel_attention_step(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor | None = None, normalized: bool = True
) -> tuple[Tensor, Tensor]:
    """One position of a causal ``kernel_attention``, and the state behind it.

    Args:
        query: ``[batch, heads, 1, f]``; ``key`` and ``value`` as of ``kernel_attention``, of one position.
        state: Σ w k_jᵀ v_j of the positions before, ``[batch, heads, f, e]``, in float32 at least, zero at first; normalised, it
            has one more column, Σ w k_j.
        log_decay: broadcast to ``[batch, heads, 1, 1]`` or ``[batch, heads, 1, f]``.

    Returns:
        ``[batch, heads, 1, e]``, and the new state.
    """
    q, k, v = widened(query, key, value, None, normalized)
    decayed = state if log_decay is None else served(log_decay.to(state.dtype), q.shape[-3]).mT.exp() * state
    state = decayed + k.mT @ v
    return divided(q @ state, normalized).to(value.dtype), state


def widened(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with one head each per head of the queries, in float32 at least; what is not kept is zero.

    Args:
        ones: append a column of ones to the values.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    v = value.to(wide)
    if ones:
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    k = key.to(wide)
    if keep is not None:
        # What a padded position holds may be anything, and 0 · inf is no 0.
        k, v = (x.masked_fill(~keep.unsqueeze(-1), 0.0) for x in (k, v))
    return query.to(wide), served(k, query.shape[-3]), served(v, query.shape[-3])


def served(x: Tensor, heads: int) -> Tensor:
    """[..., key_heads, s, f] → [..., heads, s, f]: each head serves its group; one that serves all broadcasts."""
    return x if x.ndim < 3 or x.shape[-3] in (1, heads) else x.repeat_interleave(heads // x.shape[-3], -3)


def side_by_side(y: Tensor) -> Tensor:
    """[batch, heads, t, e] with its heads side by side in memory."""
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def divided(y: Tensor, normalized: bool) -> Tensor:
    """What was summed over values and ones, by what was summed over ones."""
    return y[..., :-1] / y[..., -1:].clamp_min(1e-12) if normalized else y


def causal_sum(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, chunk: int, levels: int = 2) -> Tensor:
    """Σ_{j≤i} w_ij (q_i·k_j) v_j over ``[..., n, f]``, ``[..., n, e]`` and g of ``[..., n, 1]`` or ``[..., n, f]``, in chunks.

    Args:
        levels: how often chunks are made of chunks: what is carried between them costs O(n / chunk / 16), squared at the last.
    """
    n = q.shape[-2]
    if levels == 0 or (isinstance(n, int) and n <= chunk):
        return weighted(q, k, None if g is None else g.cumsum(-2)) @ v
    q, k, v = (in_chunks(x, chunk) for x in (q, k, v))
    if g is None:
        carried = (k.mT @ v).cumsum(-3)
        return from_chunks(weighted(q, k, None) @ v + q @ shifted(carried, 1), n)
    g = in_chunks(g, chunk).cumsum(-2)
    whole = g[..., -1:, :]
    states = (k * (whole - g).exp()).mT @ v
    if g.shape[-1] == 1:  # the whole state decays by one number
        rows, decay = states.flatten(-2).unsqueeze(-3), whole.transpose(-3, -2)
    else:
        rows, decay = states.transpose(-3, -2), whole.squeeze(-2).mT.unsqueeze(-1)
    one = torch.ones_like(decay)
    carried = causal_sum(one, one, rows, decay, 16, levels - 1)
    carried = torch.unflatten(carried.squeeze(-3), -1, states.shape[-2:]) if g.shape[-1] == 1 else carried.transpose(-3, -2)
    return from_chunks(weighted(q, k, g) @ v + (q * g.exp()) @ shifted(carried, 1), n)


def weighted(q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    """w_ij (q_i·k_j) for j ≤ i, else 0; g is summed up to each position."""
    if g is None:
        return (q @ k.mT).tril()
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    if g.shape[-1] == 1:
        return q @ k.mT * (g - g.mT).masked_fill(later, -torch.inf).exp()
    decay = (g.unsqueeze(-2) - g.unsqueeze(-3)).masked_fill(later.unsqueeze(-1), -torch.inf).exp()
    return (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1)


def in_turn(x: Tensor) -> bool:
    """Whether chunks of ``x`` are taken one after the other: on a CPU, where tensors are plain ones and nothing is traced."""
    return type(x) in (Tensor, torch.nn.Parameter) and isinstance(x.shape[-2], int) and x.device.type == "cpu"


def pieces(n: int, size: int) -> list[slice]:
    """0 … n - 1 in pieces of ``size``; of nothing, one."""
    return [slice(first, min(first + size, n)) for first in range(0, max(n, 1), size)]


def kept_at(keep: Tensor | None, at: slice) -> Tensor | None:
    """The part of ``keep`` at some positions; one that all positions share is that of each."""
    return keep if keep is None or keep.shape[-1] == 1 else keep[..., at]


# -- rows in chunks -------------------------------------------------------------------------------------------


def chunk_rows(n: int, chunk: int, device: torch.device) -> Tensor:
    """The row that stands at each place of ``in_chunks``: ``[chunks, chunk]``; outside of 0 … n - 1 there is none.

    An empty chunk stands in front. Of a symbolic n, one more may stand at the end: two chunks at least, so that nothing
    depends on whether there is only one.
    """
    chunks = -(-n // chunk) + 1 if isinstance(n, int) else n // chunk + 2
    return torch.arange(-1, chunks - 1, device=device)[:, None] * chunk + torch.arange(chunk, device=device)


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[..., n, f] → [..., chunks, chunk, f], zero where there is no row; the first chunk is empty."""
    n = x.shape[-2]
    if isinstance(n, int):
        return torch.unflatten(F.pad(x, (0, 0, chunk, -n % chunk)), -2, (-1, chunk))
    rows = chunk_rows(n, chunk, x.device)
    return x[..., rows.clamp(0, n - 1), :].masked_fill(((rows < 0) | (rows >= n)).unsqueeze(-1), 0.0)


def from_chunks(x: Tensor, n: int) -> Tensor:
    """The n rows again."""
    chunk = x.shape[-2]
    return x.flatten(-3, -2).index_select(-2, torch.arange(chunk, n + chunk, device=x.device))


def shifted(x: Tensor, by: int) -> Tensor:
    """What stands ``by`` chunks before each, along axis -3; of the first ones, the first."""
    return x.index_select(-3, torch.arange(x.shape[-3], device=x.device).sub(by).clamp_min(0))
