"""A matrix [m, n] as a product of structured factors: its shapes, its product with x, the nearest one to a matrix, its start.

    LowRank(r)          y = U (V x)                            V [r, n], U [m, r]
    BlockDense(k, r)    y = U blkdiag(V) x                     V [k, r/k, n/k], U [m, r]
    BlockShuffle(k)     y = P2 blkdiag(B2) P1 blkdiag(B1) x    B1 [k, s/k, n/k], B2 [k, m/k, s/k],  s = min(m, n)   (Monarch)

    P1: place i of the middle goes to (i mod k) s/k + i div k          P2: place i of m goes to (i mod m/k) k + i div m/k

Each form cuts the matrix into blocks that share no factor, and is of a given rank on each: one block for LowRank; the columns
of one V for BlockDense; for BlockShuffle the rows ≡ b mod k beside the columns of block a, of as many ranks as the middle has
places of block a that are ≡ b mod k. So the nearest matrix is the truncated SVD block by block, and it is the nearest there is:

    |W - W'|_F^2 = sum over blocks of the singular values squared that were cut off

arXiv:2204.00595 (Monarch), arXiv:2406.16450 (structured feedforward layers).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .errors import UsageError
from .ops import Ops, TorchOps

Init = Literal["spectral", "orthogonal", "plain"]
"""How factors start: the nearest ones to a Gaussian matrix; Gaussian blocks made orthogonal (U Vᵀ of their SVD); Gaussian."""


class Form(ABC):
    """A structure; see the module. Frozen data: equal forms are equal.

    Class attributes:
        names: of the factors, in the order in which x meets them.
        init: how they start, by default.
    """

    names: ClassVar[tuple[str, str]]
    init: ClassVar[Init]

    @abstractmethod
    def shapes(self, m: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the factors of a matrix [m, n].

        Raises:
            UsageError: there are none, of this form.
        """

    @abstractmethod
    def apply(self, op: Ops, x: Any, first: Any, second: Any, bias: Any = None) -> Any:
        """The product with ``x`` [..., n], plus the bias: [..., m]."""

    @abstractmethod
    def nearest(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the matrix of this form that is nearest to ``W`` in the Frobenius norm, computed in its dtype."""

    def numel(self, m: int, n: int) -> int:
        """How many parameters the factors have."""
        return sum(map(prod, self.shapes(m, n)))

    def merged(self, first: Tensor, second: Tensor) -> Tensor:
        """The matrix [m, n] of the factors; computed in float32 at least."""
        wide = torch.promote_types(first.dtype, torch.float32)
        n = first.shape[-1] * (first.shape[0] if first.ndim == 3 else 1)
        rows = torch.eye(n, dtype=wide, device=first.device)
        product: Tensor = self.apply(TorchOps(), rows, first.to(wide), second.to(wide))
        return product.t().to(first.dtype)

    def drawn(self, m: int, n: int, init: Init | None = None, std: float | None = None, like: Tensor | None = None,
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Factors to start a training from.

        Args:
            init: see ``Init``; by default the form's own.
            std: of the Gaussian; by default one over the root of what is summed over.
            like: their dtype (drawn in float32 at least) and device.
        """
        shapes, like = self.shapes(m, n), torch.empty(0) if like is None else like
        options: dict[str, Any] = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}

        def gaussian(shape: Sequence[int]) -> Tensor:
            scale = shape[-1] ** -0.5 if std is None else std
            return torch.randn(*shape, generator=generator, **options) * scale

        init = init or self.init
        if init == "spectral":
            first, second = self.nearest(gaussian((m, n)))
        elif init == "orthogonal":
            first, second = map(_orthogonal, map(gaussian, shapes))
        elif init == "plain":
            first, second = map(gaussian, shapes)
        else:
            raise UsageError(f"init={init!r}", hint="'spectral', 'orthogonal' or 'plain'")
        return first.to(like.dtype), second.to(like.dtype)


