"""Truncated factors of a matrix under a covariance of what it is applied to.

    W ≈ P_r (P_r^T W),    P_r the first r eigenvectors of W C W^T,    C = E[x x^T]

P_r P_r^T W is the matrix of rank r with the least E|W x - W' x|^2, which is sum_{i>r} s_i^2 for the singular values s_i of
W C^(1/2). Truncation-aware whitening (arXiv:2403.07378) gives the same matrix by way of an inverse root of C; here nothing is
inverted, so C may be singular. C = I is the plain SVD.

P_r is orthonormal: |P_r^T W x| <= |W x|, so the value between the factors overflows no dtype that holds the output.

Where an error e of the output costs e^T G e, the error is weighed with a root R of G on the other side as well:

    W ≈ R^-1 P_r (P_r^T R W),    P_r the first r eigenvectors of R W C W^T R

The factors are then scaled until a column of the one is as long as the row of the other that it meets: R is as small as gradients
are, and factors of such different sizes neither train (a step of Adam is as long in both) nor fit into half precision.

With the G that ``sensitivities`` measures, the tails of all layers speak of one thing, what the outputs of the model lose (to
second order, as if layers erred independently), and may be compared and summed.

arXiv:2403.07378 (SVD-LLM), arXiv:2207.00112 (FWSVD: Fisher information on one side).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-12
"""Directions that the data never takes count this much, relative to the largest: among them W itself decides."""

RIDGE = 1e-2
"""Of the mean eigenvalue: added to what must be inverted, or was estimated from few rows."""


@dataclass(frozen=True)
class Moments:
    """What was seen of a vector, or of several at once: sums over ``count`` rows, in float64.

    Attributes:
        second: [..., n, n], the sum of x x^T.
        first: [..., n], the sum of x.
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
            C = C - self.mean[..., :, None] * self.mean[..., None, :]
        if self.count < (n := C.shape[-1]):
            scale = C.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
            C = C + RIDGE * scale * torch.eye(n, dtype=C.dtype, device=C.device)
        return C


@dataclass(frozen=True)
class Factors:
    """The factors of every rank at once: W' = left_r (right_r^T W).

    Attributes:
        left: [m, min(m, n)], R^-1 P, the most important column first.
        right: [m, min(m, n)], R P. Both are P, orthonormal, where R = 1; elsewhere they are scaled, one
            against the other.
        tail: [min(m, n) + 1]; ``tail[r]`` is E (W x - W' x)^T G (W x - W' x) at rank r.
    """

    left: Tensor
    right: Tensor
    tail: Tensor

    def error(self, rank: int) -> float:
        """The root of the tail relative to that of rank 0: |W x - W' x| / |W x| in the root mean square, where G = 1."""
        total = float(self.tail[0])
        return (float(self.tail[rank]) / total) ** 0.5 if total > 0 else 0.0

    def product(self, W: Tensor, rank: int) -> Tensor:
        """W' = left_r right_r^T W"""
        return self.left[:, :rank].to(W) @ (self.right[:, :rank].to(W).T @ W)


def factor(W: Tensor, C: Tensor | None = None, G: Tensor | None = None) -> Factors:
    """The factors of W [m, n] under C [n, n] and G [m, m], by default identities; computed in float64."""
    W = given = W.double()
    R, inverse = (None, None) if G is None else _roots(G.double())
    if R is not None:
        W = R @ W
    if C is not None:
        values, vectors = torch.linalg.eigh(C.double())
        floor = max(float(values[-1]) * FLOOR, torch.finfo(torch.float64).tiny)
        W = W @ (vectors * values.clamp_min(floor).sqrt())
    P, s, _ = torch.linalg.svd(W, full_matrices=False)
    tail = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)])
    if R is None or inverse is None:
        return Factors(P, P, tail)
    left, right = inverse @ P, R @ P
    columns, rows = left.norm(dim=0), (right.T @ given).norm(dim=1)
    scale = (columns / rows.clamp_min(FLOOR * rows.max())).sqrt() if rows.any() else torch.ones_like(rows)
    return Factors(left / scale, right * scale, tail)


def _roots(G: Tensor) -> tuple[Tensor, Tensor]:
    """The root of G and its inverse; what hardly matters to the outputs counts ``RIDGE`` of the mean."""
    values, vectors = torch.linalg.eigh(G)
    root = (values.clamp_min(0) + RIDGE * values.clamp_min(0).mean() + torch.finfo(G.dtype).tiny).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def cost(m: int, n: int, rank: int | None) -> int:
    """Parameters of a layer [m, n] in factors of a rank, None for dense; also its products per token."""
    return m * n if rank is None else rank * (m + n)


def break_even(m: int, n: int) -> int:
    """The largest rank whose factors have fewer parameters than the matrix."""
    return (m * n - 1) // (m + n)
