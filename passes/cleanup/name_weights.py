"""Give an edited weight the name of the weight it replaces, and the table its original order.

    h.0.attn.c_attn.weight_1   ->   h.0.attn.c_attn.weight        if nothing reads the old one any more

So a state dict of the rewritten model has the keys of the original, as far as the same parameters exist.
"""

from __future__ import annotations

import re
from typing import ClassVar

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.weights import Weights


class NameWeights(Pass):
    """``weight_1`` → ``weight``; see the module. Runs after ``drop_unused_weights``."""

    claim = BITWISE
    phase: ClassVar[Phase] = "cleanup"

    def run(self, program: Program, context: Context) -> None:
        if not context.admits(self, program.output):
            return
        renamed = {name: base for name in program.weights if (base := _free_base(name, program.weights)) is not None}
        bases = list(renamed.values())
        renamed = {name: base for name, base in renamed.items() if bases.count(base) == 1}
        if not renamed:
            return
        context.applied(self, program.output, f"edited in place of the original: {', '.join(renamed.values())}")
        for name, base in renamed.items():
            program.weights.rename(name, base)
        for node in program.graph.find_nodes(op="get_attr"):
            node.target = renamed.get(str(node.target), node.target)
        _restore_order(program.weights)


def _free_base(name: str, weights: Weights) -> str | None:
    """The original name that an edited weight may take: free, and of the same shape. Two edits leave ``weight_1_1``."""
    base = name
    while base not in weights.leaves and re.search(r"_\d+$", base):
        base = base.rpartition("_")[0]
    if base == name or base in weights or base not in weights.leaves:
        return None
    return base if weights.leaves[base].shape == weights[name].meta.shape else None


def _restore_order(weights: Weights) -> None:
    place = {name: index for index, name in enumerate(weights.leaves)}
    weights.entries = dict(sorted(weights.entries.items(), key=lambda item: place.get(item[0], len(place))))
