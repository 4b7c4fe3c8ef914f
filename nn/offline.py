"""What offline norms share: statistics over tokens, the diagonal map at inference, a padding mask.

    training      z = x / sqrt(v + eps),  y = gamma z + beta             v one number per channel: it says how below
    inference     y = gamma / sqrt(psi^2 + eps) * x + beta               psi^2 the running statistic: a constant

The true gradient of a statistic that comes from earlier steps does not exist in this step, so the backward is the
norm's own: where autograd would subtract mean(g z) z, it subtracts e z with a remembered e,

    g = r gamma dy,   dx = (g - e z) / sqrt(v + eps),   dgamma = sum dy r z,   dbeta = sum dy

Means are over the tokens that are no padding; a padded token takes no part in v, so nothing is subtracted from its dx.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tautomer.rewrite.errors import UsageError

Correction = Callable[[Tensor], Tensor]
"""From q = mean(g z) of this step to the e that is subtracted; called once, in the backward."""


class OfflineNorm(nn.Module):
    """A norm over the last axis whose statistics are per channel and, at inference, constants.

    Statistics are computed in float32 at least, whatever the input's dtype is, and never move between devices. They are those
    of the local batch; under ``DistributedDataParallel`` the running ones are rank 0's, as every buffer's. One training forward
    is one step: a forward that is run twice (activation checkpointing) counts twice.

    Args:
        width: number of channels, the size of the last axis.
        eps: added to the second moment.
        momentum: share of a running statistic that stays at each step (``nn.BatchNorm1d`` counts the share that goes).
        warmup: how many steps use the batch's own statistic.
        elementwise_affine, bias: whether there are gamma and beta, as of ``nn.LayerNorm``.

    Raises:
        UsageError: an argument is out of range; an input or mask has another shape; the training form is being exported.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_var: Tensor
    steps: Tensor

    def __init__(
        self, width: int, *, eps: float, momentum: float, warmup: int, elementwise_affine: bool = True, bias: bool = True,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if width < 1 or warmup < 0 or not 0.0 <= momentum < 1.0 or eps < 0.0:
            raise UsageError(f"width {width}, eps {eps}, momentum {momentum}, warmup {warmup}: one of them is out of range")
        self.width, self.eps, self.momentum, self.warmup = width, eps, momentum, warmup
        self.padding_mask: Tensor | None = None
        options = {"device": device, "dtype": dtype}
        affine = elementwise_affine
        self.register_parameter("weight", nn.Parameter(torch.ones(width, **options)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(width, **options)) if affine and bias else None)
        self.register_buffer("running_var", torch.ones(width, **options))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def reset(self) -> None:
        """Start the warm-up again: call it before fine-tuning on other data. Statistics and weights stay."""
        self.steps.zero_()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Normalise ``x``.

        Args:
            x: ``[..., width]``, floating.
            padding_mask: ``[...]``, True where a token is padding; training alone looks at it. See also ``padding``.
        """
        if not self.training:
            return self.affine(x)
        if x.shape[-1] != self.width:
            raise UsageError(f"the last axis of the input has {x.shape[-1]} entries; the norm was made for {self.width}")
        if torch.compiler.is_exporting():
            raise UsageError("the training form keeps state between steps, which a graph cannot", hint="model.eval() first")
        y: Tensor = self._train(x, self.padding_mask if padding_mask is None else padding_mask)
        return y

    def affine(self, x: Tensor) -> Tensor:
        """The form at inference: one factor and one summand per channel."""
        scale = torch.rsqrt(self.running_var + self.eps)
        y = x * (scale if self.weight is None else self.weight * scale).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _train(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        keep = _kept(x, padding_mask)
        with torch.no_grad():
            self.steps += 1
            v, r, correction = self.statistics(self._moment(x, keep))
        y: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, torch.sqrt(v + self.eps), r, keep, correction
        )
        return y

    @abstractmethod
    def statistics(self, v: Tensor) -> tuple[Tensor, Tensor, Correction]:
        """One step: what to divide by (squared), the compensation r, and the correction of the backward.

        Args:
            v: mean of x^2 over this step's tokens, ``[width]``.
        """

    def _moment(self, x: Tensor, keep: Tensor | None) -> Tensor:
        v = _mean(_wide(x).square(), keep)
        # A step without any token says nothing.
        return v if keep is None else torch.where(keep.any(), v, self.running_var)

    def average(self, running: Tensor, value: Tensor) -> None:
        """running <- momentum running + (1 - momentum) value"""
        running.copy_(self.momentum * running + (1 - self.momentum) * value)

    def extra_repr(self) -> str:
        shown = f"{self.width}, eps={self.eps}, momentum={self.momentum}, warmup={self.warmup}"
        missing = [name for name in ("weight", "bias") if getattr(self, name) is None]
        return ", ".join([shown, *(f"no {name}" for name in missing)])


class _Normalise(torch.autograd.Function):
    """y = gamma x / sigma + beta, and the backward of the module."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, sigma: Tensor, r: Tensor, keep: Tensor | None,
        correction: Correction,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, gamma, beta, sigma, r, keep)
        ctx.correction = correction
        y = _wide(x) / sigma
        if gamma is not None:
            y = gamma * y
        return (y if beta is None else y + beta).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, beta, sigma, r, keep = ctx.saved_tensors
        z, dy = _wide(x) / sigma, _wide(dy)
        g = r * dy if gamma is None else r * gamma * dy
        e_z = ctx.correction(_mean(g * z, keep)) * z
        dx = (g - (e_z if keep is None else torch.where(keep.unsqueeze(-1), e_z, 0.0))) / sigma
        tokens = tuple(range(x.ndim - 1))
        dgamma = None if gamma is None else (dy * (r * z)).sum(tokens).to(gamma.dtype)
        dbeta = None if beta is None else dy.sum(tokens).to(beta.dtype)
        return dx.to(x.dtype), dgamma, dbeta, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kept(x: Tensor, padding_mask: Tensor | None) -> Tensor | None:
    if padding_mask is None:
        return None
    if padding_mask.shape != x.shape[:-1]:
        raise UsageError(
            f"the padding mask has the shape {list(padding_mask.shape)}, the input {list(x.shape)}",
            hint="one entry per token, True where it is padding",
        )
    return ~padding_mask.to(torch.bool)


def _mean(x: Tensor, keep: Tensor | None) -> Tensor:
    """The mean over the tokens that count, per channel."""
    flat = x.reshape(-1, x.shape[-1])
    if keep is None:
        return flat.mean(0)
    kept = keep.reshape(-1, 1)
    return torch.where(kept, flat, 0.0).sum(0) / kept.sum().clamp(min=1)


@contextmanager
def padding(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Tell every offline norm of ``model`` which tokens are padding, for models whose code calls a norm with one argument.

    Args:
        mask: ``[...]``, True where a token is padding, as the norms' inputs without their last axis.

    Example: ``with padding(model, attention_mask == 0): loss = model(ids, attention_mask).loss``
    """
    norms = [module for module in model.modules() if isinstance(module, OfflineNorm)]
    before = [norm.padding_mask for norm in norms]
    for norm in norms:
        norm.padding_mask = mask
    try:
        yield
    finally:
        for norm, was in zip(norms, before, strict=True):
            norm.padding_mask = was
