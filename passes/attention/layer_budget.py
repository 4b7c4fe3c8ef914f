"""Which attentions a budget lets go: those that save most, while the outputs of the model move by no more than it.

    max Σ saved_l     such that     Σ moved_l ≤ budget          moved_l: what l moves alone, measured

What several move together is near the sum of what each moves alone, while that is little. So one measurement each, a dynamic
program over them (rewrite/allocation.py), and one measurement of the plan. Where it holds, others are added one by one while they
fit, for the sum is often too careful; where it does not, all are taken one by one, each measured with those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tautomer.rewrite.allocation import UNITS, Option, allocate
from tautomer.rewrite.attention_report import Selection

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """What a budget lets go.

    Attributes:
        items: the chosen ones.
        alone: what each item moves alone.
        refused: what the outputs would move by with each of the others; what it moves alone if that is too much already.
        selection: the whole, for a report.
    """

    items: tuple[T, ...]
    alone: Mapping[T, float]
    refused: Mapping[T, float]
    selection: Selection


def choose(saved: Mapping[T, float], budget: float, moved: Callable[[Sequence[T]], float]) -> Chosen[T]:
    """Choose among items.

    Args:
        saved: what each saves, in any unit, above 0.
        moved: how far the outputs move if these are chosen together.
    """
    alone = {item: moved([item]) for item in saved}
    chosen = _planned(saved, alone, budget)
    together = moved(chosen) if len(chosen) > 1 else sum(alone[item] for item in chosen)
    how = "planned"
    if not together <= budget:
        chosen, together, how = [], 0.0, "greedy"
    refused = dict[T, float]()
    for item in sorted((item for item in saved if item not in chosen), key=lambda item: _number(alone[item])):
        with_it = moved([*chosen, item]) if chosen and alone[item] <= budget else alone[item]
        if with_it <= budget:
            chosen, together = [*chosen, item], with_it
        else:
            refused[item] = with_it
    selection = Selection(budget, sum(alone[item] for item in chosen), together, how)
    return Chosen(tuple(item for item in saved if item in chosen), alone, refused, selection)


def _planned(saved: Mapping[T, float], alone: Mapping[T, float], budget: float) -> list[T]:
    """What saves most within the budget, if movements add up; of choices that save the same, the one that moves less."""
    costs = {item: max(0.0, alone[item]) for item in saved if alone[item] <= budget}
    whole, unit = sum(saved.values()), max(budget, 0.0) or 1.0
    curves = [
        (Option(0, 0.0), Option(math.ceil(cost / unit * UNITS), 1e-6 * cost / unit - saved[item] / whole))
        for item, cost in costs.items()
    ]
    return [item for item, index in zip(costs, allocate(curves, UNITS), strict=True) if index]


def _number(moved: float) -> float:
    return math.inf if math.isnan(moved) else moved
