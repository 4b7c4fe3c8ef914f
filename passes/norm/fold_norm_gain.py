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

import operator
from functools import partial
from typing import Any

import torch
from torch import fx

from tautomer.rewrite.axes import Axes, Value, rank
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.equation import dtype, shape
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.program import Program, arguments, place, target_name
from tautomer.rewrite.readers import Contraction, Readers, readers

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
KEEP_A_SHIFT = {
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.to.dtype, aten.type_as.default,
    aten.dropout.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.expand.default, aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.index.Tensor, aten.index_select.default,
    aten.roll.default, aten.flip.default, aten.mean.dim, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, operator.getitem,
}  # fmt: skip


class FoldNormGain(Pass):
    """Gain and shift of a norm → its readers' weights; see the module."""

    claim = ALGEBRAIC("the products by g and c are rounded in the weights, not in the activation")
    paper = "arXiv:2407.09577, Proposition 1"

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for norm in [node for node in program.graph.nodes if node.target in NORMS]:
            gain, shift = affine(norm)
            if (gain is None and shift is None) or not context.admits(self, norm):
                continue
            try:
                found = foldable(program, norm)
                old = [reader.node for reader in found.contractions]
                emit = partial(folded, norm=norm, found=found)
                substitute(self, old, emit, editor, context, at=norm)
            except Refused as refusal:
                context.refused(self, norm, str(refusal))


def affine(norm: fx.Node) -> tuple[Any, Any]:
    """Gain and shift of a norm."""
    bound = arguments(norm)
    return bound["weight"], bound.get("bias")


def foldable(program: Program, norm: fx.Node) -> Readers:
    """The readers of ``norm``, if every one of them can take its gain and its shift."""
    vectors, axes = [v for v in affine(norm) if v is not None], arguments(norm)["normalized_shape"]
    require(len(axes) == 1, f"the norm is over {len(axes)} axes, its readers sum over one")
    require(all(program.expression(v) is not None for v in vectors), "the gain or the shift is computed at run time")
    found = readers(Axes(program), Value(norm, rank(norm) - 1))
    require(found.contractions, "nothing reads the norm")
    if affine(norm)[1] is not None:
        for reader in found.contractions:
            require(not pads(reader.node), f"{place(reader.node)} pads with zeros, where the shift would be missing")
        for move in found.moves:
            require(keeps_a_shift(move), f"{target_name(move)} at {place(move)} changes the shift on its way")
    return found


def keeps_a_shift(move: fx.Node) -> bool:
    """Whether move(x + c) = move(x) + c: it puts nothing beside x and weighs nothing."""
    copies = move.target is aten.pad.default and arguments(move)["mode"] != "constant"
    return copies or move.target in KEEP_A_SHIFT


def pads(reader: fx.Node) -> bool:
    """Whether a reader sums over fewer features at the border than inside."""
    padding = arguments(reader).get("padding", [0])
    return reader.target in TRANSPOSED or (padding != "valid" if isinstance(padding, str) else any(padding))


def folded(op: GraphOps, norm: fx.Node, found: Readers) -> list[fx.Node]:
    """The readers anew, on the norm without gain and shift."""
    op.origin = norm
    made = {norm: bare(op, norm)}

    def anew(node: fx.Node) -> Any:
        """``node`` over the bare norm, if it is the norm or a move of it."""
        if node in found.moves and node not in made:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), anew)  # type: ignore[misc]
            op.origin = node
            made[node] = again(op, node, *args, **kwargs)
        return made.get(node, node)

    results = []
    for reader in found.contractions:
        op.anchor = reader.node
        x = anew(reader.value.node)
        op.origin = reader.node
        results.append(op.node(taken(op, reader, x, *affine(norm))))
    return results


def bare(op: GraphOps, norm: fx.Node) -> Any:
    """``norm`` without gain and shift."""
    x, axes, eps = (arguments(norm)[name] for name in ("input", "normalized_shape", "eps"))
    return op.rms_norm(x, axes, None, eps) if norm.target is aten.rms_norm.default else op.layer_norm(x, axes, None, None, eps)


def again(op: GraphOps, call: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """``call`` with other arguments."""
    assert callable(call.target)
    op.editor.metadata.learn(call)
    return op(call.target)(*args, **kwargs)


def taken(op: GraphOps, reader: Contraction, x: Any, g: Any, c: Any) -> Any:
    """``reader`` on x, with the gain g and the shift c of its features in its weights."""
    W, bound = reader.weight, arguments(reader.node)
    scaled = W if g is None else op.mul(W, along(op, g, reader))
    bound = {name: x if y is reader.value.node else scaled if y is W else y for name, y in bound.items()}
    if c is None:
        return again(op, reader.node, *bound.values())
    summed, product = op.mul(W, along(op, c, reader)), reader.node.target is aten.matmul.default
    shift = op.sum(summed, [reader.axis] if product else list(range(1, rank(W))), product)
    if product:
        return op.add(op.matmul(*bound.values()), shift)
    bound["bias"] = shift if bound["bias"] is None else op.add(bound["bias"], shift)
    return again(op, reader.node, *bound.values())


def along(op: GraphOps, v: Any, reader: Contraction) -> Any:
    """v, one entry per feature, as it multiplies the weight of ``reader``."""
    W, behind = reader.weight, [1] * (-reader.axis - 1)
    v = v if dtype(v) == dtype(W) else op.cast(v, dtype(W))
    if reader.groups == 1:
        return op.reshape(v, [-1, *behind]) if behind else v
    outputs, features, groups = shape(W)[0], shape(W)[1], reader.groups
    per_group = op.expand(op.reshape(v, [groups, 1, features]), [groups, outputs // groups, features])
    return op.reshape(per_group, [outputs, features, *behind])
