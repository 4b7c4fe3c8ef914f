"""Let the backward run a block again instead of keeping what it computes.

    y = block(x)   →   y = checkpointed(block, x)        keeps x; the block's forward runs twice, with the same random numbers

The repeated blocks of the model and other numbered modules; where it has none, its modules of the first level. What a block reads
is kept: its input, masks and positions. Nothing is checkpointed that keeps no more as it is, and no block that writes memory (the
statistics of a batch norm): the second run would write it again.

arXiv:1604.06174, and ``torch.utils.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import ClassVar

import torch
from torch import fx

from tautomer.rewrite.blocks import Block, repeated
from tautomer.rewrite.checkpoints import mark, unmark
from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.pass_base import Context, Pass, Purpose
from tautomer.rewrite.program import Program, path_of
from tautomer.rewrite.saved import saved_in_training


class CheckpointBlocks(Pass):
    """Blocks are run again in the backward; see the module.

    Args:
        autocast: the dtype of autocast that the program will be trained under, if any: it decides what is kept.
    """

    claim = BITWISE("the same calls on the same values, a second time")
    paper: ClassVar[str] = "arXiv:1604.06174"
    purpose: ClassVar[Purpose] = "memory"

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        self.autocast = autocast

    def run(self, program: Program, context: Context) -> None:
        saved, twin = saved_in_training(program, self.autocast), program.copy()
        twins = {node.name: node for node in twin.graph.nodes}
        for group in sites(program):
            gains = dict[int, int]()  # of equal blocks that let go of as much, one is tried
            for block in group:
                first = block.nodes[0]
                if not context.lets(self, first):  # no value is replaced, so a node that must stay as it is may be in it
                    continue
                try:
                    goes = saved.freed({node.name for node in block.nodes})
                    require(goes, "nothing in it or before it trains: it keeps nothing of its own")
                    if goes not in gains:
                        same = Block(block.path, tuple(twins[node.name] for node in block.nodes))
                        mark(same)
                        gains[goes] = saved.bytes - saved_in_training(twin, self.autocast).bytes
                        unmark(same)
                    require(gains[goes] > 0, "what it reads would be kept, and that is no less than what it keeps")
                    mark(block)
                    context.applied(self, first, f"{block} is run again")
                except Refused as refusal:
                    context.refused(self, first, str(refusal))


def sites(program: Program) -> Sequence[Sequence[Block]]:
    """The blocks that may be checkpointed, those that are equal together: repeated ones and other numbered modules; else
    the modules of the first level."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    groups = [list(group) for group in repeated(program)]
    taken = {node for group in groups for block in group for node in block.nodes}
    alone = [[block] for block in _runs(calls, lambda node: "" if node in taken else _numbered(path_of(node)))]
    return groups + alone or [[block] for block in _runs(calls, lambda node: path_of(node).partition(".")[0])]


def _runs(calls: Sequence[fx.Node], path: Callable[[fx.Node], str]) -> list[Block]:
    runs = ((name, tuple(run)) for name, run in groupby(calls, path))
    return [Block(name, nodes) for name, nodes in runs if name and len(nodes) > 1]


def _numbered(path: str) -> str:
    """The outermost module of a path that has a number; empty if none has."""
    parts = path.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")
