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

from dataclasses import dataclass
from typing import Any

from torch import fx

from .emit import Editor
from .engine import apply_rules
from .equation import Equation, Match, dtype, is_vector, rank, require_match, shape, width
from .errors import Refused, require
from .ops import Operand, Ops, OptionalWeight, Scalar, Tensor, Weight
from .pass_base import Context
from .patterns import Pattern, compile_pattern
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
    "rank",
    "require",
    "shape",
    "width",
]


class Rule(Equation):
    """A local rewrite, written as two sides of an equation."""

    def run(self, program: Program, context: Context) -> None:
        apply_rules((self,), program, context)


@dataclass(frozen=True)
class Miss:
    """How far a rule came at the place where it came furthest.

    Attributes:
        rule: its name.
        depth: how many ops of the pattern had matched.
        expected: what the pattern asks for, as text.
        found: what the graph has there, as text.
        node: the node of the graph nearest to the disagreement, by name.
        pattern_line: the line of the rule, ``file:line: code``.
        source: the user's source line, if known.
        reason: the sentence of ``where``, if the whole pattern matched.
        place: the module path, or the node's name.
    """

    rule: str
    depth: int
    expected: str
    found: str
    node: str
    pattern_line: str
    source: str | None
    reason: str
    place: str

    @property
    def sentence(self) -> str:
        if self.reason:
            return f"{self.rule} matched at {self.place} but refused: {self.reason}"
        at = f" ({self.source})" if self.source else ""
        return f"{self.rule} matched {self.depth} ops, then wanted {self.expected} at {self.place} and found {self.found}{at}"


def nearest_miss(rule: Rule, program: Program, at: str | None = None) -> Miss | None:
    """Where ``rule`` came nearest to firing, and what stopped it; None if nothing in the graph looks like it.

    Args:
        at: only look at this node or under this module path.
    """
    pattern = compile_pattern(rule.before, explain=True)
    editor = Editor(program)
    best: Miss | None = None
    for node in program.graph.nodes:
        path = path_of(node)
        if at is not None and at != node.name and path != at and not path.startswith(at + "."):
            continue
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
