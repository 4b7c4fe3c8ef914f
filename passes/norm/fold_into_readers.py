"""Fold a norm by stored statistics, or any scale and shift per channel, into the layers that read its result.

    W (diag(s) x + t) + b = (W diag(s)) x + (W t + b)

All readers take it or none does: as long as one is left, the norm is still computed, and nothing is gained. A layer that
pads with zeros cannot take a shift: its border would have to be padded with -t/s, channel by channel, which costs more than
the norm; without a shift (t absent) the border is zero on both sides. A factor without a shift is always taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.diagonal import DIAGONAL, NORMS, Reader, diagonal_of, into_readers, readers_of
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.layers import layer_of
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.program import Program, place


class FoldIntoReaders(Pass):
    """A norm by stored statistics before layers → their weights; see the module."""

    claim = ALGEBRAIC("the products by s and t are rounded in W and b, not in the activation")
    paper: ClassVar[str] = "arXiv:2208.01313"

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for node in reversed(list(program.graph.nodes)):
            if node.target in DIAGONAL and context.admits(self, node):
                try:
                    self.fold(node, editor, context)
                except Refused as refusal:
                    if node.target in NORMS or any(map(layer_of, node.users)):
                        context.refused(self, node, str(refusal))

    def fold(self, node: fx.Node, editor: Editor, context: Context) -> None:
        diagonal = diagonal_of(node, editor.before(node))
        if diagonal is None:
            return
        readers = readers_of(editor.program, node, diagonal)
        if diagonal.s is None:
            require_narrow(readers)
        layers = [reader.user for reader in readers if reader.layer is not None]
        substitute(self, layers, lambda op: into_readers(op, node, diagonal, readers), editor, context, at=node)


def require_narrow(readers: Sequence[Reader]) -> None:
    """Refuse to trade a sum for a bias over more channels."""
    for _, _, layer in readers:
        if layer is not None and layer.bias is None:
            out, d = layer.outputs, layer.inputs
            cheaper = f"{place(layer.node)} has no bias: adding one over {out} channels costs more than a shift over {d}"
            require(out <= d, cheaper)
