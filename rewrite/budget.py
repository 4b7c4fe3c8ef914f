"""The cheapest choice whose union of needs fits a budget: an exact dynamic program over what is kept so far.

    min Σ_s cost(o_s)    such that    Σ { size(x) : x in ∪_s needs(o_s) } <= budget        one option o_s for every step s

What several options need is paid once. A state is the set of things needed so far that a later step may speak of; of the
choices that lead to it, those stay for which no other needs as little and costs as little. Things of size 0 carry what was chosen
to the steps that depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LIMIT = 50_000
"""How many partial choices are followed; above, those that are near another are not (never so in the models that are tested)."""


@dataclass(frozen=True)
class Option:
    """One way to take a step. Sets of things are numbers, a bit for each.

    Attributes:
        needs: what is kept for it.
        cost: what it costs.
        asks, bars: what options before must, and must not, need.
        label: what it is, for who asked.
    """

    needs: int = 0
    cost: int = 0
    asks: int = 0
    bars: int = 0
    label: Any = None

    @property
    def things(self) -> int:
        return self.needs | self.asks | self.bars


Way = Sequence[Sequence[Option]]
"""Steps, in order; of each, one option is taken."""
_Trail = tuple[Any, Option] | None
_Choices = dict[int, list[tuple[int, int, _Trail]]]
"""Cost, size and options of partial choices, by the state."""


def cheapest(units: Sequence[Sequence[Way]], sizes: Sequence[int], budget: int) -> list[Option] | None:
    """The options of the cheapest choice that fits, the smallest of the equally cheap; None if none fits.

    Args:
        units: for each, ways of which one is gone.
        sizes: of the things, by bit.
    """
    table, behind = _Sizes(sizes), _behind(units)
    least = _least(units, table)
    choices: _Choices = {0: [(0, 0, None)]}
    for index, ways in enumerate(units):
        found: _Choices = {}
        for way in ways:
            rest = _suffixes([_things(step) for step in way], behind[index + 1])
            reached = choices
            for step, open_ in zip(way, rest, strict=True):
                reached = _thinned(_advance(reached, step, table, open_, budget - least[index + 1]))
            for state, entries in reached.items():
                found.setdefault(state, []).extend(entries)
        choices = _thinned({state: _undominated(entries) for state, entries in found.items()})
    ends = [entry for entries in choices.values() for entry in entries]
    return list(_options(min(ends, key=lambda entry: entry[:2])[2]))[::-1] if ends else None


def smallest(units: Sequence[Sequence[Way]], sizes: Sequence[int]) -> list[Option]:
    """The options of the choice that needs least, the cheapest of the equally small."""
    low, high = 0, sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if cheapest(units, sizes, middle) is None:
            low = middle + 1
        else:
            high = middle
    found = cheapest(units, sizes, low)
    assert found is not None, "some choice is always possible"
    return found


class _Sizes:
    """The size of a set, remembered."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.known = sizes, dict[int, int]()

    def __call__(self, things: int) -> int:
        if things not in self.known:
            self.known[things] = sum(size for bit, size in enumerate(self.sizes) if things >> bit & 1)
        return self.known[things]


def _advance(choices: _Choices, step: Sequence[Option], size: _Sizes, open_: int, most: int) -> _Choices:
    """``choices`` with one option of ``step`` each; ``open_`` are the things that later steps speak of."""
    found: _Choices = {}
    for state, entries in choices.items():
        for option in step:
            if option.asks & ~state or option.bars & state:
                continue
            more = size(option.needs & ~state)
            after = found.setdefault((state | option.needs) & open_, [])
            after.extend((c + option.cost, s + more, (trail, option)) for c, s, trail in entries if s + more <= most)
    return {state: _undominated(entries) for state, entries in found.items() if entries}


def _undominated(entries: Iterable[tuple[int, int, _Trail]]) -> list[tuple[int, int, _Trail]]:
    kept = list[tuple[int, int, _Trail]]()
    for entry in sorted(entries, key=lambda entry: entry[:2]):
        if not kept or entry[1] < kept[-1][1]:
            kept.append(entry)
    return kept


def _thinned(choices: _Choices) -> _Choices:
    """At most about ``LIMIT`` of them; of each state the cheapest and the smallest stay."""
    every = -(-sum(map(len, choices.values())) // LIMIT)
    if every <= 1:
        return choices
    return {state: [*entries[:-1:every], entries[-1]] for state, entries in choices.items()}


def _least(units: Sequence[Sequence[Way]], size: _Sizes) -> list[int]:
    """What units from each on need at the least: of what no other unit speaks of, and each step by itself."""
    spoken = [_all(_things(step) for way in ways for step in way) for ways in units]
    least = [0]
    for index in reversed(range(len(units))):
        others = _all(spoken[:index] + spoken[index + 1 :])
        least.append(least[-1] + min(_least_of(way, others, size) for way in units[index]))
    return least[::-1]


def _least_of(way: Way, others: int, size: _Sizes) -> int:
    total = 0
    for index, step in enumerate(way):
        shared = others | _all(_things(other) for i, other in enumerate(way) if i != index)
        total += min(size(option.needs & ~shared) for option in step)
    return total


def _behind(units: Sequence[Sequence[Way]]) -> list[int]:
    """The things that units from each on speak of."""
    return [*_suffixes([_all(_things(step) for way in ways for step in way) for ways in units], 0, inclusive=True), 0]


def _suffixes(things: Sequence[int], last: int, inclusive: bool = False) -> list[int]:
    """For each, the union of ``last`` and of what comes after it, or with it."""
    found = list[int]()
    for thing in reversed(things):
        found.append(last | thing if inclusive else last)
        last |= thing
    return found[::-1]


def _things(step: Iterable[Option]) -> int:
    return _all(option.things for option in step)


def _all(sets: Iterable[int]) -> int:
    union = 0
    for one in sets:
        union |= one
    return union


def _options(trail: _Trail) -> Iterator[Option]:
    while trail is not None:
        trail, option = trail
        yield option
