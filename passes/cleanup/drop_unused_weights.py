"""Drop the weights that a rewrite has consumed.

    W' = W diag(g)     W and g are read no more, under any name of their storage: they leave the table

A weight that no rewrite consumed stays even if nothing reads it: the user's state dict has it. An edited weight that
a later edit replaced goes too, and so does an unread buffer that is the last thing left of its module: the counter of a
folded BatchNorm.
"""

from __future__ import annotations

from typing import ClassVar

from tautomer.rewrite._torch import storage_key
from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.weights import Weights, leaves


class DropUnusedWeights(Pass):
    """Consumed weights out of the table; see the module."""

    claim = BITWISE
    phase: ClassVar[Phase] = "cleanup"

    def run(self, program: Program, context: Context) -> None:
        if not context.admits(self, program.output):
            return
        weights = program.weights
        for node in program.graph.find_nodes(op="get_attr"):
            if not node.users:
                program.graph.erase_node(node)
        read = {str(node.target) for node in program.graph.find_nodes(op="get_attr")} & set(weights)
        storages, consumed = {weights.storage(name) for name in read}, _consumed(weights)
        unread = [name for name in weights if name not in read and weights.storage(name) not in storages]
        gone = [name for name in unread if weights[name].edited or storage_key(weights.leaves[name]) in consumed]
        gone += [name for name in unread if weights[name].kind == "buffer" and _is_left_alone(name, gone, weights)]
        if gone:
            context.applied(self, program.output, f"part of other weights now: {', '.join(gone)}")
        for name in gone:
            weights.drop(name)


def _is_left_alone(name: str, gone: list[str], weights: Weights) -> bool:
    """Whether ``name`` stays, and everything else in its module has gone."""
    module = name.rpartition(".")[0]
    others = [leaf for leaf in weights.leaves if leaf != name and leaf.rpartition(".")[0] == module]
    stays = any(other in weights and other not in gone for other in others)
    return name not in gone and not stays and any(other in gone for other in others)


def _consumed(weights: Weights) -> set[int]:
    """The storages that edited weights are made of."""
    edited = [weights[name].expression for name in weights if weights[name].edited]
    return {storage_key(weights.leaves[leaf]) for expression in edited for leaf in leaves(expression)}
