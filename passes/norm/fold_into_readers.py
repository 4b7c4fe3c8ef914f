"""Fold a norm by stored statistics, or any scale and shift per channel, into the layers that read its result.

    W (diag(s) x + t) + b = (W diag(s)) x + (W t + b)

All readers take it or none does: as long as one is left, the norm is still computed, and nothing is gained. A layer that
pads with zeros cannot take a shift: its border would have to be -t/s, channel by channel, which the map takes to zero. On
request (``pad``) x is padded so, which costs a copy of it, as much as the norm. Without a shift (t absent) the border is zero
on both sides. A factor without a shift is always taken.
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from tautomer.rewrite.axes import Axes
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.diagonal import DIAGONAL, NORMS, diagonal_of, into_readers
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.layers import Layer, layer_of
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.program import Program, place
from tautomer.rewrite.readers import readers


class FoldIntoReaders(Pass):
    """A norm by stored statistics before layers → their weights; see the module.

    Args:
        pad: whether the input of a convolution that pads with zeros may be padded with what the map takes to zero.
    """

    claim = ALGEBRAIC("the products by s and t are rounded in W and b, not in the activation")
    paper: ClassVar[str] = "arXiv:2208.01313"

    def __init__(self, pad: bool = False) -> None:
        self.pad = pad

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for node in reversed(list(program.graph.nodes)):
            if node.target in DIAGONAL and context.admits(self, node):
                try:
                    self.fold(node, editor, context)
                except Refused as refusal:
                    if node.target in NORMS or any(layer_of(user, node) for user in node.users):
                        context.refused(self, node, str(refusal))

    def fold(self, node: fx.Node, editor: Editor, context: Context) -> None:
        diagonal = diagonal_of(node, editor.before(node))
        if diagonal is None:
            return
        found = readers(Axes(editor.program), node, diagonal.axis, diagonal.t is not None)
        if diagonal.s is None:
            for layer in found.layers:
                require_narrow(layer)
        old = [layer.node for layer in found.layers]
        substitute(self, old, lambda op: into_readers(op, node, diagonal, found, self.pad), editor, context, at=node)


def require_narrow(layer: Layer) -> None:
    """Refuse to trade a sum for a bias over more channels, or for a sum behind the layer."""
    require(not layer.is_product, f"{place(layer.node)} is a product, the shift would be a sum behind it")
    if layer.bias is None:
        out, d = layer.outputs, layer.inputs
        cheaper = f"{place(layer.node)} has no bias: adding one over {out} channels costs more than a shift over {d}"
        require(out <= d, cheaper)
