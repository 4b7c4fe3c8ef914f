"""What may be chosen for the parts of a program, as steps of the dynamic program of budget.py, and what a choice comes to.

    a block is run again: what it is given is kept     or     one option for each group of effects that touch the same calls

An effect that touches several blocks, or is asked for by one elsewhere, is chosen before them, and each block keeps to it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .budget import Option, Way, cheapest, smallest
from .effects import Effects, Key, Version

TOGETHER = 8
"""How many effects on the same calls are chosen one by one; more of them are chosen together."""


_Unit = tuple[tuple[int, int], list[Way]]
"""A unit of the dynamic program, with its place among the others."""


@dataclass(frozen=True)
class Again:
    """A block that may be run again: what it is given, which it keeps, and what that costs."""

    given: frozenset[Key]
    flops: int


@dataclass(frozen=True)
class Choice:
    """The effects, and the blocks that are run again, by number."""

    effects: frozenset[int] = frozenset()
    again: frozenset[int] = frozenset()


class Options:
    """The choices for a program.

    Args:
        unit: of captured calls, the block, by number from 1; others are outside of blocks, which is unit 0.
        again: the blocks that may be run again.
        order: where each captured call stands.
    """

    def __init__(self, effects: Effects, unit: Mapping[str, int], again: Mapping[int, Again], order: Mapping[str, int]) -> None:
        self.effects, self.unit, self.again, self.order = effects, unit, again, order
        self.bits: dict[Key | int, int] = {}
        self.sizes: list[int] = []
        self.wide = self._wide()
        self.held: dict[int, set[str]] = defaultdict(set)
        for call in effects.captured:
            self.held[unit.get(call, 0)].add(call)
        units = list(self._units())
        units += [
            self._switches(group, units) for group in _connected([{i, *(effects.found[i].asks & self.wide)} for i in self.wide])
        ]
        self.units = [ways for _, ways in sorted(units, key=lambda pair: pair[0])]

    def best(self, budget: int) -> Choice | None:
        """What computes the least again within ``budget`` bytes, and of that what keeps least; None if nothing does."""
        options = cheapest(self.units, self.sizes, budget)
        return None if options is None else self._choice(options)

    def least(self) -> Choice:
        """What keeps least."""
        return self._choice(smallest(self.units, self.sizes))

    def outcome(self, choice: Choice) -> tuple[int, int]:
        """The bytes that are kept, and the FLOPs that are computed again."""
        kept, flops = set[Key](), 0
        for unit in choice.again:
            kept |= self.again[unit].given
            flops += self.again[unit].flops
        for call in {call for calls in (self.effects.captured, *self._made(choice)) for call in calls}:
            if self.unit.get(call, 0) not in choice.again:
                version = self.effects.version(call, choice.effects)
                kept |= version.needs
                flops += version.again
        return sum(self.effects.sizes[key] for key in kept), flops

    def _made(self, choice: Choice) -> list[Mapping[str, Version]]:
        return [self.effects.found[index].makes for index in choice.effects]

    def units_of(self, index: int) -> set[int]:
        """The units that an effect has to do with."""
        effect = self.effects.found[index]
        return {self.unit.get(call, 0) for call in (*effect.at, *effect.makes)}

    # -- as steps ---------------------------------------------------------------------------------------------

    def _wide(self) -> set[int]:
        found, own = range(len(self.effects.found)), [self.units_of(i) for i in range(len(self.effects.found))]
        wide = {i for i in found if len(own[i]) > 1}
        return wide | {j for i in found for asked in self.effects.found[i].asks if own[i] != own[asked] for j in (i, asked)}

    def _units(self) -> Iterator[_Unit]:
        """The units of the dynamic program with their places."""
        for unit in sorted({*self.held, *(unit for i in range(len(self.effects.found)) for unit in self.units_of(i))}):
            fixed, groups = self._groups(unit)
            steps = [(min(map(self._place, calls)), self._step(calls, effects)) for calls, effects in groups]
            needs = Option(self._set(frozenset[Key]().union(*(v.needs for v in fixed))), sum(v.again for v in fixed))
            if unit in self.again:
                place = min(map(self._place, self.held[unit]))
                yield (place, 1), [[[needs], *(step for _, step in sorted(steps, key=lambda s: s[0]))], [[self._again(unit)]]]
            else:
                yield (-1, 1), [[[needs]]]
                for place, step in steps:
                    yield (place, 1), [[step]]

    def _place(self, call: str) -> int:
        return self.order.get(call, -1)

    def _switches(self, wide: set[int], units: Sequence[_Unit]) -> _Unit:
        """Whether each of some wide effects is chosen, before all that depends on it."""
        bits = self._set(wide)
        spoken = [place for (place, _), ways in units if any(o.things & bits for way in ways for step in way for o in step)]
        return (min(spoken, default=-1), 0), [[self._switch(i) for i in sorted(wide)]]

    def _switch(self, index: int) -> list[Option]:
        asks = self._set(self.effects.found[index].asks)
        return [Option(), Option(self._set({index}), asks=asks, label=Choice(frozenset({index})))]

    def _again(self, unit: int) -> Option:
        wide = self._set({i for i in self.wide if unit in self.units_of(i)})
        return Option(self._set(self.again[unit].given), self.again[unit].flops, bars=wide, label=Choice(again=frozenset({unit})))

    def _groups(self, unit: int) -> tuple[list[Version], list[tuple[set[str], set[int]]]]:
        """The calls of a unit that no effect changes, and the others with theirs, those together that must be."""
        here = [i for i, effect in enumerate(self.effects.found) if any(self.unit.get(c, 0) == unit for c in effect.makes)]
        sets = list[set[object]]()
        for i in here:
            calls = {call for call in self.effects.found[i].makes if self.unit.get(call, 0) == unit}
            local = {j for j in (i, *self.effects.found[i].asks) if j not in self.wide}
            sets.append({*calls, *local})
        groups = list[tuple[set[str], set[int]]]()
        for joined in _connected(sets):
            calls = {x for x in joined if isinstance(x, str)}
            groups.append((calls, {i for i in here if calls & self.effects.found[i].makes.keys()}))
        changed = {call for calls, _ in groups for call in calls}
        return [self.effects.captured[call] for call in self.held[unit] - changed], groups

    def _step(self, calls: set[str], effects: set[int]) -> list[Option]:
        """An option for each choice among ``effects``, as far as ``calls`` go."""
        wide, local = effects & self.wide, sorted(effects - self.wide)
        together = [frozenset({i}) for i in local[: TOGETHER - 1]] + [frozenset(local[TOGETHER - 1 :])] * (len(local) >= TOGETHER)
        options = list[Option]()
        for chosen, given in itertools.product(_subsets(together), _subsets([frozenset({i}) for i in sorted(wide)])):
            asks = frozenset[int]().union(*(self.effects.found[i].asks for i in chosen))
            if not asks - self.wide <= chosen:
                continue
            versions = [self.effects.version(call, chosen | given) for call in calls]
            needs = self._set(frozenset[Key]().union(*(version.needs for version in versions)))
            on, off = self._set(given | (asks & self.wide)), self._set(wide - given)
            options.append(Option(needs, sum(version.again for version in versions), on, off, Choice(chosen)))
        return options

    def _set(self, things: Collection[Key | int]) -> int:
        """A set of storages and of wide effects, which have no size, as bits."""
        found = 0
        for thing in things:
            if thing not in self.bits:
                self.bits[thing] = 1 << len(self.sizes)
                self.sizes.append(self.effects.sizes[thing] if isinstance(thing, tuple) else 0)
            found |= self.bits[thing]
        return found

    @staticmethod
    def _choice(options: Sequence[Option]) -> Choice:
        chosen = [option.label for option in options if option.label is not None]
        return Choice(frozenset().union(*(c.effects for c in chosen)), frozenset().union(*(c.again for c in chosen)))


def _subsets(parts: Sequence[frozenset[int]]) -> Iterator[frozenset[int]]:
    for size in range(len(parts) + 1):
        for chosen in itertools.combinations(parts, size):
            yield frozenset[int]().union(*chosen)


def _connected(sets: Sequence[set[object]] | Sequence[set[int]]) -> list[set]:  # type: ignore[type-arg]
    """The unions of sets that meet."""
    joined = list[set]()  # type: ignore[type-arg]
    for one in sets:
        met = [other for other in joined if other & one]
        joined = [other for other in joined if not other & one] + [set(one).union(*met)]
    return joined
