"""Which rank each layer takes, within what a budget leaves: predicted, measured, by one threshold, or one ratio for all.

    least sum of losses with sum of costs <= ratio * cost of all layers        losses by layer and rank, "stays dense" among them

Losses are of the outputs of the model. The plan also fits layers behind factored ones, and knows the errors that are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, fx

from tautomer.rewrite.allocation import Choice, Option, allocate, between, evolve, require_feasible, spent, threshold
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.divergence import Divergence
from tautomer.rewrite.factors import Factors, Moments
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.program import Program
from tautomer.rewrite.refit import Fit, Pairs, error_of, fitted, pairs

from .matrices import Matrix
from .prices import Prices, Sizes

Allocation = Literal["predicted", "measured", "uniform", "threshold"]
PROBES = (0.3, 0.7)
"""The sizes at which the loss of a layer is measured."""


@dataclass(frozen=True)
class Choosing:
    """How ranks are chosen, as of ``FactorLinears``."""

    ratio: float
    allocation: Allocation
    generations: int
    calls: int
    tokens: str
    seed: int


class RankPlan:
    """Which rank each layer takes: what was measured, and what it was measured with."""

    def __init__(self, how: Choosing, program: Program, layers: Sequence[Matrix], sizes: Sequence[Sizes],
                 prices: Prices, factors: Sequence[Factors], means: Sequence[Tensor | None]) -> None:  # fmt: skip
        self.how, self.program, self.layers, self.factors, self.means = how, program, layers, factors, means
        self.sizes, self.prices = sizes, prices
        self.total = sum(s.costs[-1] for s in sizes)
        self.budget = int(how.ratio * self.total)
        self.options = [s.ranks for s in sizes]
        self.losses: list[list[float]] = []
        self.divergence: Divergence | None = None
        self.fits: dict[int, Fit] = {}

    def fit(self, ranks: Sequence[int | None], weighed: Mapping[fx.Node, Tensor], data: Data) -> None:
        """Fit each layer at its rank behind those before it."""
        inputs: dict[fx.Node, list[int]] = {}
        for index, rank in enumerate(ranks):
            if rank is not None:
                inputs.setdefault(self.layers[index].x, []).append(index)
        edits: dict[str, Tensor] = {}
        for number, (x, indices) in enumerate(inputs.items(), 1):
            data.tell(f"fitting what reads input {number} of {len(inputs)}")
            seen = pairs(self.program, data, edits, x, self.layers[indices[0]].layer.axis, self.how.tokens)
            for index in indices:
                c, rank = self.layers[index], ranks[index]
                assert rank is not None
                bias = None if c.bias is None else self.program.weights.value(c.bias, torch.float64)
                self.fits[index] = fitted(c.value(self.program), bias, seen, rank, weighed.get(c.layer.node))
            edits |= self.edits({index: ranks[index] for index in indices})

    def ranks(self, context: Context) -> list[int | None]:
        costs = [s.costs for s in self.sizes]
        require_feasible([[Option(size, 0.0) for size in row] for row in costs], self.budget, self.prices.told)
        if context.data is None:
            return self._of(self._uniform())
        calls = list(islice(context.data.each(self.program), self.how.calls))
        self.divergence = Divergence(self.program, calls, self.how.tokens)
        if self.how.allocation == "uniform":
            return self._of(self._uniform())
        self.losses = [self._curve(index, context) for index in range(len(self.layers))]
        curves = [[Option(*o) for o in zip(sizes, row, strict=True)] for sizes, row in zip(costs, self.losses, strict=True)]
        start = (threshold if self.how.allocation == "threshold" else allocate)(curves, self.budget)
        if self.how.generations:
            start = self._best_start(start, curves)
            start = evolve(curves, self.budget, start, self._fitness, self.how.generations, seed=self.how.seed)
        return self._of(start)

    def _best_start(self, start: Choice, curves: Sequence[Sequence[Option]]) -> Choice:
        """The allocation, or what is uniform if that measures better."""
        uniform = self._uniform()
        fits = spent(curves, uniform) <= self.budget
        return min([start, uniform] if fits else [start], key=lambda choice: self._fitness(choice, 1))

    def _uniform(self) -> Choice:
        """In every layer the largest rank whose cost is within the ratio; the smallest, if that is dearer."""
        wanted = self.how.ratio
        fitting = [[i for i, size in enumerate(s.costs[:-1]) if size <= wanted * s.costs[-1]] for s in self.sizes]
        return tuple(max(row, default=0) for row in fitting)

    def _of(self, choice: Choice) -> list[int | None]:
        return [row[index] for row, index in zip(self.options, choice, strict=True)]

    def _curve(self, index: int, context: Context) -> list[float]:
        """The loss of one layer by option: predicted, or measured at the probes and between them in proportion to that."""
        assert self.divergence is not None and context.data is not None
        c, f, row = self.layers[index], self.factors[index], self.options[index]
        if self.how.allocation in ("predicted", "threshold"):
            return [0.0 if rank is None else 0.5 * float(f.tail[rank]) for rank in row]
        context.data.tell(f"measuring layer {index + 1} of {len(self.layers)}")
        ranks = [rank for rank in row if rank is not None]
        wanted = [ratio * c.m * c.n / (c.m + c.n) for ratio in PROBES]
        probes = sorted({min(ranks, key=lambda rank, w=w: abs(rank - w)) for w in wanted}) if ranks else []  # type: ignore[misc]
        scale = {rank: max(0.0, self.divergence(self.edits({index: rank}))) / max(float(f.tail[rank]), 1e-300) for rank in probes}
        return [0.0 if rank is None else between(rank, scale) * float(f.tail[rank]) for rank in row]

    def _fitness(self, choice: Choice, stage: int) -> float:
        assert self.divergence is not None
        calls = len(self.divergence.calls)
        chosen = dict(enumerate(self._of(choice)))
        return self.divergence(self.edits(chosen), range(calls if stage else max(1, calls // 4)))

    def errors(self, ranks: Sequence[int | None], seen: Mapping[fx.Node, Moments]) -> dict[int, tuple[float, float]]:
        """|y' - y| / |y| of what factored layers give, predicted and measured in the factored model, by layer."""
        if self.divergence is None:
            return {}
        chosen = {index: rank for index, rank in enumerate(ranks) if rank is not None}
        nodes = {self.layers[index].layer.node: self.layers[index].layer.axis for index in chosen}
        measured = self.divergence.at(nodes, self.edits(chosen))
        return {
            index: (self._predicted(index, rank, seen[self.layers[index].x]), measured[self.layers[index].layer.node])
            for index, rank in chosen.items()
        }

    def _predicted(self, index: int, rank: int, seen: Moments) -> float:
        """Of the layer alone, or behind the fitted ones before it."""
        c, fit = self.layers[index], self.fits.get(index)
        if fit is not None:
            return fit.error
        W = c.value(self.program)
        product = self.factors[index].product(W, rank)
        bias = None if c.bias is None else self.program.weights.value(c.bias, torch.float64)
        shift = None if bias is None else (W - product) @ seen.mean
        return error_of(W, bias, Pairs(seen.second, seen, seen), product, shift)

    def edits(self, ranks: Mapping[int, int | None]) -> dict[str, Tensor]:
        """The weights of the table with some layers of a lower rank."""
        weights: dict[str, Tensor] = {}
        for index, rank in ranks.items():
            c, mean = self.layers[index], self.means[index]
            if rank is None:
                continue
            old = self.program.weights.value(c.name)
            W = c.turned(old.detach()).reshape(c.m, c.n)
            wide = W.to(torch.promote_types(W.dtype, torch.float32))
            fit = self.fits.get(index)
            product = self.factors[index].product(wide, rank) if fit is None else (fit.U @ fit.V).to(wide)
            weights[c.name] = c.turned(product.reshape(c.turned(old).shape)).to(old.dtype)
            if c.bias is not None and mean is not None:
                b = self.program.weights.value(c.bias).detach()
                shift = (wide - product) @ mean.to(wide) if fit is None or fit.shift is None else fit.shift.to(wide)
                weights[c.bias] = (b + shift).to(b.dtype)
        return weights
