"""One way for every unit of a program, so that its backward keeps no more than a budget and computes the least again.

    min Σ_u flops(u, w_u)    such that    kept(w) <= budget

What units keep does not quite add up: what several of them need is kept once. Each way is tried in all units at once, which gives
a curve per unit; the dynamic program of allocation.py chooses; the whole choice is tried, and chosen anew with what it kept
too much, or left.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .allocation import Choice, Option, allocate
from .saved import SavedTensors

TRIES = 6
Key = tuple[object, ...]
"""What tells a storage from others, in whatever way its units keep it."""


@dataclass(frozen=True)
class Trial:
    """What a program keeps under some choice.

    Attributes:
        saved: what its backward keeps, and computes again.
        unit: the unit of its calls, by name; others are of unit 0.
        fired: the rewrites that fired.
    """

    saved: SavedTensors
    unit: Mapping[str, int]
    fired: frozenset[str] = frozenset()

    def by_unit(self, amounts: Mapping[str, int]) -> Counter[int]:
        found = Counter[int]()
        for name, amount in amounts.items():
            found[self.unit.get(name, 0)] += amount
        return found

    @property
    def again(self) -> Counter[int]:
        """The FLOPs that are computed again, by unit."""
        return self.by_unit(self.saved.again)

    @property
    def kept(self) -> Counter[int]:
        """Bytes by the unit of the first node that needs them."""
        first = Counter[str]()
        for tensor in self.saved.tensors:
            first[tensor.needed_by[0]] += tensor.bytes
        return self.by_unit(first)


class Budget:
    """The choice of a way for every unit.

    Args:
        units, ways: how many there are. Way 0 is to keep everything.
        tried: what is kept under a choice; asked once for each.

    Attributes:
        base: the bytes that are kept whatever is chosen.
        options: for every unit the ways worth choosing, with what they keep on top of that.
    """

    def __init__(self, units: int, ways: int, tried: Callable[[Choice], Trial]) -> None:
        self._tried, self._known = tried, dict[Choice, Trial]()
        trials = [self.tried((way,) * units) for way in range(ways)]
        self.base, own = _bytes(trials)
        again = [trial.again for trial in trials]
        self.options = [
            _undominated([(Option(own[unit, way], float(again[way][unit])), way) for way in range(ways)]) for unit in range(units)
        ]

    def tried(self, choice: Choice) -> Trial:
        if choice not in self._known:
            self._known[choice] = self._tried(choice)
        return self._known[choice]

    def best(self, budget: int) -> Choice | None:
        """The choice that computes the least again within ``budget`` bytes, of those that were tried; None if none is found."""
        least = self.least()
        found = least if self.tried(least).saved.bytes <= budget else None
        aim, aims = budget, set[int]()
        while aim not in aims and len(aims) < TRIES:
            choice = self.choice(aim)
            saved = self.tried(choice).saved
            if saved.bytes <= budget and (found is None or saved.recomputed < self.tried(found).saved.recomputed):
                found = choice
            aims.add(aim)
            aim += budget - saved.bytes
        return found

    def choice(self, aim: int) -> Choice:
        """The best choice as if the parts added up."""
        curves = [[option for option, _ in options] for options in self.options]
        unit = math.gcd(*(option.cost for curve in curves for option in curve)) or 1
        room = (aim - self.base) // unit
        if sum(min(option.cost for option in curve) for curve in curves) > room * unit:
            return self.least()
        coarse = [[Option(cost // unit, loss) for cost, loss in curve] for curve in curves]
        return tuple(options[index][1] for options, index in zip(self.options, allocate(coarse, room), strict=True))

    def least(self) -> Choice:
        """What keeps least."""
        return tuple(min(options, key=lambda pair: pair[0].cost)[1] for options in self.options)


def _bytes(trials: Sequence[Trial]) -> tuple[int, Counter[tuple[int, int]]]:
    """What is kept whatever is chosen, and what is kept on top for every unit in every way.

    What one unit alone needs is its own. What several need is kept for good if one of them needs it in all of its ways; else each
    pays for it, which is too much where two of them choose so.
    """
    needed, size = defaultdict[Key, set[tuple[int, int]]](set), dict[Key, int]()
    for way, trial in enumerate(trials):
        seen = Counter[Key]()
        for tensor in trial.saved.tensors:
            alike: Key = (tensor.node, tensor.kind, tensor.made_by, tensor.bytes)
            key = (*alike, seen[alike])
            seen[alike] += 1
            size[key] = tensor.bytes
            needed[key] |= {(trial.unit.get(name, 0), way) for name in tensor.needed_by}
    base, own = 0, Counter[tuple[int, int]]()
    for key, pairs in needed.items():
        ways = Counter(unit for unit, _ in pairs)
        if len(ways) > 1 and len(trials) in ways.values():
            base += size[key]
        else:
            own.update(dict.fromkeys(pairs, size[key]))
    return base, own


def _undominated(options: Sequence[tuple[Option, int]]) -> list[tuple[Option, int]]:
    """Those for which no other, or none before, keeps as little and computes as little again."""
    kept = list[tuple[Option, int]]()
    for option, way in sorted(options, key=lambda pair: (pair[0].loss, pair[0].cost, pair[1])):
        if not kept or option.cost < kept[-1][0].cost:
            kept.append((option, way))
    return kept
