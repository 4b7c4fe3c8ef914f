"""PowerNorm: the running second moment of earlier steps in the forward, a running correction in the backward.

    warm-up:    z = x / sqrt(v_t + eps)          v_t = mean x^2 over the tokens of step t, per channel
    after it:   z = x / sqrt(psi^2 + eps)        psi^2 of the step before
    psi^2 <- ((t - 1) psi^2 + v_t) / t           during the warm-up;  then, always,  psi^2 <- a psi^2 + (1 - a) v_t
    backward:   dx = (g - nu z) / sigma,   nu <- nu (1 - (1 - a) mean z^2) + (1 - a) mean(g z)

With groups, GroupScaling comes first, in training and at inference: each token is divided by the root mean square of each of
its groups of channels, x / sqrt(mean_group x^2 + eps). That norm depends on the input: only PN* (no groups) is a constant
diagonal map at inference, which can be folded into its readers.

arXiv:2003.07845 (PowerNorm: Rethinking Batch Normalization in Transformers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tautomer.rewrite.errors import UsageError

from .offline import Correction, OfflineNorm


class PowerNorm(OfflineNorm):
    """PN with ``groups`` (as released), PN* without.

    Where the released code and the paper part:

    - dx is divided by what the forward divided by, sigma = sqrt(psi^2 + eps) after the warm-up, as the paper has it. The
      code divides by the current batch's sqrt(v_t + eps), which the forward did not use.
    - during the warm-up the cumulative average is followed by a step of the moving one, as the code has it: the cumulative
      average alone would end the warm-up with a psi^2 that lags by half of it.
    - the means of the backward count no padding, as the forward's do not; the code's do.

    Args:
        width: number of channels, the size of the last axis.
        eps, momentum, elementwise_affine, bias: as of ``OfflineNorm``.
        warmup: how many steps use their own statistics.
        groups: groups of GroupScaling (the released code takes the number of heads), None for PN*.

    State: ``weight``, ``bias``, ``running_var`` (psi^2), ``correction`` (nu), ``steps``.

    Example:
        >>> PowerNorm(8, groups=2)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    correction: Tensor

    def __init__(
        self, width: int, eps: float = 1e-5, momentum: float = 0.9, warmup: int = 10000, groups: int | None = None, *,
        elementwise_affine: bool = True, bias: bool = True, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        options = {"device": device, "dtype": dtype}
        super().__init__(
            width, eps=eps, momentum=momentum, warmup=warmup, elementwise_affine=elementwise_affine, bias=bias, **options
        )
        if groups is not None and (groups < 1 or width % groups):
            raise UsageError(f"{width} channels cannot be cut into {groups} groups")
        self.groups = groups
        self.register_buffer("correction", torch.zeros(width, **options))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """As of ``OfflineNorm``."""
        return super().forward(x if self.groups is None else group_scaling(x, self.groups, self.eps), padding_mask)

    def statistics(self, v: Tensor) -> tuple[Tensor, Tensor, Correction]:
        t, warm = self.steps, self.steps <= self.warmup
        used = torch.where(warm, v, self.running_var)
        self.running_var.copy_(torch.where(t < self.warmup, self.running_var + (v - self.running_var) / t, self.running_var))
        self.average(self.running_var, v)
        zz = v / (used + self.eps)

        def correct(q: Tensor) -> Tensor:
            nu = self.correction.clone()
            self.correction.copy_(nu * (1 - (1 - self.momentum) * zz) + (1 - self.momentum) * q)
            return nu

        return used, torch.ones_like(v), correct

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", groups={self.groups}" if self.groups is not None else "")


def group_scaling(x: Tensor, groups: int, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps), the mean over each of ``groups`` equal pieces of the last axis."""
    wide = torch.unflatten(x, -1, (groups, -1)).to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype).flatten(-2)
