"""A choice within the budget, the cheapest there is; what units share is counted once."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tautomer.rewrite.allocation import Choice
from tautomer.rewrite.budget import Budget, Trial
from tautomer.rewrite.saved import SavedTensor, SavedTensors

UNITS, WAYS = 4, 3


def kept(node: str, size: int, *needed_by: str) -> SavedTensor:
    return SavedTensor(node, "value", "op", (size,), torch.uint8, size, needed_by, needed_by)


def tried(sizes: list[list[int]], flops: list[list[int]], shared: dict[tuple[int, ...], int], choice: Choice) -> Trial:
    """Every unit keeps its own; a storage of ``shared`` stays while one of its units has way 0."""
    names = {f"n{unit}": unit for unit in range(UNITS)}
    tensors = [kept(f"own {unit} {way}", sizes[unit][way], f"n{unit}") for unit, way in enumerate(choice)]
    for units, size in shared.items():
        needed = [f"n{unit}" for unit in units if choice[unit] == 0]
        tensors += [kept(f"shared {units}", size, *needed)] if needed else []
    again = {f"n{unit}": flops[unit][way] for unit, way in enumerate(choice)}
    return Trial(SavedTensors("model", tuple(tensors), again=again), names)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sharing", [False, True])
def test_it_is_the_best_of_all_choices(seed: int, sharing: bool) -> None:
    draw = random.Random(seed)
    sizes = [sorted((draw.randint(1, 30) for _ in range(WAYS)), reverse=True) for _ in range(UNITS)]
    flops = [sorted(draw.randint(0, 50) for _ in range(WAYS)) for _ in range(UNITS)]
    shared = {(0, 1): 7, (1, 2, 3): 4} if sharing else {}
    every = {c: tried(sizes, flops, shared, c).saved for c in itertools.product(range(WAYS), repeat=UNITS)}
    budget = Budget(UNITS, WAYS, lambda choice: tried(sizes, flops, shared, choice))
    floor = min(saved.bytes for saved in every.values())
    for limit in range(floor, max(saved.bytes for saved in every.values()) + 1, 3):
        choice = budget.best(limit)
        assert choice is not None and every[choice].bytes <= limit
        if not sharing:  # else what two of them need may be counted twice, and a little is left
            assert every[choice].recomputed == min(saved.recomputed for saved in every.values() if saved.bytes <= limit)
    assert budget.best(floor - 1) is None


def test_what_all_ways_of_a_unit_need_is_kept_for_good() -> None:
    def mask(choice: Choice) -> Trial:
        needed = [f"n{unit}" for unit, way in enumerate(choice) if unit == 0 or way == 0]
        own = [kept(f"own {unit} {way}", 10 if way == 0 else 1, f"n{unit}") for unit, way in enumerate(choice)]
        tensors = (kept("mask", 100, *needed), *own)
        return Trial(SavedTensors("model", tensors, again={f"n{u}": way for u, way in enumerate(choice)}), {"n0": 0, "n1": 1})

    budget = Budget(2, 2, mask)
    assert budget.base == 100 and [[option.cost for option, _ in options] for options in budget.options] == [[10, 1], [10, 1]]
    assert sum(budget.best(111) or ()) == 1
