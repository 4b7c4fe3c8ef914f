"""Feature maps: φ with φ(q)·φ(k) in the place of exp(s q·k), for every head its own, one for queries and one for keys.

    Elu         elu(x) + 1                                              arXiv:2006.16236
    Relu        max(x W + b, 1e-12)                                     arXiv:2103.13076 (T2R)
    Hedgehog    (softmax(x W), softmax(-x W))                           arXiv:2402.04347, as LoLCATs has it
    JointHedgehog   softmax(2 (x W + b), -2 (x W + b)), W of all heads  arXiv:2402.04347, as flash-linear-attention has it
    LogNormal   exp(α q), exp(β k)                                      arXiv:2311.13541 (LLN)

A map is written over the vocabulary, so that what is trained on tensors is what stands in the graph. All features are
positive, and so is every denominator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tautomer.rewrite.errors import require
from tautomer.rewrite.ops import Operand, Ops
from tautomer.rewrite.options import check_options, least

Side = Literal["query", "key"]


@dataclass(frozen=True)
class Heads:
    """What a map is made for.

    Attributes:
        heads: of the queries; keys that serve several have been repeated.
        width: d.
        scale: s.
        spread: the standard deviation of queries and of keys per head, ``[heads]``, over the data; None without data.
        top: the largest entry of the keys per head.
        length: the mean norm of queries and of keys per head.
    """

    heads: int
    width: int
    scale: float
    spread: Mapping[Side, Tensor] | None = None
    top: Tensor | None = None
    length: Mapping[Side, Tensor] | None = None


class FeatureMap(ABC):
    """φ for queries and for keys.

    Class attributes:
        trains: whether its weights are trained; otherwise they are constants, or none.
        measured: whether its weights start from statistics of the data.
    """

    trains: ClassVar[bool] = True
    measured: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def initial(self, given: Heads, side: Side, draw: torch.Generator) -> dict[str, Tensor]:
        """The weights to start with, by name.

        Raises:
            Refused: they must be measured, and there is no data.
        """
        return {}

    def count(self, width: int) -> int:
        """How many features there are of ``width`` channels."""
        return width

    @abstractmethod
    def features(self, op: Ops, x: Operand, side: Side, weights: Mapping[str, Any]) -> Operand:
        """φ(x) of ``[..., heads, n, d]``."""


@dataclass(frozen=True)
class Elu(FeatureMap):
    """elu(x) + 1: no weights."""

    trains: ClassVar[bool] = False

    def features(self, op: Ops, x: Operand, side: Side, weights: Mapping[str, Any]) -> Operand:
        return op.add(op(torch.ops.aten.elu.default)(x), 1.0)


@dataclass(frozen=True)
class Relu(FeatureMap):
    """max(x W + b, 1e-12), W and b drawn as ``nn.Linear`` draws them.

    Attributes:
        width: how many features; d by default.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least(self, width=1)

    def count(self, width: int) -> int:
        return self.width or width

    def initial(self, given: Heads, side: Side, draw: torch.Generator) -> dict[str, Tensor]:
        f, bound = self.width or given.width, given.width**-0.5
        weight, bias = (torch.rand(given.heads, n, f, generator=draw) * 2 * bound - bound for n in (given.width, 1))
        return {"weight": weight, "bias": bias}

    def features(self, op: Ops, x: Operand, side: Side, weights: Mapping[str, Any]) -> Operand:
        return op.clamp_min(op.add(op.matmul(x, weights["weight"]), weights["bias"]), 1e-12)


@dataclass(frozen=True)
class Hedgehog(FeatureMap):
    """Two softmaxes side by side: the features of a position sum up to 2. W starts as the identity.

    Attributes:
        width: columns of W, half as many as features; d by default.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least(self, width=1)

    def count(self, width: int) -> int:
        return 2 * (self.width or width)

    def initial(self, given: Heads, side: Side, draw: torch.Generator) -> dict[str, Tensor]:
        return {"weight": torch.eye(given.width, self.width or given.width).repeat(given.heads, 1, 1)}

    def features(self, op: Ops, x: Operand, side: Side, weights: Mapping[str, Any]) -> Operand:
        y = op.matmul(x, weights["weight"])
        return op.cat([op.softmax(y, -1), op.softmax(op.neg(y), -1)], -1)


@dataclass(frozen=True)
class JointHedgehog(FeatureMap):
    """One softmax over both signs: the features of a position sum up to 1. One W and b serve all heads.

    Attributes:
        width: columns of W, half as many as features; d by default.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least(self, width=1)

    def count(self, width: int) -> int:
        return 2 * (self.width or width)

    def initial(self, given: Heads, side: Side, draw: torch.Generator) -> dict[str, Tensor]:
        f = self.width or given.width
        return {"weight": torch.eye(given.width, f), "bias": torch.zeros(f)}

    def features(self, op: Ops, x: Operand, side: Side, weights: Mapping[str, Any]) -> Operand:
        y = op.mul(op.add(op.matmul(x, weights["weight"]), weights["bias"]), 2.0)
        return op.softmax(op.cat([y, op.neg(y)], -1), -1)


@dataclass(frozen=True)
class LogNormal(FeatureMap):
    """exp(α q) and exp(β k): α and β give the weights the variance, in logarithms, that those of softmax have.

    With σ² the variance of the scores, Var(log Σ_d exp(N(0, x))) ≈ a x + b, and x = (σ² - b) / a is divided evenly:
    α σ_q = β σ_k = sqrt(x / 2). σ_q and σ_k are those of the data, per head, and stay: statistics of a batch would let samples
    see each other, and positions the future. The row's largest α q and the largest β k of the data are taken off before exp:
    both cancel.
    """

    trains: ClassVar[bool] = False
    measured: ClassVar[bool] = True

    def initial(self, given: Heads, side: Side, draw: torch.Generator) -> dict[str, Tensor]:
        require(given.spread is not None, "its two factors per head are measured: pass data=[…], an iterable of example calls")
        assert given.spread is not None and given.top is not None
        a, b = log_normal_constants(given.width)
        variance = (given.spread["query"] * given.spread["key"] * given.scale).square() * given.width
        factor = (((variance - b) / (2 * a)).sqrt() / given.spread[side])[:, None, None]
        return {"factor": factor} if side == "query" else {"factor": factor, "shift": factor * given.top[:, None, None]}

    def features(self, op: Ops, x: Operand, side: Side, weights: Mapping[str, Any]) -> Operand:
        wide = torch.promote_types(op.dtype(x), torch.float32)
        y = op.mul(x if op.dtype(x) is wide else op.cast(x, wide), weights["factor"])
        return op.exp(op.sub(y, op.amax(y, [-1], True) if side == "query" else weights["shift"]))


@cache
def log_normal_constants(width: int) -> tuple[float, float]:
    """a and b with Var(log Σ_d exp(N(0, x))) ≈ a x + b for x between 2 and 12: a line through as many sampled points.

    Example:
        >>> [round(x, 2) for x in log_normal_constants(64)]
        [0.15, -0.32]
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.linspace(2, 12, 11, dtype=torch.float64)
    normal = torch.randn(20000, width, generator=draw)
    variance = torch.stack([(normal * s).logsumexp(-1).double().var() for s in x.sqrt().tolist()])
    line = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), variance).solution
    return float(line[0]), float(line[1])
