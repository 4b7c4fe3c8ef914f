"""Attention over a subset of the keys: what is left of softmax is softmax, over fewer scores.

    y_i = Σ_{j ∈ S(i)} exp(s_ij) v_j / Σ_{j ∈ S(i)} exp(s_ij)          s = scale q kᵀ

Bodies of semantic ops (library.py). q is ``[batch, heads, n, d]``; keys and values may have fewer heads, each of which serves as
many heads of the queries. A mask speaks of keys alone: boolean (True is kept) or added, broadcast to ``[batch, 1, 1, keys]``. A
query that sees no key at all gets a mean of values, so that it stays finite. Sizes may be symbols: nothing branches on them.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"
# Tensor.unflatten and torch.sym_min have no annotations.

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
    device, blocks = query.device, n // window + 2  # enough, and never one: PyTorch would ask whether it is
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


def top_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Tensor,
    mask: Tensor | None,
    scale: float,
    count: int,
    of: int = 0,
    causal: bool = False,
    gather: bool = True,
) -> Tensor:
    """Every query sees the ``count`` keys that score best in few dimensions, ``count`` of every ``of`` keys if that is given.

    Args:
        rotation: P, ``[key heads, d, d']``: keys are compared with a query by (q P)(k P)ᵀ.
        gather: read the chosen keys only; False masks the others: the same, and cheaper where all queries are there at once.
    """
    n, m, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    best = torch.sym_min((m * count + of - 1) // of if of else count, m)
    scores = ((query.unflatten(1, (-1, groups)) @ rotation[:, None]) @ (key @ rotation)[:, :, None].mT).flatten(1, 2) * scale
    rows, columns = torch.arange(n, device=query.device)[:, None], torch.arange(m, device=query.device)
    keep, bias = columns <= rows if causal else columns >= 0, None
    if mask is not None:
        keep, bias = masked(keep, mask)
    if bias is not None:
        scores = scores + bias
    scores = torch.where(keep, scores, -math.inf)
    chosen = scores.topk(best, -1, sorted=False).indices
    if not gather:
        keep = keep & torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
        seen = visible(keep, bias, query.dtype)
        return F.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=groups > 1)
    keep = keep.expand(scores.shape).gather(-1, chosen)
    if bias is not None:
        bias = bias.expand(scores.shape).gather(-1, chosen).flatten(1, 2).unsqueeze(2)
    # A query is a sequence of its own: [batch, h, n, d] → [batch, h · n, 1, d].
    index = chosen.unflatten(1, (-1, groups)).flatten(2).unsqueeze(-1)
    k, v = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])).unflatten(2, (-1, best)).flatten(1, 2) for x in (key, value))
    seen = visible(keep.flatten(1, 2).unsqueeze(2), bias, query.dtype)
    y = F.scaled_dot_product_attention(query.flatten(1, 2).unsqueeze(2), k, v, seen, scale=scale)
    return y.squeeze(2).unflatten(1, (query.shape[1], n)).transpose(1, 2).contiguous().transpose(1, 2)


def hyper_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    planes: Tensor,
    draws: Tensor,
    mask: Tensor | None,
    scale: float,
    block: int,
    leaf: int,
    longest: int,
    causal: bool = False,
) -> Tensor:
    """Every query sees the ``block`` keys that hash like it, and a sample of all others that stands for them.

    Causal: exact within leaves of ``leaf`` positions; the second of two neighbouring pieces sees the first, and so do pieces
        twice as large, up to all n positions; where n is a symbol, up to ``longest`` positions, and those beyond are no
        numbers.

    Args:
        planes: ``[d, r]``: the signs of x · planes are the hash of x.
        draws: ``[heads, samples]``, int64 and not negative: which keys are the sample.
    """
    heads, n, groups = query.shape[1], query.shape[2], query.shape[1] // key.shape[1]
    kind = torch.promote_types(query.dtype, torch.float32)
    bias = torch.zeros(query.shape[0], 1, n, dtype=kind, device=query.device)
    if mask is not None:
        mask = mask.expand(query.shape[0], 1, 1, n)[:, 0]
        bias = torch.where(mask, 0.0, -1e30) if mask.dtype is torch.bool else mask.masked_fill(mask <= -1e4, -1e30)
    q, k, v = query.to(kind) * scale, *(x.repeat_interleave(groups, 1).to(kind) for x in (key, value))
    bias, planes = bias.to(kind).expand(-1, heads, -1), planes.to(kind)
    if not causal:
        y, _ = _hashed(q, k, v, bias, planes, draws, block)
    else:
        y, mass = _leaves(q, k, v, bias, leaf)
        size = leaf
        while size < (n if isinstance(n, int) else longest):
            y, mass = _with_pieces(y, mass, q, k, v, bias, planes, draws, block, size)
            size = 2 * size
        if not isinstance(n, int):
            y = torch.where(torch.arange(n, device=y.device)[:, None] < size, y, math.nan)
    return y.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _leaves(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, leaf: int) -> tuple[Tensor, Tensor]:
    """Causal attention within pieces of ``leaf`` positions, and the logarithm of what its weights sum to."""
    n = q.shape[2]
    pieces = (n + leaf - 1) // leaf
    rows = torch.arange(pieces, device=q.device)[:, None] * leaf + torch.arange(leaf, device=q.device)
    inside = (rows < n)[:, None] & torch.ones(leaf, leaf, dtype=torch.bool, device=q.device).tril()
    rows = rows.clamp(max=n - 1)
    q, k, v, bias = q[:, :, rows], k[:, :, rows], v[:, :, rows], bias[:, :, rows]
    weights, mass = _weights(torch.where(inside, q @ k.mT + bias[:, :, :, None], -1e30))
    y = weights @ v
    return y.flatten(2, 3)[:, :, :n], mass.flatten(2, 3)[:, :, :n]


def _with_pieces(
    y: Tensor, mass: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, planes: Tensor, draws: Tensor, block: int, size: int
) -> tuple[Tensor, Tensor]:
    """What y gets when every second piece of ``size`` positions sees the piece before it too."""
    n = q.shape[2]
    pairs = (n + size - 1) // (2 * size)  # none while n ≤ size
    first = torch.arange(pairs, device=q.device)[:, None] * (2 * size) + torch.arange(size, device=q.device)
    second = (first + size).clamp(max=n - 1)
    asking, *asked = (
        x.transpose(1, 2).flatten(0, 1) for x in (q[:, :, second], k[:, :, first], v[:, :, first], bias[:, :, first])
    )
    more, weight = _hashed(asking, asked[0], asked[1], asked[2], planes, draws, block)
    more, weight = (x.unflatten(0, (q.shape[0], pairs)).transpose(1, 2).flatten(2, 3) for x in (more, weight))
    # One row more than there are: what positions in first pieces get.
    more = torch.cat((more, torch.zeros_like(y[:, :, :1])), 2)
    weight = torch.cat((weight, torch.full_like(mass[:, :, :1], -1e30)), 2)
    at = torch.arange(n, device=q.device)
    index = torch.where(at // size % 2 == 1, at // (2 * size) * size + at % size, pairs * size)
    more, weight = more[:, :, index], weight[:, :, index]
    total = torch.logaddexp(mass, weight)
    return y * (mass - total).exp()[..., None] + more * (weight - total).exp()[..., None], total


def _hashed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, planes: Tensor, draws: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Attention to hashed blocks of keys and a sample of the others: y, and the logarithm of what its weights sum to.

    Keys are sorted by their hash, those of padding (-1e30 in their bias) last, and cut into blocks. The block that a query sees
    depends on the query and on keys, never on other queries: these may be of the future.
    """
    (n, m), samples = (q.shape[2], k.shape[2]), draws.shape[-1]
    codes = torch.where(bias > -1e29, _hash(k, planes), 2 ** planes.shape[-1])
    near = codes.sort(dim=-1, stable=True).indices
    k, v, bias = _rows(k, near), _rows(v, near), bias.gather(2, near)
    many = _reduced((bias > -1e29).sum(-1, keepdim=True)).unsqueeze(-1)  # [batch, h, 1]
    blocks, width = (m + block - 1) // block, torch.sym_min(block, m)
    starts = torch.minimum(torch.arange(blocks, device=q.device) * block, (many - width).clamp(min=0))  # [batch, h, blocks]

    # Queries side by side with those that see the same block, in rows of ``side``, so many that some stay empty.
    own = torch.minimum(_place(codes, _hash(q, planes), planes.shape[-1]), (many - 1).clamp(min=0)) // block
    side = (block + 1) // 2
    rows = n // side + blocks
    count = torch.zeros_like(starts).scatter_add(2, own, torch.ones_like(own))
    begin = ((count + side - 1) // side * side).cumsum(-1) - (count + side - 1) // side * side
    order = own.sort(dim=-1, stable=True).indices
    sorted_own = own.gather(2, order)
    within = torch.arange(n, device=q.device) - (count.cumsum(-1) - count).gather(2, sorted_own)
    slot = begin.gather(2, sorted_own) + within
    unused = torch.zeros(rows * side, dtype=torch.int64, device=q.device).expand(*own.shape[:2], -1)
    q = _rows(q, unused.scatter(2, slot, order)).unflatten(2, (rows, side))
    seen_by = unused[:, :, :rows].scatter(2, slot // side, sorted_own)
    slot = torch.zeros_like(slot).scatter(2, order, slot)

    start = starts.gather(2, seen_by).unsqueeze(-1)  # [batch, h, rows, 1]
    columns = (start + torch.arange(width, device=q.device)).flatten(2)
    drawn = draws % many.clamp(min=1)  # [batch, h, samples]
    stands_for = (bias.gather(2, drawn) + (many.to(q.dtype) / samples).log()).unsqueeze(2)
    inside = (drawn.unsqueeze(2) >= start) & (drawn.unsqueeze(2) < start + width)  # not to be counted twice
    bias = torch.cat((bias.gather(2, columns).unflatten(2, (rows, width)), torch.where(inside, -1e30, stands_for)), -1)
    # The sample is one matrix for all rows: copied for none of them.
    k, v, sample, worth = (_rows(x, index) for index in (columns, drawn) for x in (k, v))
    near = q @ k.unflatten(2, (rows, width)).mT
    far = (q.flatten(2, 3) @ sample.mT).unflatten(2, (rows, side))
    weights, mass = _weights(torch.cat((near, far), -1).add_(bias.unsqueeze(3)))
    y = (weights[..., :width] @ v.unflatten(2, (rows, width))).flatten(2, 3) + weights[..., width:].flatten(2, 3) @ worth
    return _rows(y, slot), mass.flatten(2, 3).gather(2, slot)


def _weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Their softmax, and the logarithm of what their exponentials sum to.

    That is the largest logit less the logarithm of its weight, which is one in so many at least: as exact as ``logsumexp``, at
    two passes over the weights fewer. Its gradient is not: logits that a rounding tells apart have one weight, and the largest
    of each would be another one. Where gradients are wanted they also take longer so.
    """
    weights = logits.softmax(-1)
    if logits.requires_grad:
        return weights, logits.logsumexp(-1)
    return weights, _reduced(logits.amax(-1, keepdim=True)) - _reduced(weights.amax(-1, keepdim=True)).log()


def _reduced(x: Tensor) -> Tensor:
    """What is left of the last axis. Where nothing was there to reduce, ONNX Runtime leaves the axis as long as it was."""
    return x[..., 0]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x, ``[batch, h, n, d]``, that are asked for, ``[batch, h, ·]``."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _hash(x: Tensor, planes: Tensor) -> Tensor:
    """The place of the signs of x · planes in the reflected Gray code: neighbouring hashes differ in one sign."""
    signs = (x @ planes > 0).long()
    return _reduced((signs.cumsum(-1) % 2 * 2 ** torch.arange(planes.shape[-1], device=x.device).flip(0)).sum(-1, keepdim=True))


def _place(codes: Tensor, code: Tensor, bits: int) -> Tensor:
    """Where among sorted keys of these ``codes`` a query of hash ``code`` belongs; queries of one hash take turns."""
    count = torch.zeros_like(codes[:, :, :1]).expand(-1, -1, 2**bits + 1).scatter_add(2, codes, torch.ones_like(codes))
    before = (count.cumsum(-1) - count).gather(2, code)
    return before + torch.arange(code.shape[2], device=code.device) % count.gather(2, code).clamp(min=1)
