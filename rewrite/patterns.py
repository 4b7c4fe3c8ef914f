"""Patterns: ``before`` compiled to one flat function, which can say why it did not match.

    before(op, x, g) = mul(rms_norm(x), g)     ->     def match(n0): if n0.target is mul: for l, r in both orders: …

The compiled function is a generator: it yields every way the pattern fits at a node, so that a condition that rejects
one way (the operands of a product in one order) does not hide another. Equality of two operands is congruence: one
node, or two pure calls that spell the same value.

The same writer, asked to explain, also notes where each attempt stopped; the deepest note is the nearest miss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from .equation import dtype, shape
from .errors import PatternError
from .metadata import value_of
from .ops import OPS, form_of, is_pure, normal
from .shapes import Size, same, same_shape
from .symbols import (
    SYMBOLS,
    AnyOf,
    Call,
    Fact,
    Variable,
    brief,
    calls_of,
    depth_of,
    operands_of,
    size_of,
    trace,
    variables_of,
)

# -- compiled patterns ----------------------------------------------------------------------------------------


class Found(NamedTuple):
    """One way a pattern fits.

    Attributes:
        values: what the variables are bound to, in the rule's order.
        roots: the nodes of the pattern's roots.
        nodes: every node the pattern names, roots included, each once.
        twins: (other, node): a second spelling of ``node``'s value that the pattern identified with it.
        way: the number of the way; two that share it and bind equal values are equal all over.
    """

    values: tuple[Any, ...]
    roots: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    twins: tuple[tuple[fx.Node, fx.Node], ...]
    way: int


_WAYS = itertools.count()


Matcher = Callable[..., Iterator[Found]]
Need = dict[int, tuple[frozenset[int], ...]]
"""What one operand may be: its target, and sets of targets of each of which one is among its own operands. By id."""


@dataclass(frozen=True)
class Entry:
    """One way into a pattern: its function, tried at nodes of one target that have the required operands.

    ``required`` holds needs: among the operands of the node, each must be met by one.
    """

    root: Call
    target: Callable[..., Any]
    required: tuple[Need, ...]
    match: Matcher

    def may_fit(self, operands: Sequence[tuple[int, ...]]) -> bool:
        """Whether a node with these ``operands`` may be its root: each a target, followed by those of its own operands."""
        for need in self.required:
            if not any(at[0] in need and all(map(set(at[1:]).intersection, need[at[0]])) for at in operands):
                return False
        return True

    def resembles(self, node: fx.Node) -> bool:
        """Whether ``node`` is an op of the root's kind that reads one op it should read."""
        if node.target is not self.target:
            return False
        return any(id(operand.target) in need for operand in node.all_input_nodes for need in self.required)


@dataclass(frozen=True)
class Pattern:
    """A compiled ``before``.

    Attributes:
        variables: in the order of the rule's parameters.
        roots: the symbolic roots.
        entries: one per alternative of the first root.
        size: how many ops it names; larger patterns go first.
        depth: how far below a root its deepest op is.
        named: the targets of its ops, by id.
        reads: the pairs of targets, by id, of which the first reads the second somewhere in it.
    """

    variables: tuple[Variable, ...]
    roots: tuple[Any, ...]
    entries: tuple[Entry, ...]
    size: int
    depth: int
    named: frozenset[int]
    reads: frozenset[tuple[int, int]]


def compile_pattern(before: Callable[..., Any], explain: bool = False) -> Pattern:
    """Compile ``before``. With ``explain``, matchers take a ``note`` that receives every stop.

    Raises:
        PatternError: a root is not an op, a variable is not reachable from the roots, or roots share nothing.
    """
    variables, roots = trace(before)
    seen = {v for root in roots for v in variables_of(root)}
    lost = [v.name for v in variables if v not in seen]
    if lost:
        raise PatternError(f"the left side does not mention {', '.join(lost)}")
    firsts = roots[0].alternatives if isinstance(roots[0], AnyOf) else (roots[0],)
    if not all(isinstance(first, Call) for first in firsts):
        raise PatternError("the left side must be an op")
    entries = []
    for first in firsts:
        match = _Writer(variables, (first, *roots[1:]), explain).function()
        entries.append(Entry(first, first.op.target, _required(first), match))
    calls = [call for root in roots for call in calls_of(root)]
    named = frozenset(id(call.op.target) for call in calls)
    reads = frozenset((id(call.op.target), id(operand.op.target)) for call in calls for operand in operands_of(call.args))
    return Pattern(variables, roots, tuple(entries), sum(map(size_of, roots)), max(map(depth_of, roots)), named, reads)


