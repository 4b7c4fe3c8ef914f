"""Attention through a few landmarks: what stands for a segment of the sequence stands for all of its positions.

Bodies of semantic ops (library.py); operands as in subset_attention.py. Nothing here is causal: a landmark knows the future.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"
# Tensor.unflatten and torch.sym_min have no annotations.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nystrom_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, landmarks: int, iterations: int = 6
) -> Tensor:
    """softmax(q k̃ᵀ) A⁺ softmax(q̃ kᵀ) v with A = softmax(q̃ k̃ᵀ); q̃ and k̃ are means of m segments. arXiv:2102.03902

    At most m positions attend as they are. Of a padded sequence the positions that count are cut into segments.
    """
    batch, heads, n, _ = query.shape
    kind = torch.promote_types(query.dtype, torch.float32)
    low, groups = torch.finfo(kind).min, heads // key.shape[1]
    bias = torch.zeros(batch, 1, 1, n, dtype=kind, device=query.device)
    if mask is not None:
        mask = mask.expand(batch, 1, 1, n)
        bias = bias.masked_fill(~mask, low) if mask.dtype is torch.bool else mask.to(kind).clamp(min=low)
    q, k, v = query.to(kind) * scale, *(x.repeat_interleave(groups, 1).to(kind) for x in (key, value))
    if isinstance(n, int):
        y = _through_landmarks(q, k, v, bias, landmarks, iterations) if n > landmarks else (q @ k.mT + bias).softmax(-1) @ v
    else:  # a symbol: both, the short way on as many positions as it is for
        at = torch.arange(n, device=query.device)
        first = at[:landmarks]
        short = (q[:, :, first] @ k[:, :, first].mT + bias[..., first]).softmax(-1) @ v[:, :, first]
        y = _through_landmarks(q, k, v, bias, landmarks, iterations)
        y = torch.where(at.amax(0) < landmarks, short[:, :, at.clamp(max=landmarks - 1)], y)
    return y.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _through_landmarks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, landmarks: int, iterations: int) -> Tensor:
    keep = bias[:, :, 0] > -1e4
    segment = (keep.cumsum(-1) - 1) * landmarks // keep.sum(-1, keepdim=True).clamp(min=1)
    inside = (segment[:, :, None] == torch.arange(landmarks, device=q.device)[:, None]) & keep[:, :, None]
    count = inside.sum(-1, keepdim=True)
    means = inside.to(q.dtype) / count.clamp(min=1)
    empty = torch.zeros_like(means[..., :1]).masked_fill(count == 0, torch.finfo(q.dtype).min).mT
    q_mean, k_mean = means @ q, means @ k
    A = (q_mean @ k_mean.mT + empty).softmax(-1)
    seen = (q_mean @ k.mT + bias).softmax(-1) @ v
    return (q @ k_mean.mT + empty).softmax(-1) @ (_pseudo_inverse(A, iterations) @ seen)


def _pseudo_inverse(A: Tensor, iterations: int) -> Tensor:
    """Z ← Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Aᵀ / (‖A‖₁ ‖A‖_∞), per head: not A⁺, but what a few steps come to.

    Small singular values stay small, which is what keeps m < n landmarks stable: more steps or A⁺ itself are worse.
    """
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Z = A.mT / A.sum(-2).amax(-1)[..., None, None]
    for _ in range(iterations):
        AZ = A @ Z
        Z = Z @ (13 * one - AZ @ (15 * one - AZ @ (7 * one - AZ))) / 4
    return Z


def linformer_attention(
    query: Tensor, key: Tensor, value: Tensor, E: Tensor, F_: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(q (Eᵀ k)ᵀ + log c) (Fᵀ v), of every slot the mean over the c positions of its segment that count. arXiv:2006.04768

    Args:
        E, F_: ``[longest, slots]``; where they are 1 in the segment of a slot and 0 elsewhere, and keys and values are constant
            in segments, this is attention itself. No more than ``longest`` positions.
    """
    longest, slots = E.shape
    at = torch.arange(key.shape[2], device=key.device)
    inside = (at * slots // longest)[:, None] == torch.arange(slots, device=key.device)
    if mask is not None:
        keep = mask.expand(query.shape[0], 1, 1, key.shape[2]).mT
        inside, key, value = inside & keep, torch.where(keep, key, 0.0), torch.where(keep, value, 0.0)
    count = inside.sum(-2, keepdim=True).expand(query.shape[0], 1, 1, slots).to(query.dtype)
    each = count.clamp(min=1).mT
    k, v = E.index_select(0, at).mT @ key / each, F_.index_select(0, at).mT @ value / each
    weight = count.clamp(min=1).log().masked_fill(count == 0, torch.finfo(query.dtype).min)
    y = F.scaled_dot_product_attention(query, k, v, weight, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return y.transpose(1, 2).contiguous().transpose(1, 2)
