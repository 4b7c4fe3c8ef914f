"""A rule: an equation that rewrites, and can say why it did not.

class FoldNormScale(Rule):
    claim = ALGEBRAIC("the product by g is rounded in W, not in the activation")

    def before(self, op, x, shape, g, eps, W: Weight, b):
        return op.linear(op.rms_norm(x, shape, g, eps), W, b)

    def where(self, m):
        require(m.g is not None, "the norm has no scale left to fold")

    def after(self, op, x, shape, g, eps, W, b):
        return op.linear(op.rms_norm(x, shape, None, eps), op.mul(W, g), b)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from torch import fx

from .emit import Editor
from .engine import apply_rules, compiled
from .equation import Equation, Match, dtype, is_vector, rank, require_match, shape, width
from .errors import Refused, require
from .ops import Operand, Ops, OptionalWeight, Scalar, Tensor, Weight
from .pass_base import Context, Miss
from .patterns import Pattern
from .program import Program, line, path_of, place, source_of
from .symbols import AnyOf, Call, Fact, Variable

__all__ = [
    "Match",
    "Miss",
    "Operand",
    "Ops",
    "OptionalWeight",
    "Rule",
    "Scalar",
    "Tensor",
    "Weight",
    "dtype",
    "is_vector",
    "nearest_miss",
    "note_misses",
    "rank",
    "require",
    "shape",
    "width",
]


class Rule(Equation):
    """A local rewrite, written as two sides of an equation."""

    def run(self, program: Program, context: Context) -> None:
        apply_rules((self,), program, context)


_ALIKE = 3
"""How many ops, and half of the pattern, must match before a report calls something a near miss."""
_LOOKS = 16
"""At how many places it looks for one."""


def note_misses(rules: Sequence[Rule], program: Program, context: Context) -> None:
    """Enter the nearest miss of every rule that neither fired nor refused, if something in the graph looks like it."""
    log = context.log
    heard = {a.rewrite for a in log.applications} | {r.rewrite for r in log.refusals}
    for rule in rules:
        if rule.name in heard:
            continue
        entries = compiled(rule).entries
        alike = (node for node in program.graph.nodes if context.lets(rule, node) and any(e.resembles(node) for e in entries))
        miss = _nearest(rule, program, islice(alike, _LOOKS))
        if miss is not None and miss.depth >= max(_ALIKE, compiled(rule).size / 2) and miss not in log.misses:
            log.misses.append(miss)


def nearest_miss(rule: Rule, program: Program, at: str | None = None) -> Miss | None:
    """Where ``rule`` came nearest to firing, and what stopped it; None if nothing in the graph looks like it.

    Args:
        at: only look at this node or under this module path.
    """

    def asked(node: fx.Node) -> bool:
        path = path_of(node)
        return at is None or at in (node.name, path) or path.startswith(f"{at}.")

    return _nearest(rule, program, filter(asked, program.graph.nodes))


def _nearest(rule: Rule, program: Program, nodes: Iterable[fx.Node]) -> Miss | None:
    targets = {entry.target for entry in compiled(rule).entries}
    nodes = [node for node in nodes if node.op == "call_function" and node.target in targets]
    if not nodes:
        return None
    pattern = compiled(rule, explain=True)
    editor = Editor(program)
    best: Miss | None = None
    for node in nodes:
        for entry in pattern.entries:
            if node.target is not entry.target:
                continue
            miss = _explain(rule, pattern, entry.match, node, editor)
            if miss is not None and (best is None or (miss.depth, bool(miss.reason)) > (best.depth, bool(best.reason))):
                best = miss
    return best


def _explain(rule: Rule, pattern: Pattern, match: Any, root: fx.Node, editor: Editor) -> Miss | None:
    notes: list[tuple[int, str, Any, Any]] = []

    def note(depth: int, pattern_line: str, wanted: Any, found: Any) -> None:
        notes.append((depth, pattern_line, wanted, found))

    is_weight = lambda x: isinstance(x, fx.Node) and editor.constant(x)  # noqa: E731
    for found in match(root, is_weight, note):
        values = {v.name: value for v, value in zip(pattern.variables, found.values, strict=True)}
        reason = _refusal(rule, Match(values, found.roots, found.nodes, editor.program))
        if reason:
            whole = len(found.nodes)
            return Miss(rule.name, whole, str(pattern.roots[0]), line(root), root.name, "", source_of(root), reason, place(root))
    if not notes:
        return None
    depth, pattern_line, wanted, stop = max(notes, key=lambda n: n[0])
    at = stop if isinstance(stop, fx.Node) else root
    return Miss(rule.name, depth, _show(wanted), _shown(stop), at.name, pattern_line, source_of(at), "", place(at))


def _refusal(rule: Rule, match: Match) -> str:
    try:
        require_match(rule, match)
    except Refused as refusal:
        return str(refusal)
    return ""


def _show(wanted: Any) -> str:
    if isinstance(wanted, Variable):
        return wanted.wanted
    if isinstance(wanted, (Call, AnyOf, Fact)):
        return str(wanted)
    return repr(wanted)


def _shown(found: Any) -> str:
    if not isinstance(found, fx.Node):
        return repr(found)
    return line(found)
