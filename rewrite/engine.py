"""The engine: rules to a fixpoint, each application a transaction.

    match → where → build → compare → check the claim → replace       nothing has changed until the last step

Nodes are visited downstream first, and at one node larger patterns before smaller ones, then in the declared order:
a pattern is tried before the smaller ones inside it. What an application makes, and what reads it, is visited again.
Where two rules could have had the same nodes, the one that came second is told who took them.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx

from ._torch import erased, no_new_guards
from .emit import Editor, GraphOps
from .equation import Equation, Match, require_match
from .errors import ClaimBroken, InvalidGraph, Refused, require
from .metadata import Derived
from .pass_base import Context, Pass
from .patterns import Entry, Found, Pattern, compile_pattern
from .program import Program, inherit, line, place, target_name
from .region import Region, hold, region_between, signature
from .shapes import product
from .substitution import compare, dying, erase_dead
from .symbols import calls_of, may_meet
from .weights import leaves

_COMPILED: WeakKeyDictionary[Any, dict[Hashable, Pattern]] = WeakKeyDictionary()


def compiled(rule: Equation, explain: bool = False) -> Pattern:
    """The compiled left side of ``rule``, as of ``compile_pattern``; rules of one class with equal attributes share it."""
    attributes = [(name, type(value), value) for name, value in sorted(vars(rule).items(), key=lambda item: item[0])]
    owner: Any = type(rule)
    question: Hashable = (explain, getattr(rule.before, "__code__", rule.before), *attributes)
    try:
        hash(question)
    except TypeError:
        owner, question = rule, explain
    patterns = _COMPILED.setdefault(owner, {})
    if question not in patterns:
        patterns[question] = compile_pattern(rule.before, explain)
    return patterns[question]


def apply_rules(rules: Sequence[Equation], program: Program, context: Context) -> None:
    """Apply ``rules`` to ``program`` until none fires.

    Raises:
        PatternError: a rule is ill-formed.
        InvalidGraph: rules undo each other without end.
    """
    with no_new_guards(program.fake_mode), _without_gc():
        _Engine(rules, program, context).run()


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Graph surgery makes and drops many small objects and no garbage cycles: collection only costs (a factor 1.7)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled and not gc.get_freeze_count():
            gc.freeze()  # what was made and is still here goes to the oldest generation without being looked at now
            gc.unfreeze()
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class _Candidate:
    rule: Equation
    entry: Entry
    names: tuple[str, ...]


class _Index:
    """Which patterns may fit at a node, by its target and those of its operands."""

    def __init__(self, rules: Sequence[Equation]) -> None:
        patterns = {rule: compiled(rule) for rule in sorted(rules, key=lambda rule: -compiled(rule).size)}
        self.candidates: dict[int, list[_Candidate]] = {}
        for rule, pattern in patterns.items():
            names = tuple(variable.name for variable in pattern.variables)
            for entry in pattern.entries:
                self.candidates.setdefault(id(entry.target), []).append(_Candidate(rule, entry, names))
        self.named = frozenset[int]().union(*(pattern.named for pattern in patterns.values()))
        self.reads = frozenset[tuple[int, int]]().union(*(pattern.reads for pattern in patterns.values()))
        self.depth = max((pattern.depth for pattern in patterns.values()), default=0)
        self.memo: dict[tuple[Any, ...], tuple[_Candidate, ...]] = {}
        self.known_rivals: dict[Equation, set[int]] = {}

    def at(self, node: fx.Node) -> tuple[_Candidate, ...]:
        """The candidates at ``node`` whose required operands are there, in order."""
        target, named = id(node.target), self.named
        operands = [
            (i, *[j for below in operand.all_input_nodes if (j := id(below.target)) in named])
            for operand in node.all_input_nodes
            if (i := id(operand.target)) in named
        ]
        question = (target, *operands)
        known = self.memo.get(question)
        if known is None:
            known = self.memo[question] = tuple(c for c in self.candidates[target] if c.entry.may_fit(operands))
        return known

    def rivals(self, rule: Equation) -> set[int]:
        """The targets of the nodes that ``rule`` names at which another rule could fit too."""
        known = self.known_rivals.get(rule)
        if known is None:
            calls = {id(call): call for root in compiled(rule).roots for call in calls_of(root)}.values()
            known = self.known_rivals[rule] = set()
            for call in calls:
                others = (c for c in self.candidates.get(id(call.op.target), ()) if c.rule is not rule)
                if any(may_meet(c.entry.root, call) for c in others):
                    known.add(id(call.op.target))
        return known

    def above(self, roots: Sequence[fx.Node]) -> list[fx.Node]:
        """The readers of ``roots``, and what may have one of them inside its pattern."""
        level = {user: None for root in roots for user in root.users if id(user.target) in self.named}
        found = list(level)
        for _ in range(self.depth - 1):
            level = {user: None for node in level for user in node.users if (id(user.target), id(node.target)) in self.reads}
            if not level:
                break
            found += level
        return found


class _Engine:
    def __init__(self, rules: Sequence[Equation], program: Program, context: Context, editor: Editor | None = None) -> None:
        self.rules, self.program, self.context = rules, program, context
        self.editor = editor or Editor(program)
        self.index = _Index(rules)
        self.queue: list[fx.Node] = []
        self.queued: set[fx.Node] = set()
        self.refusals: dict[tuple[Equation, fx.Node], str] = {}
        self.checked: dict[Hashable, float | ClaimBroken | None] = {}
        self.fired: list[str] = []
        self.made: dict[fx.Node, Equation] = {}
        self.conflicts: dict[tuple[Equation, str], tuple[fx.Node, Equation]] = {}

    # -- the worklist -----------------------------------------------------------------------------------------

    def run(self) -> None:
        nodes = list(self.program.graph.nodes)
        self.limit = 4 * len(nodes) + 1000
        self.push(nodes)
        applied = -1
        while len(self.fired) > applied:
            applied = len(self.fired)
            self.drain()
            # A refusal may have lost its reason since: another reader is gone, an operand was rewritten.
            self.push(node for _, node in self.refusals if not erased(node))
        for (rule, node), reason in self.refusals.items():
            if not erased(node):
                self.context.refused(rule, node, reason)
        for (loser, _), (node, winner) in self.conflicts.items():
            self.context.refused(loser, node, f"{winner.name} took these nodes first")
        for rule in self.rules:
            for node, reason in rule.misses(self.program):
                self.context.refused(rule, node, reason)

    def drain(self) -> None:
        while self.queue:
            node = self.queue.pop()
            self.queued.discard(node)
            if not erased(node):
                self.visit(node)

    def push(self, nodes: Iterable[fx.Node]) -> None:
        roots = self.index.candidates
        for node in nodes:
            if id(node.target) in roots and node not in self.queued:
                self.queued.add(node)
                self.queue.append(node)

    def visit(self, node: fx.Node) -> None:
        for candidate in self.index.at(node):
            if self.attempt(candidate, node):
                return

    def attempt(self, candidate: _Candidate, node: fx.Node) -> bool:
        """Apply the first way the pattern fits that nothing speaks against; remember what spoke against the first."""
        reason = None
        for found in candidate.entry.match(node, self.is_weight):
            if not self.context.admits(candidate.rule, node):
                return False
            try:
                self.apply(candidate, found)
            except Refused as refusal:
                reason = reason or str(refusal)
            else:
                if self.refusals:
                    self.refusals.pop((candidate.rule, node), None)
                return True
        if reason is not None and self.made.get(node) is not candidate.rule:
            self.refusals[candidate.rule, node] = reason
        return False

    def is_weight(self, x: Any) -> bool:
        return isinstance(x, fx.Node) and self.editor.constant(x)

    # -- one application --------------------------------------------------------------------------------------

    def apply(self, candidate: _Candidate, found: Found) -> None:
        rule = candidate.rule
        match = self.match(candidate, found)
        require_match(rule, match)
        losers = self.losers(rule, match)

        op = self.editor.before(self.anchor(match), origin=match.root)
        try:
            roots, overlay = self.stage(rule, op, match)
            _settle(op.created, found.nodes)
            self.refuse_second_copies(op, match.roots)
            error = self.check(rule, op, found, roots)
        except Exception:
            op.rollback()
            raise

        self.context.applied(rule, match.root, error=error)
        self.conflicts.pop((rule, _origin(match.root)), None)
        self.commit(op, match.roots, roots, overlay)
        self.conflicts.update({(loser, _origin(node)): (node, rule) for loser, node in losers if erased(node)})
        self.fired.append(rule.name)
        self.made.update(dict.fromkeys(roots, rule))
        if len(self.fired) > self.limit:
            cycle = " and ".join(name for name, _ in Counter(self.fired[-100:]).most_common(3))
            raise InvalidGraph(f"rewriting does not end: {cycle} keep firing", where=place(roots[0]))
        self.push([*op.created, *roots, *self.index.above(roots)])

    def losers(self, rule: Equation, match: Match) -> list[tuple[Equation, fx.Node]]:
        """The other rules that would fire at nodes of ``match``, and where."""
        contested = self.index.rivals(rule)
        nodes = [node for node in match.nodes if id(node.target) in contested] if contested else []
        pairs = [(rival, node) for node in nodes for rival in self.index.at(node) if rival.rule is not rule]
        return [(rival.rule, node) for rival, node in pairs if (rival.rule, node) not in self.refusals and self.fits(rival, node)]

    def fits(self, candidate: _Candidate, node: fx.Node) -> bool:
        """Whether a candidate would fire at ``node``, as far as its pattern and its condition tell."""
        for found in candidate.entry.match(node, self.is_weight) if self.context.lets(candidate.rule, node) else ():
            with contextlib.suppress(Refused):
                require_match(candidate.rule, self.match(candidate, found))
                return True
        return False

    def match(self, candidate: _Candidate, found: Found) -> Match:
        return Match(dict(zip(candidate.names, found.values, strict=True)), found.roots, found.nodes, self.program)

    def anchor(self, match: Match) -> fx.Node:
        """Where the new nodes stand: after everything they may read, before everything that reads them."""
        if len(match.roots) == 1:
            return match.root
        gone = dying(match.roots)  # an op below the roots may stay for another reader, and read one of them
        users = [x for root in match.roots for x in root.users if x not in match.nodes or x not in gone]
        anchor = min(users, default=max(match.roots).next)
        late = next((node for node in _frontier(match.values.values()) if not node < anchor), None)
        require(late is None, f"'{late}' is computed only after one of the siblings is read")
        return anchor

    def stage(self, rule: Equation, op: GraphOps, match: Match) -> tuple[tuple[fx.Node, ...], dict[fx.Node, Any]]:
        """The new roots and what changes downstream; what cannot stand here is refused with the graph around it."""
        try:
            roots = self.build(rule, op, match)
            return roots, compare(match.roots, roots, self.editor.metadata)
        except Refused as refusal:
            raise Refused(f"{refusal}\n{_surroundings(match.nodes, op)}") from refusal

    def build(self, rule: Equation, op: GraphOps, match: Match) -> tuple[fx.Node, ...]:
        result = rule.after(op, **match.values)
        results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if len(results) != len(match.roots) or not all(isinstance(r, (fx.Node, Derived)) for r in results):
            raise InvalidGraph(f"{rule.name} returns {results} for {len(match.roots)} values", where=place(match.root))
        return tuple(map(op.node, results))

    def refuse_second_copies(self, op: GraphOps, roots: tuple[fx.Node, ...]) -> None:
        """A matrix is not stored twice for one of its readers' sake."""
        large = [weight for name in op.staged if (weight := self.program.weights[name]).edited and weight.meta.ndim >= 2]
        if not large:
            return
        gone, seen = dying(roots), set[str]()
        for weight in large:
            for leaf in dict.fromkeys(leaves(weight.expression)):
                source = self.program.weights.leaves[leaf]
                if source.ndim < 2 or source.numel() > product(weight.meta.shape):
                    continue
                require(leaf not in seen, f"'{leaf}' would be stored twice, edited in two ways")
                seen.add(leaf)
                reader = next((user for user in self.editor.readers(leaf) if user not in gone), None)
                if reader is not None:
                    raise Refused(f"'{leaf}' would be stored twice: {target_name(reader)} '{reader.name}' also reads it")

    def check(self, rule: Equation, op: GraphOps, found: Found, roots: tuple[fx.Node, ...]) -> float | None:
        if not self.context.check:
            return None
        question = signature(found, op.created, self.editor)
        if question not in self.checked:
            twins = {other: node for other, node in found.twins if other is not node}
            old = region_between(found.roots, _frontier(found.values), twins)
            try:
                self.checked[question] = hold(rule.claim, old, Region(tuple(op.created), roots, {}), self.editor)
            except ClaimBroken as broken:
                self.checked[question] = broken
        if isinstance(error := self.checked[question], ClaimBroken):
            raise Refused(error.what)
        return error

    def commit(self, op: GraphOps, old: tuple[fx.Node, ...], new: tuple[fx.Node, ...], overlay: dict[fx.Node, Any]) -> None:
        created = op.created
        for before, after in zip(old, new, strict=True):
            if after in created:
                after.meta["origin"] = before.meta.get("origin", before.name)
                if "relation" in before.meta:
                    after.meta["relation"] = before.meta["relation"]
                if before not in overlay:
                    after.meta["val"] = before.meta["val"]
            before.replace_all_uses_with(after)
        for node, value in overlay.items():
            node.meta["val"] = value
        erase_dead(self.program.graph, old)


