"""Let a gated unit and quick GELU keep their operands, not what they compute on the way.

    glu(u, v, by) = lean_glu(u, v, by)        keeps u and v; the product alone would keep by(u) as well
    quick_gelu(u) = lean_activation(u, …)     keeps u; the product alone would keep the sigmoid as well

A gate by sigmoid or ReLU keeps its result, which the product shares: there is nothing to free.

Liger-Kernel, arXiv:2410.10989.
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.equation import shape
from tautomer.rewrite.errors import require
from tautomer.rewrite.memory_pass import Exchange, MemoryPass
from tautomer.rewrite.ops import OPS, normal
from tautomer.rewrite.saved import SavedTensors
from tautomer.rewrite.shapes import same_shape

GLU, QUICK_GELU = OPS["glu"].target, OPS["quick_gelu"].target


class LeanActivations(MemoryPass):
    """Gated units and quick GELU → ops that keep their operands alone; see the module.

    Args: as of ``TrainingPass``.
    """

    claim = ALGEBRAIC("none in the forward; the gradient is rounded in another order")
    paper: ClassVar[str] = "arXiv:2410.10989"

    def at(self, node: fx.Node) -> fx.Node | None:
        return node if node.target in (GLU, QUICK_GELU) else None

    def exchange(self, node: fx.Node, saved: SavedTensors, editor: Editor) -> Exchange:
        return [node], lambda op: [lean(op, node)]


def lean(op: GraphOps, node: fx.Node) -> fx.Node:
    """The lean op for a gated unit or a quick GELU."""
    result: fx.Node
    if node.target is QUICK_GELU:
        result = op.lean_activation(*normal(node), "quick_gelu")
        return result
    gate, up, by = normal(node)
    require(by not in ("sigmoid", "relu"), f"{by} keeps its result, which the product shares: nothing would be freed")
    require(same_shape(shape(gate), shape(up)), "one factor is stretched along the other")
    result = op.lean_glu(gate, up, by)
    return result
