"""Merge the linear layers that read one tensor: q, k and v, or gate and up.

    linear(x, W_1, b_1), …, linear(x, W_k, b_k) = split(linear(x, [W_1; …; W_k], [b_1; …; b_k]))

One product instead of k, and k views of its result. All layers have a bias or none has: a zero would become a parameter. A
weight that something else reads stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.equation import width
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.parallel import parallel_linears
from tautomer.rewrite.pass_base import Context, Pass, Purpose
from tautomer.rewrite.program import Program
from tautomer.rewrite.weights import leaves


class MergeParallelLinears(Pass):
    """Linear layers with one input → one layer and a split; see the module."""

    claim = ALGEBRAIC("a kernel may sum a larger product in another order")
    purpose: ClassVar[Purpose] = "speed"

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for layers in parallel_linears(program):
            if not context.admits(self, layers[0]):
                continue
            try:
                require_distinct_weights(editor, layers)
                substitute(self, layers, lambda op, layers=layers: merged(op, layers), editor, context)  # type: ignore[misc]
            except Refused as refusal:
                context.refused(self, layers[0], str(refusal))


def merged(op: GraphOps, layers: Sequence[fx.Node]) -> list[fx.Node]:
    """split(linear(x, [W…], [b…])), one part per layer."""
    x, weights, *biases = zip(*(layer.args for layer in layers), strict=True)
    b = op.cat(list(biases[0])) if biases and biases[0][0] is not None else None
    parts = op.split_sizes(op.linear(x[0], op.cat(list(weights)), b), [width(layer) for layer in layers], -1)
    return [op.node(op.getitem(parts, index)) for index in range(len(layers))]


def require_distinct_weights(editor: Editor, layers: Sequence[fx.Node]) -> None:
    """Refuse layers that share a weight: it would be stored once for each."""
    read = [name for layer in layers for name in set(leaves(editor.expression(layer.args[1])))]  # type: ignore[arg-type]
    storages = [editor.program.weights.storage(name) for name in read if name in editor.program.weights]
    require(len(set(storages)) == len(storages), "the layers share a weight, which would be stored twice")
