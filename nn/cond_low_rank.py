"""CondLR: a low-rank layer that is trained with a bounded condition number.

    W = U S V^T        U [m, r] and V [n, r] with orthonormal columns, S [r, r];  cond(W) = cond(S)

after every step of the optimizer
    U, V <- Q of their QR decomposition, with the signs that keep the diagonal of R positive
    S    <- its singular values clamped to [mean - e, mean + e],  e = mean (tau - 1) / (tau + 1), so that cond(S) <= tau
            or, "mean": its orthogonal factor times sqrt(trace(S S^T) / r), so that cond(S) = 1

Before it the gradients of U and V are projected to the directions that turn their spaces: G <- (I - U U^T) G (S S^T)^-1 for U.

arXiv:2306.01485 (Robust low-rank training via approximate orthonormal constraints).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.errors import UsageError

from .callbacks import Callback


class CondLowRankLinear(nn.Module):
    """A linear layer W = U S V^T; ``CondLowRank`` keeps U and V orthonormal and S well conditioned.

    Args:
        rank: of the matrix.
        bias, device, dtype: as of ``nn.Linear``.

    State: ``U`` [out, rank], ``S`` [rank, rank], ``V`` [in, rank], ``bias``.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            most = min(in_features, out_features)
            raise UsageError(f"a matrix [{out_features}, {in_features}] has no rank {rank}", hint=f"a rank from 1 to {most}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        options = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(out_features, rank, **options))
        self.S = nn.Parameter(torch.empty(rank, rank, **options))
        self.V = nn.Parameter(torch.empty(in_features, rank, **options))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **options)) if bias else None)
        self.take(nn.Linear(in_features, out_features, bias=False, **options).weight)

    @classmethod
    def from_dense(cls, dense: nn.Linear, rank: int) -> CondLowRankLinear:
        """The layer of this rank that is nearest to ``dense``; the bias is the same parameter."""
        weight = dense.weight
        made = cls(dense.in_features, dense.out_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        made.take(weight)
        made.bias = dense.bias
        return made.train(dense.training)

    @torch.no_grad()
    def take(self, W: Tensor) -> None:
        """Let U S V^T be nearest to a matrix [out_features, in_features]."""
        U, S, Vh = torch.linalg.svd(_wide(W), full_matrices=False)
        self.U.copy_(U[:, : self.rank])
        self.S.copy_(torch.diag(S[: self.rank]))
        self.V.copy_(Vh[: self.rank].t())

    def merged(self) -> Tensor:
        """The matrix [out_features, in_features]."""
        return self.U @ self.S @ self.V.t()

    @property
    def weight(self) -> Tensor:
        """The matrix, for code that asks a linear layer for its weight."""
        return self.merged()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return F.linear(F.linear(x @ self.V, self.S), self.U, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class CondLowRank(Callback):
    """Keeps the condition number of every ``CondLowRankLinear`` of a model at most tau.

    Args:
        model: whose layers are kept.
        tau: the bound, at least 1; None for the variant "mean", which makes it 1.
        project: whether gradients are projected before a step.

    Raises:
        UsageError: there is no such layer, or tau is below 1.
    """

    def __init__(self, model: nn.Module, tau: float | None = 10.0, *, project: bool = True) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, CondLowRankLinear)]
        if not self.layers:
            raise UsageError(f"{type(model).__name__} has no CondLowRankLinear")
        if tau is not None and tau < 1:
            raise UsageError(f"tau={tau}: no condition number is below 1")
        self.tau, self.project = tau, project

    @torch.no_grad()
    def before_step(self) -> None:
        for layer in self.layers if self.project else ():
            S = _wide(layer.S)
            for factor, gram in ((layer.U, S @ S.t()), (layer.V, S.t() @ S)):
                if factor.grad is not None:
                    Q, G = _wide(factor), _wide(factor.grad)
                    factor.grad.copy_(torch.linalg.solve(gram, (G - Q @ (Q.t() @ G)).t()).t())

    @torch.no_grad()
    def after_step(self) -> None:
        for layer in self.layers:
            for factor in (layer.U, layer.V):
                Q, R = torch.linalg.qr(_wide(factor))
                factor.copy_(Q * torch.where(R.diagonal() < 0, -1.0, 1.0))
            layer.S.copy_(conditioned(_wide(layer.S), self.tau))


def conditioned(S: Tensor, tau: float | None) -> Tensor:
    """``S`` with cond(S) <= tau; with None with cond(S) = 1."""
    U, s, Vh = torch.linalg.svd(S)
    if tau is None:
        s = (s.square().mean().sqrt()).expand_as(s)
    else:
        mean = s.mean()
        e = mean * (tau - 1) / (tau + 1)
        s = s.clamp(mean - e, mean + e)
    result: Tensor = (U * s) @ Vh
    return result


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
