"""Compute once what depends on nothing: index tables and masks made from literals.

    arange(n)[None, :] + 1   ->   a constant

Only integers and booleans, which are exact whatever dtype the program is run in, and only small ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, fx

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.metadata import Derived
from tautomer.rewrite.ops import is_pure
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.shapes import product, static
from tautomer.rewrite.substitution import erase_dead
from tautomer.rewrite.weights import Apply, Expression, opaque

LARGEST = 65536
"""Elements. A larger table costs more to keep and to load than to compute."""


class FoldConstants(Pass):
    """Calls on literals → a constant; see the module."""

    claim = BITWISE
    phase: ClassVar[Phase] = "cleanup"

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        constants: dict[fx.Node, Expression] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and _is_exact(node) and all(operand in constants for operand in node.all_input_nodes):
                constants[node] = Apply(node.target, _plain(node.args, constants), _keywords(node, constants))
        for node, expression in constants.items():
            if all(user in constants for user in node.users) or not context.admits(self, node):
                continue
            context.applied(self, node)
            new = editor.before(node).node(Derived(expression, node.meta["val"]), f"constant_{node.name}")
            new.meta["origin"] = node.meta.get("origin", node.name)
            node.replace_all_uses_with(new)
            erase_dead(program.graph, [node])


def _is_exact(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or opaque(node):
        return False
    size = static(product(value.shape))
    return is_pure(node.target) and size is not None and size <= LARGEST


def _plain(x: Any, constants: dict[fx.Node, Expression]) -> Any:
    if isinstance(x, (list, tuple)):
        return tuple(_plain(y, constants) for y in x)
    return constants[x] if isinstance(x, fx.Node) else x


def _keywords(node: fx.Node, constants: dict[fx.Node, Expression]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, _plain(v, constants)) for k, v in node.kwargs.items())
