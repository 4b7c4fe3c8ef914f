"""Fold the gain and the shift of a norm into everything that reads it, so that the norm has neither.

    linear(norm(x) g + c, W, b) = linear(norm(x), W diag(g), b + W c)              W c with the W from before

for LayerNorm and RMSNorm, through reshapes, permutations and slices, into linear layers, convolutions and products with a
weight. All readers take it or none does. A shift is zero where a convolution pads with zeros, so there it stays, and the
gain with it.

Equally exact and often better is to leave the gain in the norm, where a fused kernel multiplies by it for nothing. This is
for what needs a norm without one: compressing the stream to d - 1 features, rotating it, sharing the memory of norms.

arXiv:2407.09577, Proposition 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tautomer.rewrite.axes import Axes, rank
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.diagonal import Diagonal, into_readers
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.program import Program, arguments
from tautomer.rewrite.readers import Readers, readers

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)


class FoldNormGain(Pass):
    """Gain and shift of a norm → its readers' weights; see the module."""

    claim = ALGEBRAIC("the products by g and c are rounded in the weights, not in the activation")
    paper = "arXiv:2407.09577, Proposition 1"

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for norm in [node for node in program.graph.nodes if node.target in NORMS]:
            if affine(norm) != (None, None) and context.admits(self, norm):
                try:
                    self.fold(norm, editor, context)
                except Refused as refusal:
                    context.refused(self, norm, str(refusal))

    def fold(self, norm: fx.Node, editor: Editor, context: Context) -> None:
        (g, c), axes = affine(norm), arguments(norm)["normalized_shape"]
        require(len(axes) == 1, f"the norm is over {len(axes)} axes, its readers sum over one")
        require(all(v is None or editor.constant(v) for v in (g, c)), "the gain or the shift is computed at run time")
        found = readers(Axes(editor.program), norm, rank(norm) - 1, c is not None)
        substitute(self, [layer.node for layer in found.layers], lambda op: folded(op, norm, found), editor, context, at=norm)


def affine(norm: fx.Node) -> tuple[Any, Any]:
    """Gain and shift of a norm."""
    bound = arguments(norm)
    return bound["weight"], bound.get("bias")


def folded(op: GraphOps, norm: fx.Node, found: Readers) -> list[fx.Node]:
    """The readers anew, on the norm without gain and shift."""
    op.anchor = op.origin = norm
    x, axes, eps = (arguments(norm)[name] for name in ("input", "normalized_shape", "eps"))
    rms = norm.target is aten.rms_norm.default
    bare = op.rms_norm(x, axes, None, eps) if rms else op.layer_norm(x, axes, None, None, eps)
    return into_readers(op, norm, Diagonal(bare, rank(norm) - 1, *affine(norm)), found)
