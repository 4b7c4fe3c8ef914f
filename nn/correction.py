"""What a layer lost when its weight was quantised or factored, given back in part by a parallel branch of low rank.

    y = W' x + U (V x) + b        U V of rank k, near E = W - W'

    LoRC        U V = P P^T E,  P the first k left singular vectors of E: nearest to E
    whitened    P those of E C^1/2 instead, C = X^T X of inputs X: nearest in its outputs,
                |X (E - U V)^T|_F^2 = the sum of the other singular values squared, and no C^-1/2 is needed

arXiv:2303.08302 (ZeroQuant-V2, LoRC), arXiv:2410.06040 (QERA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.factors import factor


class CorrectedLinear(nn.Module):
    """A linear layer and a low-rank branch beside it; ``corrected`` makes one.

    Args:
        layer: any module that is a linear layer, quantised or not.
        V: ``[rank, in]``.
        U: ``[out, rank]``.
    """

    def __init__(self, layer: nn.Module, V: Tensor, U: Tensor) -> None:
        super().__init__()
        self.layer, self.V, self.U = layer, nn.Parameter(V), nn.Parameter(U)

    def forward(self, x: Tensor) -> Tensor:
        """As of the layer."""
        y: Tensor = self.layer(x)
        return y + F.linear(F.linear(x.to(self.V.dtype), self.V), self.U).to(y.dtype)


def corrected(
    layer: nn.Module,
    W: Tensor,
    rank: int,
    *,
    quantized: Tensor | None = None,
    covariance: Tensor | None = None,
    dtype: Any = None,
) -> CorrectedLinear:
    """A layer whose weight is only near ``W``, with the branch of that rank which corrects it best.

    Args:
        layer: the layer as it is.
        W: [out, in], the weight it should have.
        rank: k; 8 is usual.
        quantized: [out, in], the weight that the layer multiplies by, dequantised; by default its ``weight``.
        covariance: C = X^T X [in, in] over calibration inputs; without it inputs are taken as white.
        dtype: of the branch; by default that of ``W``.

    Raises:
        UsageError: shapes do not agree, or there is no such rank.

    Example:
        >>> coarse, W = nn.Linear(8, 8), torch.randn(8, 8)
        >>> torch.allclose(corrected(coarse, W, 8)(x := torch.randn(3, 8)), x @ W.t() + coarse.bias, atol=1e-5)
        True
    """
    given = getattr(layer, "weight", None) if quantized is None else quantized
    if not isinstance(given, Tensor):
        raise UsageError(f"{type(layer).__name__} has no weight to compare", hint="pass the dequantised one: quantized=")
    if given.shape != W.shape:
        raise UsageError(f"the layer's weight is {list(given.shape)}, the one it should have {list(W.shape)}")
    V, U = branch(W.detach().double() - given.detach().double(), rank, covariance)
    return CorrectedLinear(layer, V.to(dtype or W.dtype), U.to(dtype or W.dtype))


@torch.no_grad()
def branch(E: Tensor, rank: int, covariance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """V and U of ``rank`` with U V near ``E``; see the module. Computed in float64, with balanced factors.

    Raises:
        UsageError: the covariance has another shape, or there is no such rank.
    """
    m, n = E.shape
    if not 1 <= rank <= min(m, n):
        raise UsageError(f"a matrix [{m}, {n}] has no rank {rank}", hint=f"a rank from 1 to {min(m, n)}")
    if covariance is not None and covariance.shape != (n, n):
        raise UsageError(f"the covariance is {list(covariance.shape)}, of inputs with {n} channels")
    E = E.double()
    P = factor(E, covariance).left[:, :rank]
    V = P.t() @ E
    root = V.norm(dim=1).sqrt()
    scale = torch.where(root > 0, root, 1.0)
    return V / scale[:, None], P * scale
