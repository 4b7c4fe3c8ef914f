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
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.ops import normal
from tautomer.rewrite.pass_base import Context, Pass, Purpose
from tautomer.rewrite.program import Program
from tautomer.rewrite.saved import SavedTensors, saved_in_training

aten = torch.ops.aten


class ApproximateActivations(Pass):
    """GELU and SiLU keep two bits per entry, and get approximate gradients; see the module.

    Args:
        autocast: the dtype of autocast that the program will be trained under, if any: it decides what is kept.
    """

    claim = APPROXIMATE_GRADIENT("the slope of an activation is one of four numbers, nearly unbiased for normal inputs")
    paper: ClassVar[str] = "arXiv:2406.16282"
    purpose: ClassVar[Purpose] = "memory"

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        self.autocast = autocast

    def run(self, program: Program, context: Context) -> None:
        saved, editor = saved_in_training(program, self.autocast), Editor(program)
        for node in list(program.graph.nodes):
            if node.target not in (aten.gelu.default, aten.silu.default) or not context.admits(self, node):
                continue
            try:
                require_gain(saved, node)
                substitute(self, [node], lambda op, node=node: [emit(op, node)], editor, context)  # type: ignore[misc]
            except Refused as refusal:
                context.refused(self, node, str(refusal))


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
