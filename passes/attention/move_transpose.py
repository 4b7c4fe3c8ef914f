"""Move the exchange of heads and positions behind what treats each of them alike, to where an attention reads it.

    f(transpose(x)) = transpose(f(x))            f: rotary, a norm of each head, a cast, a new axis before the others
    transpose(squeeze(x)) = squeeze(transpose(x))

A rotary embedding's cos and sin are then spread over the heads instead of the positions. Only on the way into or out of an
attention: there the transposition ends (``pack_attention``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.equation import rank
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.library import tautomer
from tautomer.rewrite.ops import normal
from tautomer.rewrite.pass_base import Context, Pass, Phase, Purpose
from tautomer.rewrite.program import Program

aten = torch.ops.aten
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_ALIKE = {tautomer.rotary.v1, tautomer.normalize.v1, aten.to.dtype, aten.unsqueeze.default, *_NORMS}


class MoveTranspose(Pass):
    """A transposition before what treats both axes alike → behind it; see the module."""

    claim = ALGEBRAIC("none forward; the gradient of a gain is summed over heads and positions in another order")
    phase: ClassVar[Phase] = "choose"
    purpose: ClassVar[Purpose] = "speed"

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        attentions = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        places = {node for attention in attentions for node in (*_before(attention), *_behind(attention))}
        for node in sorted(places, key=order.__getitem__):
            if not context.admits(self, node):
                continue
            try:
                require(node.target not in _NORMS or len(node.args[1]) == 1, "the norm is over heads or positions too")  # type: ignore[arg-type]
                moved = lambda op, node=node: [op.node(_moved(op, node))]  # noqa: E731
                substitute(self, [node], moved, editor, context, copies=True)
            except Refused as refusal:
                context.refused(self, node, str(refusal))


def _before(attention: fx.Node) -> Iterator[fx.Node]:
    """What stands between a transposition and an attention that reads it, a cache in between or not."""
    for node in attention.args[:3]:
        if isinstance(node, fx.Node) and node.target is aten.cat.default:
            node = node.args[0][-1]  # type: ignore[index]
        way = []
        while isinstance(node, fx.Node) and node.target in _ALIKE:
            way.append(node)
            node = node.args[0]
        if way and _exchanges(node):
            yield from way


def _behind(attention: fx.Node) -> Iterator[fx.Node]:
    squeezed = (user for user in attention.users if user.target is aten.squeeze.dim and normal(user)[1] == -4)
    return (user for squeeze in squeezed for user in squeeze.users if _exchanges(user))


def _exchanges(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.transpose.int and normal(node)[1:] == (-3, -2)


def _moved(op: GraphOps, node: fx.Node) -> Any:
    inner, *rest = normal(node)
    require(inner.target in (aten.transpose.int, aten.squeeze.dim), "what is before it could not be moved")
    x = inner.args[0]
    if node.target is aten.transpose.int:
        return op.squeeze(op.transpose(x, -3, -2), -4)
    if node.target is tautomer.rotary.v1:
        rest[:2] = (_across(op, angle) for angle in rest[:2])
    require(node.target is not aten.unsqueeze.default or rest == [-4], "the new axis is not the first")
    return op.transpose(op(node.target)(x, *rest), -3, -2)  # type: ignore[arg-type]


def _across(op: GraphOps, angle: fx.Node) -> Any:
    """cos or sin, one row per position, spread over what stands behind the positions instead of before them."""
    if rank(angle) < 2:
        return angle
    added = op.inside(angle, "unsqueeze")
    if rank(angle) == 2 or (added is not None and added[1] == -3):
        return op.unsqueeze(angle if added is None or rank(angle) == 2 else added[0], -2)
    return op.transpose(angle, -3, -2)
