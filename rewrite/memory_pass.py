"""A rewrite after which the backward keeps less: where it fits, what is asked of the facts, what is put in the place of what.

saved(program) → at each node: fits? admitted? gains? → substitute, or the sentence that says why not
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import fx

from .emit import Editor, GraphOps
from .engine import substitute
from .errors import Refused
from .pass_base import Context, Pass, Purpose
from .program import Program
from .saved import SavedTensors, saved_in_training

Exchange = tuple[Sequence[fx.Node], Callable[[GraphOps], Sequence[fx.Node]]]
"""Nodes, and what emits as many that stand for them."""


class TrainingPass(Pass):
    """A pass that asks what the backward keeps.

    Args:
        autocast: the dtype of autocast that the program will be trained under, if any: it decides what is kept.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        self.autocast = autocast

    def saved(self, program: Program) -> SavedTensors:
        return saved_in_training(program, self.autocast)


class MemoryPass(TrainingPass):
    """A pass that exchanges calls one place after the other, and keeps less for each.

    Args: as of ``TrainingPass``.
    """

    purpose: ClassVar[Purpose] = "memory"

    @abstractmethod
    def at(self, node: fx.Node) -> fx.Node | None:
        """The node at which the rewrite is recorded if it fits at ``node``; None if it does not."""

    @abstractmethod
    def exchange(self, node: fx.Node, saved: SavedTensors, editor: Editor) -> Exchange:
        """What stands for what.

        Args:
            saved: of the program before this pass: names at and above ``node`` are those of the graph.

        Raises:
            Refused: nothing would be freed, or it cannot be done here.
        """

    def run(self, program: Program, context: Context) -> None:
        saved, editor = self.saved(program), Editor(program)
        for node in reversed(list(program.graph.nodes)):
            at = self.at(node)
            if at is None or not context.admits(self, at):
                continue
            try:
                old, emit = self.exchange(node, saved, editor)
                substitute(self, old, emit, editor, context, at=at)
            except Refused as refusal:
                context.refused(self, at, str(refusal))
