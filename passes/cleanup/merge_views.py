"""Merge views that keep the order of the elements into one, or none.

    view(… view(x)) = x                 where the shape is that of x
    reshape(view(x), s) = reshape(x, s)

reshape, flatten, unflatten, unsqueeze and squeeze are such views. What the canonical form does for reshapes, for all of them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from tautomer.rewrite._torch import erased
from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.equation import shape
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.shapes import same_shape

aten = torch.ops.aten
_VIEWS = {
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim,
}  # fmt: skip


class MergeViews(Pass):
    """Views in a row → one; see the module."""

    claim = BITWISE("none: nothing is computed")
    phase: ClassVar[Phase] = "cleanup"

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for node in list(program.graph.nodes):
            if erased(node) or not _is_view(node) or editor.constant(node) or not context.admits(self, node):
                continue
            sources = _sources(node)
            same = next((x for x in reversed(sources) if same_shape(shape(x), shape(node))), None)
            try:
                if same is not None:
                    substitute(self, [node], lambda op, x=same: [x], editor, context)  # type: ignore[misc]
                elif node.target is aten.reshape.default and len(sources) > 1:
                    reshaped = lambda op, x=sources[-1], s=node.args[1]: [op.reshape(x, s)]  # noqa: E731
                    substitute(self, [node], reshaped, editor, context)
            except Refused as refusal:
                context.refused(self, node, str(refusal))


def _is_view(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _VIEWS


def _sources(node: fx.Node) -> list[fx.Node]:
    """What ``node`` is a view of, nearest first."""
    found = []
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
        found.append(node)
    return found
