"""Keep two bits of what an activation reads; its gradient becomes a step function.

    gelu(u) = regelu2(u)        silu(u) = resilu2(u)        forward the same bits

    dy h~'(u)  for  dy h'(u),      h~(u) = Σ a_i max(u - c_i, 0)  the nearest to h of this form

Nothing is gained where something else keeps u, and an exact rewrite is as good where a layer that trains reads the result
(``recompute-inputs``: u stays, the result goes): so this comes after the exact ones. Meant for fine-tuning; gradients of inputs
become coarse, a second derivative raises.

arXiv:2406.16282 (ReGELU2, ReSiLU2).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from tautomer.rewrite.claims import APPROXIMATE_GRADIENT
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.errors import require
from tautomer.rewrite.memory_pass import Exchange, MemoryPass
from tautomer.rewrite.ops import normal
from tautomer.rewrite.saved import SavedTensors

aten = torch.ops.aten


class ApproximateActivations(MemoryPass):
    """GELU and SiLU keep two bits per entry, and get approximate gradients; see the module.

    Args: as of ``TrainingPass``.
    """

    claim = APPROXIMATE_GRADIENT("the slope of an activation is one of four numbers, nearly unbiased for normal inputs")
    paper: ClassVar[str] = "arXiv:2406.16282"

    def at(self, node: fx.Node) -> fx.Node | None:
        return node if node.target in (aten.gelu.default, aten.silu.default) else None

    def exchange(self, node: fx.Node, saved: SavedTensors, editor: Editor) -> Exchange:
        require_gain(saved, node)
        return [node], lambda op: [emit(op, node)]


def require_gain(saved: SavedTensors, node: fx.Node) -> None:
    """Refuse where the operand is not kept, or stays for something else."""
    kept = next((tensor for tensor in saved.tensors if node.name in tensor.needed_by), None)
    require(kept, "nothing before it trains: it keeps nothing")
    others = [name for name in kept.needed_by if name != node.name] if kept else []
    require(not others, f"what it reads is kept by {', '.join(others)} too: two bits would come on top")


def emit(op: GraphOps, node: fx.Node) -> fx.Node:
    pair = op.regelu2(*normal(node)) if node.target is aten.gelu.default else op.resilu2(node.args[0])
    result: fx.Node = op.getitem(pair, 0)
    return result
