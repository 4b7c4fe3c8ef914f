"""Fold a norm by stored statistics, or any scale and shift per channel, into the layer that writes what it reads.

    diag(s) (W x + b) + t = (diag(s) W) x + (s b + t)

W is a linear layer, a convolution or a transposed convolution. For a BatchNorm s = g / sqrt(v + eps) and t = b - m s; a
LayerScale has no t; a product by a number is the same for all channels. Padding does not matter on this side: the border is
written before the map. What only moves channels about, sums and concatenations may stand between (rewrite/diagonal.py).
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.diagonal import DIAGONAL, NORMS, diagonal_of, into_writers
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.layers import layer_of
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.program import Program


class FoldIntoWriter(Pass):
    """A norm by stored statistics after a layer → its weight; see the module."""

    claim = ALGEBRAIC("the products by s are rounded in W and b, not in the activation")
    paper: ClassVar[str] = "arXiv:1502.03167, section 3.1"

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for node in list(program.graph.nodes):
            if node.target in DIAGONAL and context.admits(self, node):
                try:
                    self.fold(node, editor, context)
                except Refused as refusal:
                    if node.target in NORMS or any(map(layer_of, node.all_input_nodes)):
                        context.refused(self, node, str(refusal))

    def fold(self, node: fx.Node, editor: Editor, context: Context) -> None:
        diagonal = diagonal_of(node, editor.before(node))
        if diagonal is not None:
            substitute(self, (node,), lambda op: [into_writers(op, node, diagonal)], editor, context)
