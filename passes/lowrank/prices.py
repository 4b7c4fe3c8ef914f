"""What a linear layer costs, dense and in two factors of a rank, in the unit of a budget.

parameters    m n          r (m + n)
flops         2 m n R      2 r (m + n) R       R positions (tokens, pixels) in the example
latency       measured on the target, once for layers of one shape: only ranks that are faster than dense are for sale
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from tautomer.rewrite.errors import Refused, UsageError, require
from tautomer.rewrite.factors import break_even, cost
from tautomer.rewrite.latency import Latency, latency, likeness, positions
from tautomer.rewrite.layers import Layer
from tautomer.rewrite.program import Program
from tautomer.rewrite.samples import example_sizes
from tautomer.rewrite.target import Target

Of = Literal["parameters", "flops", "latency"]
UNITS = {"parameters": "parameters", "flops": "FLOPs", "latency": "µs"}
PROBES = 5
"""A layer is timed at so many ranks, from the smallest to the largest that it may take."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that a layer may take.

    Attributes:
        ranks: increasing; None, which is dense, is the last.
        costs: of each.
        latency: its time by rank, if that is what the costs are.
    """

    ranks: tuple[int | None, ...]
    costs: tuple[int, ...]
    latency: Latency | None = None


class Prices:
    """The prices of the layers of a program.

    Args:
        of: the unit.
        target: where time is measured.
        known: the times that were measured there, by ``likeness``; what is measured now is added.

    Raises:
        UsageError: there is no target to measure on.
    """

    def __init__(self, of: Of, program: Program, target: Target | None, known: dict[Hashable, Latency]) -> None:
        if of == "latency" and target is None:
            raise UsageError("a budget of time is measured on a target, and none was given", hint="of='parameters' or 'flops'")
        self.of, self.target, self.known, self.example = of, target, known, example_sizes(program)

    def sizes(self, layer: Layer, ranks: Sequence[int]) -> Sizes:
        """
        Raises:
            Refused: the budget is a time, and two products are not faster at any of the ranks.
        """
        m, n = layer.outputs, layer.inputs
        all_of_them = (*ranks, None)
        if self.of != "latency":
            each = 1 if self.of == "parameters" else 2 * positions(layer, self.example)
            return Sizes(all_of_them, tuple(each * cost(m, n, rank) for rank in all_of_them))
        require(ranks, f"stays dense: {m * n:,} parameters, which factors have from rank {break_even(m, n) + 1} on")
        time = self._time(layer, ranks)
        faster = tuple(rank for rank in ranks if time.gains(rank))
        if not faster:
            slower = f"and two products of rank {ranks[0]} {microseconds(time(ranks[0]))}"
            raise Refused(f"stays dense: {self.where(layer)} it takes {microseconds(time.dense)}, {slower}")
        kept = (*faster, None)
        return Sizes(kept, tuple(round(1e3 * time(rank)) for rank in kept), time)

    def where(self, layer: Layer) -> str:
        """``at 512 positions on eager``"""
        return f"at {positions(layer, self.example):,} positions on {'no target' if self.target is None else self.target.name}"

    def number(self, amount: int) -> str:
        """A sum of costs, without its unit."""
        return f"{amount / 1e3:,.0f}" if self.of == "latency" else f"{amount:,}"

    def told(self, amount: int) -> str:
        """``1,234 parameters``"""
        return f"{self.number(amount)} {UNITS[self.of]}"

    def _time(self, layer: Layer, ranks: Sequence[int]) -> Latency:
        assert self.target is not None
        key = (self.target.name, likeness(layer, self.example), tuple(ranks))
        if key not in self.known:
            probes = sorted({ranks[round(i * (len(ranks) - 1) / (PROBES - 1))] for i in range(PROBES)})
            self.known[key] = latency(layer, probes, self.example, self.target)
        return self.known[key]


def microseconds(time: float) -> str:
    """``46 µs``, ``1.3 µs``"""
    return f"{time:,.1f} µs" if time < 10 else f"{time:,.0f} µs"
