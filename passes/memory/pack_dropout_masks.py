"""Let a dropout keep one bit per entry, with the numbers it draws.

    dropout(x, p, train) = lean_dropout(x, p, train)[0]

A dropout keeps what it multiplied by, on a CPU a tensor of the size of x. The same draws from the same generator give the same
zeros, so a seeded run goes its way as before; a bit for each says where they were. The dropout inside an attention kernel is left
alone: it keeps a seed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.ops import normal
from tautomer.rewrite.pass_base import Context, Pass, Purpose
from tautomer.rewrite.program import Program
from tautomer.rewrite.saved import saved_in_training

DROPOUT = torch.ops.aten.dropout.default


class PackDropoutMasks(Pass):
    """Dropouts keep one bit per entry; see the module."""

    claim = BITWISE("the same numbers are drawn, in the same order, and multiplied by")
    purpose: ClassVar[Purpose] = "memory"

    def run(self, program: Program, context: Context) -> None:
        saved, editor = saved_in_training(program), Editor(program)
        keeping = {name for tensor in saved.tensors for name in tensor.needed_by}
        for node in list(program.graph.nodes):
            if node.target is not DROPOUT or not context.admits(self, node):
                continue
            try:
                require(node.name in keeping, "nothing before it trains: it keeps nothing")
                substitute(self, [node], lambda op, node=node: [packed(op, node)], editor, context)  # type: ignore[misc]
            except Refused as refusal:
                context.refused(self, node, str(refusal))


def packed(op: GraphOps, node: fx.Node) -> fx.Node:
    result: fx.Node = op.getitem(op.lean_dropout(*normal(node)), 0)
    return result