def _required(root: Call) -> tuple[Need, ...]:
    """What must be among the operands of the root: a few set operations reject most nodes."""
    return tuple(need for need in map(_need, root.args) if need)


def _need(pattern: Any) -> Need:
    """What ``pattern`` may be, two ops deep; empty if it may be anything."""
    if isinstance(pattern, Call):
        return {id(pattern.op.target): tuple(frozenset(targets) for targets in map(_targets, pattern.args) if targets)}
    needs = list(map(_need, pattern.alternatives)) if isinstance(pattern, AnyOf) else []
    joined: Need = {}
    for target, below in (item for need in needs for item in need.items()):
        # Two spellings of one op: only what both need is needed.
        joined[target] = below if target not in joined else tuple(n for n in below if n in joined[target])
    return joined if all(needs) else {}


def _targets(pattern: Any) -> set[int]:
    """The targets one of which ``pattern`` is; empty if it may be anything."""
    if isinstance(pattern, Call):
        return {id(pattern.op.target)}
    targets = list(map(_targets, pattern.alternatives)) if isinstance(pattern, AnyOf) else []
    return set().union(*targets) if all(targets) else set()


# -- congruence -----------------------------------------------------------------------------------------------


def congruent(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two operands are one value: one node, equal literals, or pure calls of congruent operands."""
    if a is b:
        return True
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(congruent, a, b, [depth] * len(a)))
        return type(a) is type(b) and bool(a == b)
    if a.op == "get_attr" == b.op:
        return a.target == b.target
    if a.op != "call_function" or a.target is not b.target or not depth or not is_pure(a.target):
        return False
    if a.target is OPS["reshape"].target and same_shape(shape(a), shape(b)):
        return congruent(a.args[0], b.args[0], depth - 1)  # the shape may be spelled with a -1
    return congruent(normal(a), normal(b), depth - 1)


# -- the writer -----------------------------------------------------------------------------------------------


def _is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)


def _is_scalar(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _same_fact(x: Any, fact: Any) -> bool:
    given = value_of(x)
    both_sizes = all(isinstance(size, (int, torch.SymInt)) for size in (given, fact))
    return same(given, fact) if both_sizes else bool(given == fact)


def _misfit(variables: Sequence[Variable], values: Sequence[Any]) -> tuple[Variable, Any] | None:
    """The first variable whose value has not the axes of its annotation: too many, too few, or one name for two sizes."""
    known: dict[str, Sequence[Size]] = {}
    for variable, value in zip(variables, values, strict=True):
        if value is not None and not _fit(variable.axes or (), shape(value), known):
            return variable, value
    return None


def _fit(axes: tuple[str, ...], sizes: Sequence[Size], known: dict[str, Sequence[Size]]) -> bool:
    loose = next((i for i, axis in enumerate(axes) if axis[0] in "*."), None)
    extra = len(sizes) - len(axes)
    if extra != 0 and (loose is None or extra < -1):
        return False
    at = 0
    for i, axis in enumerate(axes):
        given = sizes[at : at + 1 + extra] if i == loose else sizes[at : at + 1]
        at += len(given)
        wanted = (int(axis),) if axis.isdigit() else given if axis in ("_", "...") else known.setdefault(axis, given)
        if not same_shape(wanted, given):
            return False
    return True


_FACTS = {"width": "shape({0})[-1]", "dtype": "dtype({0})"}


class _Writer:
    """Writes the function of one pattern: conditions nest to the right, so that falling out of one is backtracking."""

    def __init__(self, variables: tuple[Variable, ...], roots: tuple[Any, ...], explain: bool) -> None:
        self.variables, self.roots, self.explain = variables, roots, explain
        self.lines: list[str] = []
        self.globals: dict[str, Any] = {
            "Node": fx.Node, "Found": Found, "normal": normal, "congruent": congruent,
            "is_tensor": _is_tensor, "is_scalar": _is_scalar, "dtype": dtype, "shape": shape,
            "misfit_of": _misfit, "same_fact": _same_fact,
        }  # fmt: skip
        self.fresh = 0

    def function(self) -> Matcher:
        self.lines = [
            "def match(n, is_weight, note=None):",
            " is_parameter = lambda x: is_weight(x) and x.op == 'get_attr'",
        ][: 1 + any(variable.kind == "parameter" for variable in self.variables)]
        root = self.roots[0]
        self.solve(((root, "n", ""),), {}, (), self.roots[1:], 1, 0)
        source = "\n".join(self.lines)
        try:
            exec(compile(source, "<pattern>", "exec"), self.globals)
        except SyntaxError as error:
            raise PatternError(f"the pattern is too large: {error.msg}", hint="split the rule in two") from error
        matcher: Matcher = self.globals["match"]
        return matcher

    # A goal is a pattern, the expression it must match, and the rule's line that asks for it. ``bound`` maps what is
    # matched to its expression (by id: patterns live in self.roots); ``twins`` pairs expressions found congruent.
    def solve(self, goals: tuple[tuple[Any, str, str], ...], bound: dict[int, str], twins: tuple[tuple[str, str], ...],
              later: tuple[Any, ...], indent: int, depth: int) -> None:  # fmt: skip
        if not goals:
            if later:
                self.next_root(bound, twins, later, indent, depth)
            else:
                self.finish(bound, twins, indent, depth)
            return
        index = min(range(len(goals)), key=lambda i: self.rank(goals[i][0], bound))
        (pattern, at, source), rest = goals[index], goals[:index] + goals[index + 1 :]

        if id(pattern) in bound and isinstance(pattern, (Variable, Call, AnyOf)):
            first = bound[id(pattern)]
            self.write(indent, f"if {at} is {first} or congruent({at}, {first}):")
            self.solve(rest, bound, (*twins, (at, first)), later, indent + 1, depth)
            self.otherwise(pattern, at, source, indent, depth)
        elif isinstance(pattern, Variable):
            check = pattern.check.format(at)
            name = self.name("v")
            if check:
                self.write(indent, f"if {check}:")
            inner = indent + bool(check)
            self.write(inner, f"{name} = {at}")
            self.solve(rest, {**bound, id(pattern): name}, twins, later, inner, depth)
            if check:
                self.otherwise(pattern, at, source, indent, depth)
        elif isinstance(pattern, Fact):
            if id(pattern.of) not in bound:
                raise PatternError(f"op.{pattern} is asked where {brief(pattern.of)} is not bound", where=source)
            self.write(indent, f"if same_fact({at}, {_FACTS[pattern.name].format(bound[id(pattern.of)])}):")
            self.solve(rest, bound, twins, later, indent + 1, depth)
            self.otherwise(pattern, at, source, indent, depth)
        elif isinstance(pattern, AnyOf):
            for alternative in pattern.alternatives:
                self.solve(((alternative, at, source), *rest), {**bound, id(pattern): at}, twins, later, indent, depth)
        elif isinstance(pattern, Call):
            self.write(indent, f"if {at}.__class__ is Node and {at}.target is {self.constant(pattern.op.target)}:")
            args = self.name("a")
            self.write(indent + 1, f"{args} = {self.normal(pattern, at)}")
            names = tuple(self.name("n") for _ in pattern.args)
            inner = self.unpack(pattern, names, args, indent + 1)
            arguments = tuple((arg, name, pattern.source) for arg, name in zip(pattern.args, names, strict=True))
            self.solve(arguments + rest, {**bound, id(pattern): at}, twins, later, inner, depth + 1)
            self.otherwise(pattern, at, pattern.source, indent, depth)
        elif isinstance(pattern, (list, tuple)) and any(isinstance(p, SYMBOLS) for p in pattern):
            self.write(indent, f"if isinstance({at}, (list, tuple)) and len({at}) == {len(pattern)}:")
            elements = tuple((p, f"{at}[{i}]", source) for i, p in enumerate(pattern))
            self.solve(elements + rest, bound, twins, later, indent + 1, depth)
            self.otherwise(pattern, at, source, indent, depth)
        else:
            self.write(indent, f"if {self.literal(pattern, at)}:")
            self.solve(rest, bound, twins, later, indent + 1, depth)
            self.otherwise(pattern, at, source, indent, depth)

    def normal(self, pattern: Call, at: str) -> str:
        """The arguments in normal form; those of a call that gives all of them, in order and none an axis, are so already."""
        form = form_of(pattern.op.target)
        if form is None or form.dims or form.ignored:
            return f"normal({at})"
        return f"{at}.args if len({at}.args) == {len(form.names)} else normal({at})"

    def rank(self, pattern: Any, bound: dict[int, str]) -> int:
        """What rejects soonest goes first: literals, what is bound already, ops, then wildcards."""
        if isinstance(pattern, (Variable, Call, AnyOf)) and id(pattern) in bound:
            return 1
        if isinstance(pattern, Call):
            return 2
        if isinstance(pattern, AnyOf):
            return 3
        if isinstance(pattern, Fact):
            return 0 if id(pattern.of) in bound else 5
        return 4 if isinstance(pattern, Variable) else 0

    def finish(self, bound: dict[int, str], twins: tuple[tuple[str, str], ...], indent: int, depth: int) -> None:
        """Everything is bound: what is left are the axes that the annotations name, and that no node stands twice."""
        asked = [v for v in self.variables if v.axes is not None and id(v) in bound]
        inner = indent + bool(asked)
        if asked:
            values = "".join(f"{bound[id(v)]}, " for v in asked)
            self.write(indent, f"misfit = misfit_of({self.constant(asked)}, ({values}))")
            self.write(indent, "if misfit is None:")
        self.write(inner, f"if {self.distinct(bound)}:")
        self.write(inner + 1, f"yield Found({self.result(bound, twins)})")
        if asked and self.explain:
            self.write(indent, "else:")
            self.write(indent + 1, f"note({depth}, '', *misfit)")

    def unpack(self, pattern: Call, names: tuple[str, ...], args: str, indent: int) -> int:
        """Write the assignment of a call's arguments; a commutative pair is a loop over both orders."""
        if not pattern.op.commutative or pattern.args[0] is pattern.args[1]:
            if names:
                self.write(indent, f"{', '.join(names)}, = {args}")
            return indent
        left, right, *others = names
        for i, other in enumerate(others, 2):
            self.write(indent, f"{other} = {args}[{i}]")
        self.write(indent, f"for {left}, {right} in (({args}[0], {args}[1]), ({args}[1], {args}[0])):")
        return indent + 1

    def next_root(self, bound: dict[int, str], twins: tuple[tuple[str, str], ...], later: tuple[Any, ...],
                  indent: int, depth: int) -> None:  # fmt: skip
        """A sibling is found upwards, through the readers of something already bound."""
        root, rest = later[0], later[1:]
        path = self.path(root, bound)
        if path is None:
            raise PatternError("a further root shares nothing with the first", where=getattr(root, "source", None))
        known, *calls = path
        at = bound[id(known)]
        for call in calls:
            user = self.name("u")
            self.write(indent, f"for {user} in tuple({at}.users) if {at}.__class__ is Node else ():")
            self.write(indent + 1, f"if {user}.target is {self.constant(call.op.target)}:")
            indent, at = indent + 2, user
        self.solve(((root, at, ""),), bound, twins, rest, indent, depth)

    def path(self, pattern: Any, bound: dict[int, str]) -> list[Any] | None:
        """From something bound up to ``pattern``, through ops only."""
        if id(pattern) in bound:
            return [pattern]
        if isinstance(pattern, Call):
            below = [p for p in (self.path(child, bound) for child in pattern.args if isinstance(child, (Variable, Call))) if p]
            return [*min(below, key=len), pattern] if below else None
        return None

    # -- text --

    def distinct(self, bound: dict[int, str]) -> str:
        """A root is no other op of the pattern: not a sibling, and not inside one."""
        calls = {id(call): bound[id(call)] for root in self.roots for call in calls_of(root) if id(call) in bound}
        roots = self.roots if len(self.roots) > 1 else ()
        pairs = [(bound[id(root)], at) for root in roots for call, at in calls.items() if call != id(root)]
        return " and ".join(f"{root} is not {at}" for root, at in pairs) or "True"

    def result(self, bound: dict[int, str], twins: tuple[tuple[str, str], ...]) -> str:
        values = [bound.get(id(v), "None") for v in self.variables]
        calls = {bound[id(p)]: None for root in self.roots for p in calls_of(root) if id(p) in bound}  # a set in order
        pairs = [f"({other}, {first})" for other, first in twins]
        groups = (values, [bound[id(root)] for root in self.roots], list(calls), pairs)
        return ", ".join(f"({''.join(f'{x}, ' for x in group)})" for group in groups) + f", {next(_WAYS)}"

    def literal(self, pattern: Any, at: str) -> str:
        if pattern is None or isinstance(pattern, bool):
            return f"{at} is {pattern}"
        if isinstance(pattern, (list, tuple)):
            return f"isinstance({at}, (list, tuple)) and list({at}) == {self.constant(list(pattern))}"
        return f"{at} == {self.constant(pattern)}"

    def otherwise(self, pattern: Any, at: str, source: str, indent: int, depth: int) -> None:
        if self.explain:
            self.write(indent, "else:")
            self.write(indent + 1, f"note({depth}, {source!r}, {self.constant(pattern)}, {at})")

    def constant(self, value: Any) -> str:
        name = self.name("K")
        self.globals[name] = value
        return name

    def name(self, letter: str) -> str:
        self.fresh += 1
        return f"{letter}{self.fresh}"

    def write(self, indent: int, text: str) -> None:
        self.lines.append(" " * indent + text)