@dataclass(frozen=True)
class LowRank(Form):
    """y = U (V x)"""

    rank: int
    names = ("V", "U")
    init = "spectral"

    @staticmethod
    def at(ratio: float) -> Callable[[int, int], LowRank]:
        """The form of a layer [m, n] that keeps ``ratio`` of its parameters, for any m and n.

        Example:
            >>> LowRank.at(0.625)(3072, 768)
            LowRank(rank=384)
        """
        if not 0 < ratio <= 1:
            raise UsageError(f"ratio={ratio}: it is a share of the parameters, above 0 and at most 1")
        # A ratio such as 0.3 is no binary number: what it falls short by must not cost a rank.
        return lambda m, n: LowRank(max(1, int(ratio * m * n / (m + n) + 1e-9)))

    def shapes(self, m: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not 1 <= self.rank <= min(m, n):
            raise UsageError(f"a matrix [{m}, {n}] has no rank {self.rank}", hint=f"a rank from 1 to {min(m, n)}")
        return (self.rank, n), (m, self.rank)

    def apply(self, op: Ops, x: Any, first: Any, second: Any, bias: Any = None) -> Any:
        return op.linear(op.linear(x, first, None), second, bias)

    def nearest(self, W: Tensor) -> tuple[Tensor, Tensor]:
        self.shapes(*W.shape)
        return _truncated(W, self.rank)


@dataclass(frozen=True)
class BlockDense(Form):
    """y = U blkdiag(V) x"""

    blocks: int
    rank: int
    names = ("V", "U")
    init = "orthogonal"

    def shapes(self, m: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        _require_blocks(self.blocks, inputs=n, rank=self.rank)
        shape = (self.blocks, self.rank // self.blocks, n // self.blocks)
        if not 1 <= shape[1] <= min(m, shape[2]):
            most = min(m, shape[2]) * self.blocks
            raise UsageError(f"{self.blocks} blocks [{m}, {shape[2]}] have no rank {self.rank} in all", hint=f"at most {most}")
        return shape, (m, self.rank)

    def apply(self, op: Ops, x: Any, first: Any, second: Any, bias: Any = None) -> Any:
        middle = op.block_linear(op.unflatten(x, -1, [self.blocks, -1]), first)
        return op.linear(op.flatten(middle, -2, -1), second, bias)

    def nearest(self, W: Tensor) -> tuple[Tensor, Tensor]:
        (k, p, _), _ = self.shapes(*W.shape)
        V, U = _truncated(W.reshape(len(W), k, -1).movedim(1, 0), p)
        return V, U.movedim(0, 1).flatten(1)


@dataclass(frozen=True)
class BlockShuffle(Form):
    """y = P2 blkdiag(B2) P1 blkdiag(B1) x"""

    blocks: int
    names = ("B1", "B2")
    init = "orthogonal"

    def shapes(self, m: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        k = self.blocks
        _require_blocks(k, inputs=n, outputs=m)
        return (k, min(m, n) // k, n // k), (k, m // k, min(m, n) // k)

    def apply(self, op: Ops, x: Any, first: Any, second: Any, bias: Any = None) -> Any:
        middle = op.flatten(op.block_linear(op.unflatten(x, -1, [self.blocks, -1]), first), -2, -1)
        shuffled = op.transpose(op.unflatten(middle, -1, [-1, self.blocks]), -2, -1)  # P1
        y = op.flatten(op.transpose(op.block_linear(shuffled, second), -2, -1), -2, -1)  # P2
        return y if bias is None else op.add(y, bias)

    def nearest(self, W: Tensor) -> tuple[Tensor, Tensor]:
        (k, p, q), (_, o, _) = self.shapes(*W.shape)
        Vs, Us = _truncated(W.reshape(o, k, k, q).permute(1, 2, 0, 3), min(o, q))  # by rows mod k, by block of columns
        place = torch.arange(k * p, device=W.device)
        a, b, column = place // p, place % k, place // k
        rank = column - (a * p - b + k - 1) // k  # how many places of the same two blocks come before
        B2 = W.new_zeros(k, o, p)
        B2[b, :, column] = Us[b, a, :, rank]
        return Vs[b, a, rank].reshape(k, p, q), B2


def _truncated(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """S^1/2 Vᵀ and U S^1/2 of the SVD, the first ``rank`` of each."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[..., :rank].sqrt()
    return root[..., None] * Vh[..., :rank, :], U[..., :rank] * root[..., None, :]


def _orthogonal(block: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(block, full_matrices=False)
    nearest: Tensor = U @ Vh
    return nearest


def _require_blocks(blocks: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if blocks < 1 or size % blocks:
            raise UsageError(f"{blocks} blocks do not divide the {size} of {name}", hint="a number of blocks that divides it")
