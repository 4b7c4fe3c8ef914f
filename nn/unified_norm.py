"""Unified Normalization: per-channel second moments, smoothed over the last steps by a geometric mean.

    v_t = mean x^2                                       over the tokens of step t, per channel
    v   = exp(mean_j log v_j)                            over the last M steps; v_t during the warm-up
    r   = clamp(sqrt(v + eps) / sqrt(psi^2 + eps), 1/5, 5)     gradient compensation; 1 for the first max(1000, warmup) steps
    psi^2 <- a psi^2 + (1 - a) v                         after r was taken
    backward:  q_t = mean(g z),   q = mean_j q_j over the last M steps (q_t during the warm-up),   e <- a e + (1 - a) q

Outlier filtration: if in some channel the arithmetic mean over the last M steps exceeds the geometric one by more than
M Var(sqrt(v_j)) (the variance of all entries of the buffer as it was before this step), the step is not smoothed: v = v_t,
r = 1, e = q_t in dx, and the buffers get psi^2 and e in the place of v_t and q_t.

arXiv:2208.01313 (Unified Normalization for Accelerating and Stabilizing Transformers), forward and backward as released.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tautomer.rewrite.errors import UsageError

from .offline import Correction, OfflineNorm

_UNCOMPENSATED = 1000


class UnifiedNorm(OfflineNorm):
    """UN: Unified Normalization over the last axis, in place of a LayerNorm in a model that will be trained.

    Differs from the released code in two places: the backward's mean counts no padding, as the forward's does not; and no
    outlier is looked for before the buffer is full.

    Args:
        width: number of channels, the size of the last axis.
        eps, momentum, elementwise_affine, bias: as of ``OfflineNorm``.
        buffer: M, how many steps are smoothed over; at least 2.
        warmup: how many steps use their own statistics.
        outlier_filtration: the paper turns it on for images and off for text.

    State: ``weight``, ``bias`` and ``running_var`` (psi^2), ``moments`` (v_j) and ``corrections`` (q_j), ``[M, width]``,
    ``correction`` (e), ``steps``: a state dict resumes training exactly.

    Example:
        >>> norm = UnifiedNorm(8)
        >>> norm(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    moments: Tensor
    corrections: Tensor
    correction: Tensor

    def __init__(
        self, width: int, eps: float = 1e-5, momentum: float = 0.9, buffer: int = 4, warmup: int = 4000,
        outlier_filtration: bool = False, *, elementwise_affine: bool = True, bias: bool = True, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        options = {"device": device, "dtype": dtype}
        super().__init__(
            width, eps=eps, momentum=momentum, warmup=warmup, elementwise_affine=elementwise_affine, bias=bias, **options
        )
        if buffer < 2:
            raise UsageError(f"buffer={buffer}: there is nothing to smooth over fewer than 2 steps")
        self.buffer, self.outlier_filtration = buffer, outlier_filtration
        self.register_buffer("moments", torch.zeros(buffer, width, **options))
        self.register_buffer("corrections", torch.zeros(buffer, width, **options))
        self.register_buffer("correction", torch.zeros(width, **options))

    def statistics(self, v: Tensor) -> tuple[Tensor, Tensor, Correction]:
        # The counter stays on its device: every branch is a ``where``, nothing waits for the host.
        slot = self.steps % self.buffer
        smooth = (self.steps > self.buffer) & (self.steps >= self.warmup)
        spread = self.moments.sqrt().var()
        _put(self.moments, slot, v)
        arithmetic, geometric = self.moments.mean(0), self.moments.log().mean(0).exp()
        outlier = smooth & (arithmetic - geometric > self.buffer * spread).any() & self.outlier_filtration
        _put(self.moments, slot, torch.where(outlier, self.running_var, v))
        smooth = smooth & ~outlier
        v = torch.where(smooth, geometric, v)
        compensated = smooth & (self.steps > max(_UNCOMPENSATED, self.warmup))
        ratio = torch.sqrt((v + self.eps) / (self.running_var + self.eps)).clamp(1 / 5, 5)
        r = torch.where(compensated, ratio, 1.0)
        self.average(self.running_var, v)

        def correct(q: Tensor) -> Tensor:
            _put(self.corrections, slot, torch.where(outlier, self.correction, q))
            self.average(self.correction, torch.where(smooth, self.corrections.mean(0), q))
            return torch.where(outlier, q, self.correction)

        return v, r, correct

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, buffer={self.buffer}" + ", outlier_filtration" * self.outlier_filtration


def _put(buffer: Tensor, slot: Tensor, value: Tensor) -> None:
    buffer.index_copy_(0, slot.view(1), value.to(buffer.dtype).unsqueeze(0))
