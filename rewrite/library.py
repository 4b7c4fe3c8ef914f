"""The semantic ops that ATen has no name for: a ``torch.library`` op each, whose body is its meaning.

    add_rms_norm(x, r, g)  =  rms_norm(x + r, g), x + r

A body is plain differentiable torch, so the op needs no fake, no formula for its gradient and no kernel: ``torch.export`` keeps
it as one node, Inductor fuses what it is made of, and ONNX gets its parts where a table has no row for it.

torch.compile's disk cache knows an op by its name alone. Whoever changes a body therefore changes the version in its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Semantic:
    """One op of the namespace ``tautomer``.

    Attributes:
        schema: name with its version, arguments, results.
        body: what it computes.
    """

    schema: str
    body: Callable[..., Any]

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def crms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """RMSNorm of a zero-mean vector of which all but the last of d coordinates are given: the last is minus their sum.

    x / sqrt((sum(x²) + (sum x)²) / d + eps) · weight        d = len(x) + 1; arXiv:2305.14858
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
    normed = (wide * torch.rsqrt(total / (x.shape[-1] + 1) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """layer_norm(x + residual), and the sum itself."""
    total = x + residual
    return F.layer_norm(total, list(normalized_shape), weight, bias, eps), total


def add_rms_norm(
    x: Tensor, residual: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual), and the sum itself."""
    total = x + residual
    return F.rms_norm(total, list(normalized_shape), weight, eps), total


SEMANTIC = (
    Semantic("crms_norm.v1(Tensor x, Tensor? weight=None, float eps=1e-05) -> Tensor", crms_norm),
    Semantic(
        "add_layer_norm.v1(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
        "float eps=1e-05) -> (Tensor, Tensor)",
        add_layer_norm,
    ),
    Semantic(
        "add_rms_norm.v1(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) "
        "-> (Tensor, Tensor)",
        add_rms_norm,
    ),
)
"""Every op of the namespace ``tautomer``."""

_LIBRARY: Any = torch.library.Library("tautomer", "FRAGMENT")  # type: ignore[no-untyped-call]  # ops live as long as this
for _op in SEMANTIC:
    _LIBRARY.define(_op.schema)
    _LIBRARY.impl(_op.name, _op.body, "CompositeImplicitAutograd")

tautomer: Any = torch.ops.tautomer
