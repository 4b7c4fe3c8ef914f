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

from torch import fx

from tautomer.rewrite.blocks import Block, repeated
from tautomer.rewrite.checkpoints import given, inside, is_one_call, mark
from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.memory_pass import TrainingPass
from tautomer.rewrite.pass_base import Context, Purpose
from tautomer.rewrite.program import Program, path_of
from tautomer.rewrite.saved import SavedTensors


class CheckpointBlocks(TrainingPass):
    """Blocks are run again in the backward; see the module.

    Args: as of ``TrainingPass``.
    """

    claim = BITWISE("the same calls on the same values, a second time")
    paper: ClassVar[str] = "arXiv:1604.06174"
    purpose: ClassVar[Purpose] = "memory"

    def run(self, program: Program, context: Context) -> None:
        saved = self.saved(program)
        for block in sites(program):
            first = block.nodes[0]
            if not context.lets(self, first):  # no value is replaced, so a node that must stay as it is may be in it
                continue
            try:
                require_gain(saved, block)
                mark(block)
                context.applied(self, first, f"{block} is run again")
            except Refused as refusal:
                context.refused(self, first, str(refusal))


def require_gain(saved: SavedTensors, block: Block) -> list[fx.Node]:
    """The calls of ``block`` that are run again.

    Raises:
        Refused: it cannot be run again, or what it is given is no less than what it keeps.
    """
    nodes = inside(block)
    names = {node.name for node in nodes}
    require(nodes and is_one_call(nodes), "something that it reads is computed from what it returns")
    require(saved.freed(names), "nothing in it or before it trains: it keeps nothing of its own")
    comes = {id(tensor): tensor for x in given(nodes) for tensor in saved.values.get(x.name, ())}
    more = sum(tensor.bytes for tensor in comes.values() if not tensor.needed_by)
    less = sum(x.bytes for x in saved.tensors if names.issuperset(x.needed_by) and id(x) not in comes)
    require(less > more, "what it reads would be kept, and that is no less than what it keeps")
    return nodes


def sites(program: Program) -> list[Block]:
    """The blocks that may be checkpointed: repeated ones and other numbered modules; else the modules of the first level."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    equal = [block for group in repeated(program) for block in group]
    taken = {node for block in equal for node in block.nodes}
    alone = _runs(calls, lambda node: "" if node in taken else _numbered(path_of(node)))
    return equal + alone or _runs(calls, lambda node: path_of(node).partition(".")[0])


def _runs(calls: Sequence[fx.Node], path: Callable[[fx.Node], str]) -> list[Block]:
    runs = ((name, tuple(run)) for name, run in groupby(calls, path))
    return [Block(name, nodes) for name, nodes in runs if name and len(nodes) > 1]


def _numbered(path: str) -> str:
    """The outermost module of a path that has a number; empty if none has."""
    parts = path.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")
