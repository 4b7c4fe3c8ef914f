"""Let a norm keep its output, which the linear layers behind it keep anyway, instead of its input.

    z = layer_norm(x, g, b)     linear(z, W, c)
      =  z, y = ms_layer_norm(x, g, b)     linear_from(z, W, c, "affine", y, g, b)        y = (z - b) / g, before gain and shift

    dx = r (dy - mean dy - y mean(dy y))        needs y and r, not x;  and z = y g + b

So x goes and y, which has the dtype in which the layers read it (16 bits under autocast), serves all. Gain and shift stay the
user's parameters: nothing is folded, any optimizer goes its way as before. The same for RMSNorm, and for an adapter behind a
dropout that keeps bits (``pack-dropout-masks``).

Only where a layer keeps the norm's output: not if every reader is frozen or reads it through another dropout (which keeps its own
copy), and not if something else keeps x as well.

arXiv:2406.16282 (MS-LN, MS-RMSNorm).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.memory_pass import Exchange, MemoryPass
from tautomer.rewrite.ops import OPS, normal
from tautomer.rewrite.program import place
from tautomer.rewrite.saved import SavedTensors

from .recompute_inputs import Source, layer_from, made_again, reads, require_keepers, source_of

LEAN_DROPOUT = OPS["lean_dropout"].target
_NORMS = ("layer_norm", "rms_norm")


class ShareNormOutput(MemoryPass):
    """Norms keep their output, which the linear layers behind them share; see the module.

    Args: as of ``TrainingPass``.
    """

    claim = ALGEBRAIC("none in the forward; the gradient reads y rounded to the dtype in which the layers read it")
    paper: ClassVar[str] = "arXiv:2406.16282"

    def at(self, node: fx.Node) -> fx.Node | None:
        source = source_of(node)
        return node if source is not None and source.by in _NORMS else None

    def exchange(self, node: fx.Node, saved: SavedTensors, editor: Editor) -> Exchange:
        layers, source = require_readers(editor, node), source_of(node)
        self.require_gain(saved, node, layers)
        dropped = [x for x in dict.fromkeys(map(read_by, layers)) if x is not node]
        assert source is not None
        return [node, *dropped, *layers], partial(emit, value=node, source=source, dropped=dropped, layers=layers)

    def require_gain(self, saved: SavedTensors, value: fx.Node, layers: Sequence[fx.Node]) -> None:
        """Refuse where y and r are not less than what goes for them."""
        call = value.all_input_nodes[0] if value.args[1:] == (0,) else value
        names = {call.name, *(layer.name for layer in layers)}
        casts = (tensor for tensor in saved.tensors if tensor.kind == "cast" and tensor.node in names)
        read = (saved.at[x.name] for x in (value, *map(read_by, layers)) if x.name in saved.at)
        kept = next(read, None) or next(casts, None)
        require(kept, "nothing of what it returns is kept")
        assert kept is not None
        entries = math.prod(kept.shape)
        size = (self.autocast or value.meta["val"].dtype).itemsize
        comes = entries * size + entries // kept.shape[-1] * max(4, value.meta["val"].dtype.itemsize)
        goes, again = saved.freed(names), saved.freed({layer.name for layer in layers})
        require(goes > comes, f"its output and one number per row are {comes:,} bytes; {goes:,} would go for them")
        less = f"{goes - comes:,} bytes would be freed, and {again:,} if the layers computed it again from its input, which stays"
        require(goes - comes >= again, less)


def require_readers(editor: Editor, value: fx.Node) -> list[fx.Node]:
    """The linear layers that keep ``value``.

    Raises:
        Refused: there is none.
    """
    dropout = next((user for user in value.users if user.target is torch.ops.aten.dropout.default), None)
    packed = [user for user in value.users if user.target is LEAN_DROPOUT]
    dropped = [result for call in packed for result in call.users if result.args[1] == 0]
    layers = [user for x in (value, *dropped) for user in x.users if reads(user, x)]
    try:
        require(layers, "no linear layer reads it")
        return require_keepers(editor, layers)
    except Refused as refusal:
        through = f"; {place(dropout)} drops entries out and what reads that keeps another tensor" if dropout else ""
        raise Refused(f"{refusal}{through}") from None


def read_by(layer: fx.Node) -> fx.Node:
    """What a linear layer reads: the norm, or what a dropout lets through of it."""
    return layer.all_input_nodes[0]


def emit(op: GraphOps, value: fx.Node, source: Source, dropped: Sequence[fx.Node], layers: Sequence[fx.Node]) -> list[fx.Node]:
    """The norm that keeps its output, what is dropped out of it, and every layer on these."""
    x, g, b, eps = source.a, source.p, source.q, source.k
    norm = op.ms_layer_norm(x, g, b, eps) if source.by == "layer_norm" else op.ms_rms_norm(x, g, eps)
    z, y = op.getitem(norm, 0), op.getitem(norm, 1)
    shared = Source("affine", y, g, b)
    new, sources = {value: z}, {value: shared}
    for old in dropped:
        new[old] = made_again(op, old, new)
        call = new[old].args[0]
        sources[old] = replace(shared, bits=op.getitem(call, 1), rate=normal(call)[1])
    made = [layer_from(op, layer, new[read_by(layer)], sources[read_by(layer)]) for layer in layers]
    return [*new.values(), *made]
