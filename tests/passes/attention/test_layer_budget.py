"""The plan is the best there is where movements add up; where they do not, what is chosen stays within the budget too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest

from tautomer.passes.attention.layer_budget import choose

SAVED = {"a": 6.0, "b": 5.0, "c": 5.0, "d": 1.0}
MOVES = {"a": 0.6, "b": 0.5, "c": 0.45, "d": 0.02}


def adding(counted: list[int] | None = None, factor: Callable[[int], float] = lambda n: 1.0) -> Callable[[Sequence[str]], float]:
    def moved(items: Sequence[str]) -> float:
        if counted is not None:
            counted.append(len(items))
        return factor(len(items)) * sum(MOVES[item] for item in items)

    return moved


@pytest.mark.parametrize("budget", [0.01, 0.5, 0.6, 0.99, 1.0, 1.2, 1.6])
def test_where_movements_add_up_nothing_within_the_budget_saves_more(budget: float) -> None:
    chosen = choose(SAVED, budget, adding())
    sets = [s for n in range(5) for s in combinations(SAVED, n) if sum(MOVES[x] for x in s) <= budget - 1e-9]
    assert sum(SAVED[x] for x in chosen.items) == max(sum(SAVED[x] for x in s) for s in sets)
    assert chosen.selection.how == "planned" and chosen.selection.measured == pytest.approx(chosen.selection.predicted)
    assert set(chosen.items) | set(chosen.refused) == set(SAVED) and list(chosen.items) == sorted(chosen.items)


def test_a_plan_takes_a_measurement_each_and_one_for_itself() -> None:
    counted: list[int] = []
    assert choose(SAVED, 1.6, adding(counted)).items == ("a", "b", "c", "d")
    assert counted == [1, 1, 1, 1, 4]


def test_where_they_move_less_together_more_are_taken() -> None:
    half = adding(factor=lambda n: 1.0 if n == 1 else 0.5)
    chosen = choose(SAVED, 0.8, half)
    assert chosen.items == ("a", "b", "c", "d") and chosen.selection.measured == pytest.approx(0.785)
    assert chosen.selection.predicted > chosen.selection.budget


def test_where_they_move_more_together_they_are_taken_one_by_one() -> None:
    triple = adding(factor=lambda n: 1.0 if n == 1 else 3.0)
    chosen = choose(SAVED, 1.0, triple)
    assert chosen.selection.how == "greedy" and chosen.items == ("d",)
    assert chosen.selection.measured <= 1.0 and chosen.refused["c"] == pytest.approx(3 * 0.47)


def test_what_is_no_number_or_too_much_alone_is_left() -> None:
    moves = {"a": math.nan, "b": math.inf, "c": 2.0, "d": -1e-9}
    chosen = choose(SAVED, 1.0, lambda items: sum(moves[item] for item in items))
    assert chosen.items == ("d",) and chosen.refused["c"] == 2.0 and math.isnan(chosen.refused["a"])
    assert choose(SAVED, 0.0, lambda items: sum(moves[item] for item in items)).items == ("d",)
