"""Trained Rank Pruning: a weight is projected to a low rank now and then while it trains, and cut into factors at the end.

    every m steps    W <- U_r S_r V_r^T                     the smallest r with sum_{i<=r} S_i^2 >= T sum S_i^2
    before a step    grad W += lambda U_r V_r^T             a subgradient of lambda |W|_*, of the r that are kept

A convolution [N, C, H, W] is a matrix, or N of them, in one of three ways, each of which is two convolutions once of low rank r:

    "channel"      N x (C H W)       conv(C -> r, H x W), then conv(r -> N, 1 x 1)                       r (C H W + N)
    "spatial"      (C H) x (N W)     conv(C -> r, H x 1), then conv(r -> N, 1 x W)                       r (C H + N W)
    "depthwise"    N of C x (H W)    conv(C -> N r, 1 x 1), then conv(N r -> N, H x W) in N groups       r (C + H W) N

The paper calls them NC, VH and ND. Under ND every output sums r paths, each a 1 x 1 convolution and one of a single channel; r is
one number for all outputs, chosen by what they hold together.

arXiv:2004.14566 (TRP: Trained Rank Pruning for Efficient Deep Neural Networks).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tautomer.rewrite.errors import UsageError

from .callbacks import Callback
from .low_rank import LowRankLinear
from .replace import put, selected
from .structured import dense_of

Matricisation = Literal["channel", "spatial", "depthwise"]


class TrainedRankPruning(Callback):
    """Keeps weights of a model near a low rank while they train; ``decompose`` cuts them into factors.

    Args:
        model: whose linear layers and ungrouped two-dimensional convolutions with more than one tap are projected.
        energy: T, the share of the squared singular values that a projection keeps.
        every: m, after how many steps.
        nuclear: lambda; the paper takes 3e-4.
        matrix: how a convolution is a matrix.
        only, skip: module paths, as of ``replace_linears``. The papers leave the first convolutions.

    Raises:
        UsageError: there is no such layer, or a number is out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> pruning = TrainedRankPruning(model, energy=0.5, every=1)
        >>> pruning.step()
        >>> int(torch.linalg.matrix_rank(model[0].weight)) < 8
        True
    """

    def __init__(
        self, model: nn.Module, energy: float = 0.9, every: int = 20, *, nuclear: float = 0.0, matrix: Matricisation = "channel",
        only: Iterable[str] = (), skip: Iterable[str] = (),
    ) -> None:  # fmt: skip
        if not 0 < energy <= 1 or every < 1 or nuclear < 0 or matrix not in get_args(Matricisation):
            raise UsageError(f"energy={energy}, every={every}, nuclear={nuclear}, matrix={matrix!r}: one of them is out of range")
        self.model, self.energy, self.every, self.nuclear, self.matrix = model, energy, every, nuclear, matrix
        modules, skip = dict(model.named_modules()), tuple(skip)
        left = set(selected(model, skip)) if skip else set()
        self.layers = {path: modules[path] for path in selected(model, only) if path not in left and _is_prunable(modules[path])}
        if not self.layers:
            raise UsageError(f"{type(model).__name__} has no linear layer or convolution there that could be cut in two")

    @torch.no_grad()
    def before_step(self) -> None:
        for layer in self.layers.values() if self.nuclear else ():
            weight: Tensor = layer.weight  # type: ignore[assignment]
            if weight.grad is not None:
                U, S, Vh = _svd(as_matrix(weight, self.matrix))
                r = rank_of(S, self.energy)
                weight.grad += self.nuclear * as_weight(U[..., :r] @ Vh[..., :r, :], weight, self.matrix)

    @torch.no_grad()
    def after_step(self) -> None:
        if self.count % self.every == 0:
            for layer in self.layers.values():
                weight: Tensor = layer.weight  # type: ignore[assignment]
                U, S, Vh = _svd(as_matrix(weight, self.matrix))
                r = rank_of(S, self.energy)
                weight.copy_(as_weight((U * S[..., None, :])[..., :r] @ Vh[..., :r, :], weight, self.matrix))

    def decompose(self, energy: float = 1 - 1e-6) -> tuple[str, ...]:
        """Put two factors in the place of every layer that then has fewer parameters; the paths where that was done.

        Args:
            energy: what the factors keep. What was trained near a low rank keeps nearly all.
        """
        made: dict[int, nn.Module] = {}
        for path, layer in self.layers.items():
            weight: Tensor = layer.weight  # type: ignore[assignment]
            matrix = as_matrix(weight.detach(), self.matrix)
            rank, (rows, columns) = rank_of(torch.linalg.svdvals(matrix.double()), energy), matrix.shape[-2:]
            if rank * (rows + columns) < rows * columns:
                made[id(self.layers[path])] = factored(layer, rank, self.matrix)
        return put(self.model, made)


def rank_of(S: Tensor, energy: float) -> int:
    """The smallest r with sum_{i<=r} S_i^2 >= energy sum S_i^2, at least 1; for several matrices [N, k] the sums run over all."""
    share = S.square().reshape(-1, S.shape[-1]).sum(0).cumsum(0)
    return max(1, min(len(share), int((share < energy * share[-1]).sum()) + 1))


def as_matrix(weight: Tensor, matrix: Matricisation) -> Tensor:
    """A weight as a matrix, or as N of them; see the module."""
    if weight.ndim == 2:
        return weight
    if matrix == "depthwise":
        return weight.flatten(2)
    return weight.flatten(1) if matrix == "channel" else weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def as_weight(value: Tensor, like: Tensor, matrix: Matricisation) -> Tensor:
    """The inverse of ``as_matrix``."""
    if like.ndim == 2 or matrix != "spatial":
        return value.reshape(like.shape).to(like.dtype)
    N, C, H, W = like.shape
    return value.reshape(C, H, N, W).permute(2, 0, 1, 3).to(like.dtype)


@torch.no_grad()
def factored(layer: nn.Module, rank: int, matrix: Matricisation = "channel") -> nn.Module:
    """A linear layer or convolution as two, the nearest of this rank; stride, padding and dilation go to the axes they belong to.

    Raises:
        UsageError: the layer is neither, or has no such rank.
    """
    if not _is_prunable(layer):
        raise UsageError(f"{layer} is no linear layer, and no ungrouped convolution of two axes with more than one tap")
    if not isinstance(layer, nn.Conv2d):
        dense = dense_of(layer)
        assert dense is not None
        return LowRankLinear.from_dense(dense, rank)
    U, S, Vh = _svd(as_matrix(layer.weight.double(), matrix))
    if not 1 <= rank <= S.shape[-1]:
        shape = f"[{U.shape[-2]}, {Vh.shape[-1]}]"
        raise UsageError(f"a matrix {shape} has no rank {rank}", hint=f"a rank from 1 to {S.shape[-1]}")
    root = S[..., :rank].sqrt()
    left, right = U[..., :rank] * root[..., None, :], root[..., None] * Vh[..., :rank, :]
    N, C, H, W = layer.weight.shape
    if matrix == "channel":
        first = _part(layer, right.reshape(rank, C, H, W), (True, True))
        second = _part(layer, left.reshape(N, rank, 1, 1), (False, False))
    elif matrix == "depthwise":
        first = _part(layer, left.mT.reshape(N * rank, C, 1, 1), (False, False))
        second = _part(layer, right.reshape(N, rank, H, W), (True, True), groups=N)
    else:
        first = _part(layer, left.t().reshape(rank, C, H, 1), (True, False))
        second = _part(layer, right.reshape(rank, N, W).movedim(1, 0).unsqueeze(2), (False, True))
    second.bias = layer.bias
    return nn.Sequential(first, second).train(layer.training)


def _part(layer: nn.Conv2d, weight: Tensor, axes: tuple[bool, bool], groups: int = 1) -> nn.Conv2d:
    """A convolution that takes stride, padding and dilation of ``layer`` on the chosen axes."""

    def kept(values: tuple[int, ...], neutral: int) -> tuple[int, int]:
        return tuple(value if on else neutral for value, on in zip(values, axes, strict=True))  # type: ignore[return-value]

    padding = layer.padding if isinstance(layer.padding, str) else kept(layer.padding, 0)
    N, C, *kernel = weight.shape
    old = layer.weight
    made = nn.Conv2d(
        C * groups, N, tuple(kernel), kept(layer.stride, 1), padding, kept(layer.dilation, 1), groups,  # type: ignore[arg-type]
        bias=False, padding_mode=layer.padding_mode, device=old.device, dtype=old.dtype,
    )  # fmt: skip
    made.weight.copy_(weight)
    return made.requires_grad_(old.requires_grad)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    return U, S, Vh


def _is_prunable(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and max(module.kernel_size) > 1
    return isinstance(module, nn.Linear) and dense_of(module) is not None
