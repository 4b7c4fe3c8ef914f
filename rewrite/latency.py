"""How long a layer takes on a target, dense and in two factors, by rank: measured at a few ranks, linear between them.

    break-even    the largest rank at which linear(linear(x, B), A, b) takes less time than linear(x, W, b)

The layer is run alone, on random numbers at the sizes of the example. Its forms take turns, so that a machine that slows down
slows all of them. A larger rank takes no less time: where it seemed to, the figures are pooled.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .allocation import between
from .compose import Nodes, compose
from .emit import GraphOps
from .equation import dtype, shape
from .layers import Layer
from .measure import in_turns
from .program import Program
from .samples import number
from .target import Target

GAIN = 0.95
"""Two products that save less than a twentieth save nothing that could be told from noise."""
ROUNDS = 5
_BUDGET_MS = 40.0
"""For each form: a layer that takes a millisecond is called forty times, a slow one ``ROUNDS`` times."""


@dataclass(frozen=True)
class Latency:
    """The time of one call of a layer, in µs.

    Attributes:
        dense: as it is.
        ranks: those that were measured, increasing.
        times: in two factors of each of them; they do not decrease.
    """

    dense: float
    ranks: tuple[int, ...]
    times: tuple[float, ...]

    def __call__(self, rank: int | None) -> float:
        """At any rank; None is dense. Linear between the measured ranks, constant outside."""
        return self.dense if rank is None else between(rank, dict(zip(self.ranks, self.times, strict=True)))

    def gains(self, rank: int) -> bool:
        """Whether two products are faster, by more than noise."""
        return self(rank) < GAIN * self.dense

    @property
    def break_even(self) -> int:
        """The largest rank at which two products are faster; 0 if they are at none of those that were measured."""
        return next((rank for rank in range(self.ranks[-1], self.ranks[0] - 1, -1) if self.gains(rank)), 0)


def latency(layer: Layer, ranks: Sequence[int], sizes: Mapping[Any, int], target: Target) -> Latency:
    """Measure a layer whose kernel has one tap, at these ranks (increasing, at least one).

    Args:
        sizes: of the symbols, as of ``example_sizes``.

    Raises:
        TautomerError: the target cannot run such a layer.
    """
    forms = [_alone(layer, rank, sizes) for rank in (None, *ranks)]
    runs = [target.compile(form) for form in forms]
    dense, *times = in_turns(runs, forms[0].example, ROUNDS, milliseconds=_BUDGET_MS * len(runs))
    return Latency(dense, tuple(ranks), increasing(times))


def likeness(layer: Layer, sizes: Mapping[Any, int]) -> Hashable:
    """Equal for layers that take the same time: one op on one shape, of one dtype on one device."""
    x = layer.bound[layer.kind.x]
    biased = layer.bias is not None
    return layer.node.target, _read(layer, sizes), layer.outputs, biased, dtype(x), str(x.meta["val"].device)


def positions(layer: Layer, sizes: Mapping[Any, int]) -> int:
    """At how many positions the layer is applied in the example: tokens, or pixels."""
    return prod(_read(layer, sizes)) // max(1, layer.inputs)


def increasing(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest sequence that does not decrease: neighbours in the wrong order take their mean.

    Example:
        >>> increasing([1.0, 3.0, 2.0, 4.0])
        (1.0, 2.5, 2.5, 4.0)
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, more = pools.pop()
            total, count = total + before, count + more
        pools.append((total, count))
    return tuple(total / count for total, count in pools for _ in range(count))


def _read(layer: Layer, sizes: Mapping[Any, int]) -> tuple[int, ...]:
    """The shape of x in the example."""
    return tuple(number(size, sizes) for size in shape(layer.bound[layer.kind.x]))


def _alone(layer: Layer, rank: int | None, sizes: Mapping[Any, int]) -> Program:
    """The layer by itself, or its factors of a rank."""
    generator, W = torch.Generator().manual_seed(0), layer.weight.meta["val"]
    kernel, m, n = (1,) * layer.kind.dims, layer.outputs, layer.inputs

    def random(*of: int) -> Tensor:
        return torch.randn(of, generator=generator).to(dtype=W.dtype, device=W.device)

    matrices = {"W": (m, n)} if rank is None else {"B": (rank, n), "A": (m, rank)}
    weights = {name: random(*of, *kernel) for name, of in matrices.items()}
    bias = {} if layer.bias is None else {"b": random(m)}

    def results(op: GraphOps, at: Nodes) -> list[Any]:
        x, W = (at["x"], at["W"]) if rank is None else (layer.on(op, at["x"], at["B"], None), at["A"])
        return [layer.on(op, x, W, at.get("b"))]

    return compose("Layer", {**weights, **bias}, {"x": random(*_read(layer, sizes))}, results)
