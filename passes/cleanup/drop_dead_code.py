"""Drop what nothing reads.

A call is dropped if it is pure; one that draws random numbers or writes memory stays, because what runs after it would
see another state.
"""

from __future__ import annotations

from typing import ClassVar

from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.substitution import removable


class DropDeadCode(Pass):
    """Unread calls and weights out of the graph; see the module."""

    claim = BITWISE
    phase: ClassVar[Phase] = "cleanup"

    def run(self, program: Program, context: Context) -> None:
        for node in reversed(program.graph.nodes):
            if not node.users and removable(node) and context.admits(self, node):
                context.applied(self, node)
                program.graph.erase_node(node)
