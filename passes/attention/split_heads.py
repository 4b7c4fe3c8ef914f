"""Split what one projection holds side by side before its heads are told apart.

    permute(unflatten(x, [n, heads, d]), [n, …, heads, t, d])[i]  =  transpose(unflatten(split(x, heads · d)[i], [heads, d]))

x is [batch, t, n · heads · d]: queries, keys and values (n = 3) or keys and values (n = 2), as vision models write them. What
``pack_attention`` asks for, the exchange of heads and positions, then stands by itself behind each part, and cancels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.metadata import value_of
from tautomer.rewrite.ops import normal
from tautomer.rewrite.pass_base import Context, Pass, Phase, Purpose
from tautomer.rewrite.program import Program
from tautomer.rewrite.shapes import same_shape, static

aten = torch.ops.aten


class SplitHeads(Pass):
    """Parts of a permutation that brings them to the front → parts of a split; see the module."""

    claim = BITWISE
    phase: ClassVar[Phase] = "choose"
    purpose: ClassVar[Purpose] = "speed"

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for permute in program.graph.find_nodes(op="call_function", target=aten.permute.default):
            sizes, parts = _sizes(permute), _parts(permute)
            if sizes is None or not parts or not context.admits(self, next(iter(parts))):
                continue

            def emit(op: GraphOps, x: fx.Node = permute.args[0].args[0], sizes: list[int] = sizes, parts: Parts = parts) -> Made:  # type: ignore[union-attr]
                pieces = op.split(x, sizes[0] * sizes[1], -1)
                each = {i: op.transpose(op.unflatten(op.getitem(pieces, i), -1, sizes), -3, -2) for i in set(parts.values())}
                return [op.node(each[i]) for i in parts.values()]

            try:
                substitute(self, list(parts), emit, editor, context)
            except Refused as refusal:
                context.refused(self, permute, str(refusal))


Parts = dict[fx.Node, int]
Made = list[fx.Node]


def _sizes(permute: fx.Node) -> list[int] | None:
    """How many heads each part has, and how wide they are, if ``permute`` brings the parts of a last axis to the front."""
    apart, order = normal(permute)
    if apart.target not in (aten.reshape.default, aten.view.default, aten.unflatten.int):
        return None
    before, after = value_of(apart.args[0]).shape, value_of(apart).shape
    rank, (*sizes,) = len(after), map(static, after[-3:])
    t, n, heads, d = range(rank - 4, rank)
    wanted = [n, *range(t), heads, t, d]
    if rank < 4 or not same_shape(before[:-1], after[:-3]) or None in sizes or [axis % rank for axis in order] != wanted:
        return None
    return [size for size in sizes[1:] if size is not None]


def _parts(permute: fx.Node) -> Parts:
    """The parts that are read, each with its number; empty if anything else is read."""
    found: Parts = {}
    for user in permute.users:
        first = user.target in (aten.unbind.int, aten.select.int) and normal(user)[1] % value_of(permute).dim() == 0
        if first and user.target is aten.unbind.int:
            found |= {part: int(part.args[1]) for part in user.users}  # type: ignore[arg-type]
        elif first and isinstance(normal(user)[2], int):
            found[user] = normal(user)[2] % value_of(permute).shape[0]
        else:
            return {}
    return found
