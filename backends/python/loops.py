"""Calls of numbered modules in a row as one loop.

    y = self.h[0](x); z = self.h[1](y)      =      for block in self.h: x = block(x)

The turns must say the same, but for the number of the module and for what one turn hands to the next.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, fx

from .pieces import Code, Part, Var
from .statements import LOOP, Loop, Statement, attribute


def rolled(body: list[Statement], outputs: set[Hashable], lists: Mapping[str, int], path: str) -> Iterator[Statement | Loop]:
    """The statements with runs over numbered modules as loops."""
    renamed = dict[Hashable, Hashable]()
    position = 0
    while position < len(body):
        loop, length = _loop(body, position, outputs, lists, path)
        if loop is None:
            yield _renamed(body[position], renamed)
            position += 1
            continue
        loop.carried = [(renamed.get(a, a), b) for a, b in loop.carried]
        loop.body = [_renamed(statement, renamed) for statement in loop.body]
        turns = loop.stop - loop.start
        last = body[position + (turns - 1) * (length // turns) : position + length]
        for statement, made in zip(loop.body, last, strict=True):
            loop.last.update(zip(made.targets, statement.targets, strict=True))
        renamed.update(loop.last)
        yield loop
        position += length


def after(body: list[Statement | Loop]) -> dict[Hashable, Hashable]:
    found: dict[Hashable, Hashable] = {}
    for part in body:
        if isinstance(part, Loop):
            found.update(part.last)
    return found


def _renamed(statement: Statement, names: Mapping[Hashable, Hashable]) -> Statement:
    def name(part: Part) -> Part:
        return Var(names.get(part.value, part.value)) if isinstance(part, Var) else part

    return replace(statement, value=statement.value.mapped(name))


def _loop(
    body: list[Statement], position: int, outputs: set[Hashable], lists: Mapping[str, int], path: str
) -> tuple[Loop | None, int]:
    """The loop that starts at a statement, and how many statements it stands for."""
    first = body[position].index
    if first is None:
        return None, 0
    name, start = first
    groups = list[list[Statement]]()
    number = start
    at = position
    while at < len(body) and body[at].index == (name, number):
        end = at + 1
        while end < len(body) and body[end].index in (None, (name, number)):
            end += 1
        groups.append(body[at:end])
        at, number = end, number + 1
    if not groups:
        return None, 0
    length = min(len(group) for group in groups)
    if len(groups) == 1:
        length = 1
    groups[-1] = groups[-1][:length]
    count = 1
    while count < len(groups) and len(groups[count - 1]) == length and len(groups[count]) == length:
        count += 1
    full = f"{path}.{name}" if path else name
    while count >= (1 if lists.get(full) == 1 else 2):
        carried = _carried(groups[:count], body[position + count * length :], outputs, name)
        if carried is not None:
            whole = start == 0 and count == lists.get(full)
            turned = [replace(x, value=_opened(x.value, name, start)) for x in groups[0]]
            return Loop(name, start, start + count, whole, turned, carried), count * length
        count -= 1
    return None, 0


def _opened(value: Code, name: str, number: int) -> Code:
    """``value`` with ``self.name[number]`` as the variable of a loop."""
    text = "".join(str(p) for p in attribute(f"{name}.{number}").parts)
    parts = list[Part]()
    for part in value.parts:
        if not isinstance(part, str):
            parts.append(part)
            continue
        pieces = part.split(text)
        for index, piece in enumerate(pieces):
            parts.extend([LOOP, piece] if index else [piece])
    return Code(tuple(x for x in parts if x != ""), value.level, value.cost)


def _carried(
    groups: list[list[Statement]], rest: list[Statement], outputs: set[Hashable], name: str
) -> list[tuple[Hashable, Hashable]] | None:
    """What a turn hands to the next, if the groups are turns of one loop: pairs of before and after."""
    later = {v.value for statement in rest for v in statement.value.variables} | outputs
    number = groups[0][0].index[1] if groups[0][0].index else 0
    first = [_opened(x.value, name, number) for x in groups[0]]
    made = [t for x in groups[0] for t in x.targets]
    if len(groups) == 1:
        results = [t for t in made if t is not None and t in later]
        outside = [v.value for v in first[0].variables if v != LOOP]
        if len(results) != 1 or not outside or not _alike_values(outside[0], results[0]):
            return None
        return [(outside[0], results[0])]
    carried = dict[Hashable, Hashable]()
    before = groups[0]
    mapping: dict[Hashable, Hashable] = {}
    for turn, group in enumerate(groups[1:], 1):
        previous = {
            t: m for x, y in zip(groups[turn - 1], groups[0], strict=True) for t, m in zip(x.targets, y.targets, strict=False)
        }
        mapping = {}
        for x, y, opened in zip(before, group, first, strict=True):
            other = _opened(y.value, name, number + turn)
            if len(other.parts) != len(opened.parts) or len(x.targets) != len(y.targets) or x.spread != y.spread:
                return None
            for p, q in zip(opened.parts, other.parts, strict=True):
                if not isinstance(p, Var) or not isinstance(q, Var):
                    if p != q:
                        return None
                    continue
                if p == LOOP or q == LOOP:
                    if p != q:
                        return None
                    continue
                if mapping.get(q.value) == p.value and q.value in mapping:
                    continue
                if q.value in previous and p.value not in made and (turn == 1 or p.value in carried):
                    if carried.setdefault(p.value, previous[q.value]) != previous[q.value]:
                        return None
                elif q.value in mapping or p.value != q.value or q.value in previous or p.value in carried:
                    return None
            for s, t in zip(x.targets, y.targets, strict=True):
                if (s is None) != (t is None):
                    return None
                mapping[t] = s
        seen = {v.value for y in group for v in y.value.variables}
        if any(t in seen for older in groups[: turn - 1] for y in older for t in y.targets if t is not None):
            return None
    inner = {t for group in groups[:-1] for y in group for t in y.targets if t is not None}
    if inner & later or len(set(carried.values())) != len(carried):
        return None
    return list(carried.items()) if _in_order(before, first, carried) and carried else None


def _in_order(statements: list[Statement], opened: list[Code], carried: Mapping[Hashable, Hashable]) -> bool:
    """Whether no turn reads a carried value after it is made anew."""
    for old, new in carried.items():
        made = next((i for i, x in enumerate(statements) if new in x.targets), None)
        reads = [i for i, x in enumerate(opened) for v in x.variables if v.value == old]
        if made is None or any(i > made for i in reads):
            return False
    return True


def _alike_values(a: Hashable, b: Hashable) -> bool:
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == y.dim() and x.dtype == y.dtype
