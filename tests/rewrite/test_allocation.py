"""The dynamic program is as good as trying everything; the search never makes a choice worse, and is repeatable."""

from __future__ import annotations

import random
from itertools import product

import pytest

from tautomer.rewrite.allocation import Option, allocate, evolve, spent, waterfill
from tautomer.rewrite.errors import UsageError


def curves(seed: int) -> list[list[Option]]:
    """Three layers; the last option of each is dense: without loss, and dearer than its factors."""
    draw = random.Random(seed)
    made = []
    for size in (40, 60, 90):
        losses = sorted((draw.random() * size for _ in range(5)), reverse=True)
        made.append([Option(size * (i + 1) // 6, loss) for i, loss in enumerate(losses)] + [Option(size, 0.0)])
    return made


def loss(choice: tuple[int, ...], given: list[list[Option]]) -> float:
    return sum(curve[index].loss for curve, index in zip(given, choice, strict=True))


def best(given: list[list[Option]], budget: int) -> float:
    everything = product(*(range(len(curve)) for curve in given))
    return min(loss(choice, given) for choice in everything if spent(given, choice) <= budget)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [40, 77, 110, 150, 190, 400])
def test_as_good_as_trying_everything(seed: int, budget: int) -> None:
    given = curves(seed)
    choice = allocate(given, budget)
    assert spent(given, choice) <= budget
    assert loss(choice, given) == pytest.approx(best(given, budget), abs=1e-12)


def test_dense_is_an_option_worth_having() -> None:
    given = curves(0)
    without = [curve[:-1] for curve in given]
    assert any(best(given, budget) < 0.9 * best(without, budget) for budget in range(60, 180, 10))


def test_large_costs_are_counted_in_units() -> None:
    given = [[Option(o.cost * 100_003, o.loss) for o in curve] for curve in curves(1)]
    budget = 110 * 100_003
    choice = allocate(given, budget)
    assert spent(given, choice) <= budget and loss(choice, given) <= 1.05 * best(given, budget)


def test_a_budget_below_the_floor_names_it() -> None:
    floor = sum(curve[0].cost for curve in curves(0))
    assert allocate(curves(0), floor) == (0, 0, 0)
    with pytest.raises(UsageError, match=rf"the smallest factors have {floor}"):
        allocate(curves(0), floor - 1)


def test_waterfilling_keeps_what_gains_most() -> None:
    draw = random.Random(0)
    gains = [sorted((draw.random() for _ in range(4)), reverse=True) for _ in range(3)]
    for budget in range(1, 13):
        ranks = waterfill(gains, [1, 1, 1], budget)
        kept = sum(sum(row[:rank]) for row, rank in zip(gains, ranks, strict=True))
        everything = (r for r in product(range(5), repeat=3) if sum(r) <= budget)
        assert kept == pytest.approx(max(sum(sum(row[:k]) for row, k in zip(gains, r, strict=True)) for r in everything))


def test_the_search_finds_what_does_not_add_up() -> None:
    """Losses are as predicted, but two layers must not both be small."""
    given, budget = curves(2), 110

    def fitness(choice: tuple[int, ...], stage: int) -> float:
        return loss(choice, given) + (50.0 if choice[0] < 3 and choice[1] < 3 else 0.0)

    start = allocate(given, budget)
    found = evolve(given, budget, start, fitness, generations=40)
    assert spent(given, found) <= budget and fitness(found, 1) <= fitness(start, 1)
    assert found == evolve(given, budget, start, fitness, generations=40)
    everything = product(*(range(len(curve)) for curve in given))
    assert fitness(found, 1) == pytest.approx(min(fitness(c, 1) for c in everything if spent(given, c) <= budget))
