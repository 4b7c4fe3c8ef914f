"""The dynamic program is as good as trying everything; the search never makes a choice worse, and is repeatable."""

from __future__ import annotations

import random
from itertools import product

import pytest

from tautomer.rewrite.allocation import Option, allocate, between, evolve, spent, threshold, waterfill
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


def convex(seed: int) -> list[list[Option]]:
    """Options in equal steps with losses that fall ever more slowly, dense last."""
    draw = random.Random(seed)
    made = []
    for size in (4, 6, 9):
        gains = sorted((draw.random() * size for _ in range(5)), reverse=True)
        made.append([Option(size * (i + 1), sum(gains[i:])) for i in range(5)] + [Option(8 * size, 0.0)])
    return made


@pytest.mark.parametrize("seed", range(4))
def test_one_threshold_is_nearly_the_best_without_dense(seed: int) -> None:
    """It fills the budget by gain per cost, so it is at most one step short of the best."""
    given = convex(seed)
    without = [curve[:-1] for curve in given]
    for budget in range(28, 100, 7):
        choice = threshold(given, budget)
        assert spent(given, choice) <= budget
        assert loss(choice, given) <= best(without, budget - 9) + 1e-12
        if all(index < 5 for index in choice):
            assert loss(choice, given) >= best(without, budget) - 1e-12


def test_a_layer_above_the_threshold_becomes_dense_if_that_fits() -> None:
    given = convex(0)
    full = sum(curve[-1].cost for curve in given)
    assert threshold(given, full) == (5, 5, 5)
    smallest_is_dense = sum(curve[-2].cost for curve in given) + 3 * 4
    assert threshold(given, smallest_is_dense) == (5, 4, 4) and threshold(given, smallest_is_dense - 1) == (4, 4, 4)
    assert threshold([[Option(64, 0.0)], *given], 64 + 19) == (0, 0, 0, 0)
    with pytest.raises(UsageError, match="the smallest factors have 19"):
        threshold(given, 18)


def test_between_points() -> None:
    points = {2: 1.0, 4: 3.0, 8: 3.5}
    assert [between(x, points) for x in (0, 2, 3, 4, 6, 8, 9)] == [1.0, 1.0, 2.0, 3.0, 3.25, 3.5, 3.5]


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
