"""Compute one value once.

    y = f(x), z = f(x)   ->   y = f(x), z = y          f pure

In the backward pass the gradients of y and z are added before f instead of after it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.ops import is_pure, normal
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.weights import opaque


class MergeEqualExpressions(Pass):
    """Equal pure calls → one; see the module."""

    claim = ALGEBRAIC("values keep their bits; gradients are added in another order")
    phase: ClassVar[Phase] = "cleanup"

    def run(self, program: Program, context: Context) -> None:
        first: dict[Hashable, fx.Node] = {}
        for node in list(program.graph.nodes):
            spelling = _spelling(node)
            if spelling is None:
                continue
            known = first.setdefault(spelling, node)
            if known is node or not context.admits(self, node) or _both_returned(known, node):
                continue
            if node.op == "call_function":
                context.applied(self, node)
            node.replace_all_uses_with(known)
            program.graph.erase_node(node)


def _spelling(node: fx.Node) -> Hashable | None:
    """What a node computes, as a key; None if two calls of it are two values."""
    if opaque(node):
        return None
    if node.op == "get_attr":
        return str(node.target)
    if node.op != "call_function" or not is_pure(node.target):
        return None
    return (id(node.target), _plain(normal(node)), tuple((k, _plain(v)) for k, v in node.kwargs.items()))


def _plain(x: Any) -> Hashable:
    if isinstance(x, (list, tuple)):
        return tuple(map(_plain, x))
    return x if isinstance(x, fx.Node) else (x.__class__, x)  # 1, 1.0 and True are three literals


def _both_returned(a: fx.Node, b: fx.Node) -> bool:
    """Two results stay two tensors: the caller may write into one."""
    return all(any(user.op == "output" for user in node.users) for node in (a, b))