def _settle(created: Iterable[fx.Node], matched: Sequence[fx.Node]) -> None:
    """A new call belongs where the call of the same op that it stands for was made: a linear layer stays in its module."""
    for node in created:
        twin = next((other for other in matched if other.target is node.target), None)
        if twin is not None:
            inherit(node, twin)


def substitute(rewrite: Pass, old: Sequence[fx.Node], emit: Callable[[GraphOps], Sequence[fx.Node]],
               editor: Editor, context: Context, at: fx.Node | None = None, copies: bool = False,
               note: Callable[[GraphOps], str] = lambda op: "") -> None:  # fmt: skip
    """Let what ``emit`` makes stand for ``old``, one for one: an application of a pass that is no rule.

    New nodes stand before the first of ``old``, unless ``emit`` moves the anchor. The same transaction as of a rule: if
    anything speaks against it, nothing has changed. It is recorded at ``at``, by default the first of ``old``, with the
    ``note`` of what was emitted. With ``copies``, a matrix that has other readers may be stored once more.

    Raises:
        Refused: a reader downstream could not run, a matrix would be stored twice, or the claim does not hold here.
    """
    engine, before = _Engine((), editor.program, context, editor), tuple(old)
    op = editor.before(before[0])
    try:
        after = tuple(emit(op))
        overlay = compare(before, after, editor.metadata)
        if not copies:
            engine.refuse_second_copies(op, before)
        new = Region(tuple(op.created), after, {})
        # Both sides start where the new one does.
        region = region_between(before, set(new.inputs), {})
        # What is no equality is measured on the whole program: on random numbers it would say nothing.
        error = hold(rewrite.claim, region, new, editor) if context.check and rewrite.claim.exact else None
    except ClaimBroken as broken:
        op.rollback()
        raise Refused(broken.what) from broken
    except Exception:
        op.rollback()
        raise
    others = ", ".join(place(node) for node in before if node is not (at or before[0]))
    told = filter(None, (f"with {others}" if others else "", note(op)))
    context.applied(rewrite, at or before[0], "; ".join(told), error)
    engine.commit(op, before, after, overlay)


def _origin(node: fx.Node) -> str:
    """The captured node that ``node`` stands for, by name."""
    return str(node.meta.get("origin", node.name))


def _surroundings(nodes: tuple[fx.Node, ...], op: GraphOps) -> str:
    """The lines of the graph that a match touches: what it reads, itself (marked), what was to replace it, its readers."""
    near = {*nodes, *(near for node in nodes for near in (*node.all_input_nodes, *node.users)), *op.created}
    marks = {**dict.fromkeys(nodes, "-"), **dict.fromkeys(op.created, "+")}
    return "\n".join(f"  {marks.get(node, ' ')} {line(node)}" for node in sorted(near))


def _frontier(values: Iterable[Any]) -> set[fx.Node]:
    """The nodes that variables are bound to."""
    frontier: set[fx.Node] = set()
    fx.node.map_arg(tuple(values), frontier.add)
    return frontier
