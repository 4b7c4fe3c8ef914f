"""A linear layer whose matrix is a product of structured factors: it holds them, and may hold the product.

y = W x + b        W the product of the factors, never formed in training
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.ops import TorchOps
from tautomer.rewrite.structured import Form, Init


class StructuredLinear(nn.Module):
    """What ``LowRankLinear``, ``BlockDenseLinear`` and ``BlockShuffleLinear`` share.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``.
        form: the structure.
        init: how the factors start, by default as the form's paper has it; see ``tautomer.rewrite.structured``. The bias is zero.
        std: of the Gaussian that is drawn; by default one over the root of what is summed over.
        merge_below: in eval mode, without gradients for the factors, an input of fewer tokens than this is multiplied by the
            product of the factors: one large product is faster than two smaller ones where there is little to do. The product
            is kept beside the factors, not in the state dict, and made again when they change. A write that torch does not see
            (through ``.data``) is noticed at the next call of ``train`` or ``eval``. What is compiled or exported multiplies by
            the factors.

    Raises:
        UsageError: there is no such matrix; says which sizes there are.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, form: Form, bias: bool = True, *, init: Init | None = None,
        std: float | None = None, merge_below: int = 0, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.form, self.in_features, self.out_features, self.merge_below = form, in_features, out_features, merge_below
        self._product: tuple[Any, Tensor] | None = None
        options = {"device": device, "dtype": dtype}
        for name, shape in zip(form.names, form.shapes(out_features, in_features), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)
        self.reset_parameters(init, std)

    @classmethod
    def from_dense(
        cls, dense: nn.Linear, *sizes: Any, init: Init | Literal["nearest"] = "nearest", std: float | None = None, **options: Any
    ) -> Self:
        """The layer of this form that is nearest to ``dense`` (Frobenius), computed in float64; the bias is the same parameter.

        Args:
            sizes: the structure: ``LowRankLinear.from_dense(layer, rank)``.
            init: "nearest", or how the factors start without the weights of ``dense``.
            std, options: as of the class.

        ``error`` tells how far it is. Nearest by weights alone: on data, truncate after whitening instead (recipe "compress").
        """
        n, m, like = dense.in_features, dense.out_features, dense.weight
        made = cls(n, m, *sizes, **{"bias": False, "device": "meta", **options})
        made.to_empty(device=like.device).to(like.dtype)
        if init == "nearest":
            made.take(like)
        else:
            made.reset_parameters(init, std)
        made.requires_grad_(like.requires_grad)
        made.bias = dense.bias
        return made.train(dense.training)

    @torch.no_grad()
    def take(self, W: Tensor) -> None:
        """Let the factors be those nearest to a matrix [out_features, in_features]."""
        for factor, value in zip(self.factors, self.form.nearest(W.detach().double()), strict=True):
            factor.copy_(value)

    @torch.no_grad()
    def reset_parameters(self, init: Init | None = None, std: float | None = None) -> None:
        """Draw the factors again, and let the bias be zero."""
        drawn = self.form.drawn(self.out_features, self.in_features, init, std, like=self.factors[0])
        for factor, value in zip(self.factors, drawn, strict=True):
            factor.copy_(value)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        return tuple(getattr(self, name) for name in self.form.names)

    @property
    def weight(self) -> Tensor:
        """The product, for code that asks a linear layer for its weight; computed at every question."""
        return self.merged()

    def merged(self) -> Tensor:
        """The matrix [out_features, in_features] that the layer multiplies by, in the factors' dtype."""
        return self.form.merged(*self.factors)

    def error(self, W: Tensor) -> float:
        """|W - merged|_F / |W|_F, in float64."""
        merged = self.form.merged(*(factor.detach().double() for factor in self.factors))
        return float((W.detach().double() - merged).norm() / W.detach().double().norm())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if self.merge_below and self._may_merge() and x.numel() < self.merge_below * self.in_features:
            return F.linear(x, self._kept(), self.bias)
        first, second = self.factors
        y: Tensor = self.form.apply(TorchOps(), x, first, second, self.bias)
        return y

    def _may_merge(self) -> bool:
        learns = torch.is_grad_enabled() and any(factor.requires_grad for factor in self.factors)
        return not (self.training or learns or torch.compiler.is_compiling())

    @torch.no_grad()
    def _kept(self) -> Tensor:
        state = [(f.data_ptr(), f.dtype, f.device, 0 if f.is_inference() else f._version) for f in self.factors]
        if self._product is None or self._product[0] != state:
            self._product = state, self.merged()
        return self._product[1]

    def train(self, mode: bool = True) -> Self:
        self._product = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_product": None}

    def extra_repr(self) -> str:
        kept = f", merge_below={self.merge_below}" if self.merge_below else ""
        return f"{self.in_features}, {self.out_features}, {self.form}, bias={self.bias is not None}{kept}"


def dense_of(module: nn.Module) -> nn.Linear | None:
    """A linear layer, or the Conv1D of transformers (its weight stored transposed), as an ``nn.Linear`` on the same parameters.

    None for anything else: a layer with a forward of its own, or whose weight is no parameter but computed, and the last one of
    ``nn.MultiheadAttention``, which is never called.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or "weight" not in module._parameters:
        return None
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return module
    if f"{type(module).__module__}.{type(module).__name__}" != "transformers.pytorch_utils.Conv1D":
        return None
    weight: Tensor = module.weight  # type: ignore[assignment]
    n, m = weight.shape
    dense = nn.Linear(n, m, device="meta", dtype=weight.dtype)
    del dense.weight
    dense.weight = weight.t()  # type: ignore[assignment]
    dense.bias = module.bias  # type: ignore[assignment]
    return dense.train(module.training)
