"""The cheapest choice within a budget, held to every choice there is; what steps share is paid once."""

from __future__ import annotations

import itertools
import random

import pytest

from tautomer.rewrite import budget as solver
from tautomer.rewrite.budget import Option, Way, cheapest, smallest

Units = list[list[Way]]


def every(units: Units, sizes: list[int]) -> list[tuple[int, int]]:
    """Cost and size of every choice."""
    found = []
    for ways in itertools.product(*units):
        for options in itertools.product(*(step for way in ways for step in way)):
            needed, possible = 0, True
            for option in options:
                possible = possible and not option.asks & ~needed and not option.bars & needed
                needed |= option.needs
            if possible:
                found.append((sum(o.cost for o in options), _size(needed, sizes)))
    return found


def _size(things: int, sizes: list[int]) -> int:
    return sum(size for bit, size in enumerate(sizes) if things >> bit & 1)


def problem(seed: int) -> tuple[Units, list[int]]:
    """Steps that share things, and some that depend on what was chosen before."""
    draw, bits = random.Random(seed), 9
    sizes = [0, 0, *(draw.randint(1, 20) for _ in range(bits - 2))]

    def option() -> Option:
        needs = sum(1 << bit for bit in draw.sample(range(bits), 3))
        asks, bars = (1 << draw.randrange(2) if draw.random() < 0.2 else 0 for _ in range(2))
        return Option(needs, draw.choice([0, 0, 3, 7, 7, draw.randint(1, 40)]), asks, bars)

    def way() -> Way:
        return [[Option(draw.getrandbits(bits)), *(option() for _ in range(2))] for _ in range(draw.randint(1, 2))]

    return [[way() for _ in range(draw.randint(1, 2))] for _ in range(3)], sizes


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_cheapest_of_all_choices_and_of_these_the_smallest(seed: int) -> None:
    units, sizes = problem(seed)
    choices = every(units, sizes)
    for budget in {size + more for _, size in choices for more in (0, 1)} | {sum(sizes)}:
        best = min(choice for choice in choices if choice[1] <= budget)
        options = cheapest(units, sizes, budget)
        assert options is not None
        needed = 0
        for option in options:
            needed |= option.needs
        assert (sum(o.cost for o in options), _size(needed, sizes)) == best
    floor = min(size for _, size in choices)
    assert cheapest(units, sizes, floor - 1) is None
    assert sum(o.cost for o in smallest(units, sizes)) == min(cost for cost, size in choices if size == floor)


def test_what_two_steps_need_is_paid_once() -> None:
    keep, again = Option(0b01, 0), Option(0b10, 5)
    assert cheapest([[[[keep, again]]], [[[keep, again]]]], [10, 1], 10) == [keep, keep]


def test_too_many_partial_choices_are_thinned_and_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    steps: Way = [[Option(1 << i), Option(0, draw.randint(50, 99))] for i in range(16)]
    sizes = [draw.randint(50, 99) for _ in range(16)]
    exact = cheapest([[steps]], sizes, 600)
    monkeypatch.setattr(solver, "LIMIT", 20)
    near = cheapest([[steps]], sizes, 600)
    assert exact is not None and near is not None and sum(_size(o.needs, sizes) for o in near) <= 600
    assert sum(o.cost for o in exact) <= sum(o.cost for o in near) <= 1.2 * sum(o.cost for o in exact)
