"""Which of a few sizes each layer takes, so that all fit a budget and the sum of their losses is least.

    min sum_l loss_l(o_l)    such that    sum_l cost_l(o_l) <= budget

Pure functions over curves. An option of a layer is its cost and its loss; staying as it is, is one of them, which makes the curve
not convex: a threshold (``waterfill``) solves the problem without that option, the dynamic program this one (arXiv:2201.13096).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from .errors import UsageError

UNITS = 2000
"""Costs are counted in this many parts of the budget, rounded up."""


class Option(NamedTuple):
    """One size that a layer may take."""

    cost: int
    loss: float


Curve = Sequence[Option]
Choice = tuple[int, ...]
"""The index of one option per layer."""
Show = Callable[[int], str]


def spent(curves: Sequence[Curve], choice: Choice) -> int:
    return sum(curve[index].cost for curve, index in zip(curves, choice, strict=True))


def require_feasible(curves: Sequence[Curve], budget: int, show: Show = lambda amount: f"{amount:,} parameters") -> None:
    """
    Raises:
        UsageError: even the smallest options cost more than the budget.
    """
    floor = sum(min(option.cost for option in curve) for curve in curves)
    if floor > budget:
        full = sum(max(option.cost for option in curve) for curve in curves)
        raise UsageError(
            f"the budget is {show(budget)}, and the smallest factors have {show(floor)}",
            hint=f"a ratio of at least {floor / full:.3f}, or a smaller multiple",
        )


def allocate(curves: Sequence[Curve], budget: int) -> Choice:
    """The choice with the least sum of losses, by dynamic programming over the cost.

    Exact for budgets up to ``UNITS``; above, it may leave one part in ``UNITS`` of the budget per layer unused.

    Raises:
        UsageError: as of ``require_feasible``.
    """
    require_feasible(curves, budget)
    unit = max(1, budget // (UNITS + 100 * len(curves)))
    size = budget // unit
    best = torch.zeros(size + 1, dtype=torch.float64)  # by what may be spent
    taken: list[torch.Tensor] = []
    for curve in curves:
        rows = torch.full((len(curve), size + 1), torch.inf, dtype=torch.float64)
        for index, option in enumerate(curve):
            units = -(-option.cost // unit)
            if units <= size:
                rows[index, units:] = best[: size + 1 - units] + option.loss
        best, where = rows.min(0)
        taken.append(where)
    if best[size].isinf():  # only rounding up forbids it
        return tuple(min(range(len(curve)), key=lambda i, curve=curve: curve[i].cost) for curve in curves)  # type: ignore[misc]
    left, choice = size, []
    for curve, where in zip(reversed(curves), reversed(taken), strict=True):
        index = int(where[left])
        choice.append(index)
        left -= -(-curve[index].cost // unit)
    return tuple(reversed(choice))


def waterfill(gains: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    """How many singular values each layer keeps: those whose gain per parameter is largest, while they fit.

    Args:
        gains: the squares of a layer's singular values, decreasing, times the weight of the layer.
        costs: what one more costs in that layer.
    """
    order = sorted(
        ((gain / cost, layer) for layer, (row, cost) in enumerate(zip(gains, costs, strict=True)) for gain in row), reverse=True
    )
    ranks = [0] * len(costs)
    for _, layer in order:
        if costs[layer] > budget:
            break
        budget -= costs[layer]
        ranks[layer] += 1
    return ranks


def between(x: float, points: Mapping[int, float]) -> float:
    """Linear between the points, constant outside.

    Example:
        >>> between(3, {2: 1.0, 4: 2.0}), between(9, {2: 1.0, 4: 2.0})
        (1.5, 2.0)
    """
    below, above = [p for p in points if p <= x], [p for p in points if p >= x]
    if not below or not above:
        return points[min(points) if not below else max(points)]
    low, high = max(below), min(above)
    return points[low] if low == high else points[low] + (points[high] - points[low]) * (x - low) / (high - low)


def threshold(curves: Sequence[Curve], budget: int) -> Choice:
    """The choice by one threshold for all layers: what gains no less of the loss per cost than that is taken, while it fits.

    A layer whose options but dense all lie above the threshold becomes dense if the rest of the budget suffices.

    Args:
        curves: by increasing cost, dense last; the others in equal steps of cost, with losses that fall ever more slowly.

    Raises:
        UsageError: as of ``require_feasible``.
    """
    require_feasible(curves, budget)
    gains = [[a.loss - b.loss for a, b in pairwise(curve[:-1])] for curve in curves]
    steps = [curve[1].cost - curve[0].cost if len(curve) > 2 else 1 for curve in curves]
    choice = waterfill(gains, steps, budget - sum(curve[0].cost for curve in curves))
    left = budget - spent(curves, tuple(choice))
    full = [layer for layer, curve in enumerate(curves) if choice[layer] == len(curve) - 2]
    price = {layer: curves[layer][-1].cost - curves[layer][-2].cost for layer in full}
    for layer in sorted(full, key=lambda layer: curves[layer][-2].loss / max(1, price[layer]), reverse=True):
        if price[layer] <= left:
            choice[layer] += 1
            left -= price[layer]
    return tuple(choice)


def evolve(
    curves: Sequence[Curve],
    budget: int,
    start: Choice,
    fitness: Callable[[Choice, int], float],
    generations: int,
    offspring: int = 8,
    survivors: Sequence[int] = (2, 1),
    seed: int = 0,
) -> Choice:
    """Improve a choice by what candidates measure: one parent, children that move budget from one layer to another.

    A generation's children are measured on little first, the best of them on more; the parent joins the last stage.
    EvoPress (arXiv:2410.14649), with layers that need not have options of equal cost: a child pays for what it takes.

    Args:
        fitness: the loss of a choice at a stage (0, 1, …), small first; every candidate of a stage sees the same data.
        survivors: how many go on from each stage; the last is 1.
    """
    draw = random.Random(seed)
    parent, last = start, len(survivors) - 1
    for _ in range(generations):
        children = {_child(curves, budget, parent, draw) for _ in range(offspring)} - {parent}
        pool = sorted(children)
        for stage, kept in enumerate(survivors):
            pool = [*pool, parent] if stage == last else pool
            losses = {candidate: fitness(candidate, stage) for candidate in pool}
            pool = sorted(pool, key=losses.__getitem__)[:kept]
        parent = pool[0]
    return parent


def _child(curves: Sequence[Curve], budget: int, parent: Choice, draw: random.Random) -> Choice:
    """Some layers take their next larger option, others pay with their next smaller ones."""
    choice, order = list(parent), [sorted(range(len(c)), key=lambda i, c=c: c[i].cost) for c in curves]  # type: ignore[misc]

    def move(layer: int, by: int) -> bool:
        place = order[layer].index(choice[layer]) + by
        if not 0 <= place < len(order[layer]):
            return False
        choice[layer] = order[layer][place]
        return True

    grown = {layer for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))) if move(layer := draw.randrange(len(curves)), 1)}
    payers = [layer for layer in range(len(curves)) if layer not in grown]
    while spent(curves, tuple(choice)) > budget:
        payers = [layer for layer in payers if order[layer].index(choice[layer]) > 0]
        if not payers:
            return parent
        move(draw.choice(payers), -1)
    return tuple(choice)
