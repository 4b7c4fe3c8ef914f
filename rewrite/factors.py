"""Truncated factors of a matrix under a covariance of what it is applied to.

    W ≈ P_r (P_r^T W),    P_r the first r eigenvectors of W C W^T,    C = E[x x^T]

P_r P_r^T W is the matrix of rank r with the least E|W x - W' x|^2, which is sum_{i>r} s_i^2 for the singular values s_i of
W C^(1/2). Truncation-aware whitening (arXiv:2403.07378) gives the same matrix by way of an inverse root of C; here nothing is
inverted, so C may be singular. C = I is the plain SVD.

P_r is orthonormal: |P_r^T W x| <= |W x|, so the value between the factors overflows no dtype that holds the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-12
"""Directions that the data never takes count this much, relative to the largest: among them W itself decides."""


@dataclass(frozen=True)
class Moments:
    """What was seen of a vector: sums over ``count`` rows, in float64.

    Attributes:
        second: [n, n], the sum of x x^T.
        first: [n], the sum of x.
    """

    second: Tensor
    first: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        return self.first / self.count

    def covariance(self, centred: bool) -> Tensor:
        """E[x x^T], or that of x - E[x]. With fewer rows than columns it knows too little of the others, and gets a ridge."""
        C = self.second / self.count
        if centred:
            C = C - torch.outer(self.mean, self.mean)
        if self.count < len(C):
            C = C + 1e-2 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        return C


@dataclass(frozen=True)
class Factors:
    """The factors of every rank at once.

    Attributes:
        basis: [m, min(m, n)], orthonormal columns, the most important first.
        tail: [min(m, n) + 1]; ``tail[r]`` is E|W x - W' x|^2 at rank r.
    """

    basis: Tensor
    tail: Tensor

    def error(self, rank: int) -> float:
        """The relative error |W x - W' x| / |W x| at rank r, in the root mean square."""
        total = float(self.tail[0])
        return (float(self.tail[rank]) / total) ** 0.5 if total > 0 else 0.0

    def product(self, W: Tensor, rank: int) -> Tensor:
        """W' = P_r P_r^T W"""
        P = self.basis[:, :rank].to(W)
        return P @ (P.T @ W)


def factor(W: Tensor, C: Tensor | None = None) -> Factors:
    """The factors of W [m, n] under C [n, n], by default the identity; computed in float64."""
    W = W.double()
    if C is not None:
        values, vectors = torch.linalg.eigh(C.double())
        floor = max(float(values[-1]) * FLOOR, torch.finfo(torch.float64).tiny)
        W = W @ (vectors * values.clamp_min(floor).sqrt())
    U, s, _ = torch.linalg.svd(W, full_matrices=False)
    tail = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)])
    return Factors(U, tail)


def cost(m: int, n: int, rank: int | None) -> int:
    """Parameters of a layer [m, n] in factors of a rank, None for dense; also its products per token."""
    return m * n if rank is None else rank * (m + n)


def break_even(m: int, n: int) -> int:
    """The largest rank whose factors have fewer parameters than the matrix."""
    return (m * n - 1) // (m + n)
