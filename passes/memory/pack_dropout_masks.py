"""Let a dropout keep one bit per entry, with the numbers it draws.

    dropout(x, p, train) = lean_dropout(x, p, train)[0]

A dropout keeps what it multiplied by, on a CPU a tensor of the size of x. The same draws from the same generator give the same
zeros, so a seeded run goes its way as before; a bit for each says where they were. The dropout inside an attention kernel is left
alone: it keeps a seed.
"""

from __future__ import annotations

import torch
from torch import fx

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.errors import require
from tautomer.rewrite.memory_pass import Exchange, MemoryPass
from tautomer.rewrite.ops import normal
from tautomer.rewrite.saved import SavedTensors

DROPOUT = torch.ops.aten.dropout.default


class PackDropoutMasks(MemoryPass):
    """Dropouts keep one bit per entry; see the module.

    Args: as of ``TrainingPass``.
    """

    claim = BITWISE("the same numbers are drawn, in the same order, and multiplied by")

    def at(self, node: fx.Node) -> fx.Node | None:
        return node if node.target is DROPOUT else None

    def exchange(self, node: fx.Node, saved: SavedTensors, editor: Editor) -> Exchange:
        keeping = any(node.name in tensor.needed_by for tensor in saved.tensors)
        require(keeping, "nothing before it trains: it keeps nothing")
        return [node], lambda op: [packed(op, node)]


def packed(op: GraphOps, node: fx.Node) -> fx.Node:
    result: fx.Node = op.getitem(op.lean_dropout(*normal(node)), 0)
    return result
