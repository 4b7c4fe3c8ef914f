"""New nodes beside old ones, in a copy of a program that still computes what it did: what they would compute, on data.

    y = attention(q, k, v)
    y' = window_attention(q, k, v)        nobody reads it

Every layer then sees the values of the original, whatever the new nodes before it make of theirs (teacher forcing).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .calibration import Data
from .emit import Editor, GraphOps
from .program import Program

Twins = Mapping[fx.Node, fx.Node]
"""The nodes of a copy by those of the original."""


@dataclass(frozen=True)
class Beside:
    """A copy of a program with new nodes.

    Attributes:
        program: the copy.
        twins: its nodes by those of the original.
        made: the new nodes of each place, by its node in the original; None where one was not made.
    """

    program: Program
    twins: Twins
    made: Mapping[fx.Node, tuple[fx.Node | None, ...]]

    def watch(self, data: Data, see: Callable[[fx.Node, list[Tensor | None]], None]) -> None:
        """Call ``see(place, [values of its new nodes…, its own value])`` for every place on every call of ``data``."""
        places = {self.twins[place]: place for place in self.made}
        wanted = {node for nodes in self.made.values() for node in nodes if node is not None}
        values: dict[fx.Node, Tensor] = {}

        def keep(node: fx.Node, value: Tensor) -> None:
            if node in wanted:
                values[node] = value
            if node in places:
                place = places[node]
                see(place, [*(None if new is None else values.get(new) for new in self.made[place]), value])
                for new in self.made[place]:
                    values.pop(new, None)  # type: ignore[arg-type]

        data.watch(self.program, [*wanted, *places], keep)


def beside(program: Program, places: Sequence[fx.Node], emit: Callable[[GraphOps, fx.Node, Twins], Sequence[Any]]) -> Beside:
    """A copy of ``program`` in which ``emit(op, place, twins)`` stands before every place; ``place`` is of the original."""
    copy = program.copy()
    twins = dict(zip(program.graph.nodes, copy.graph.nodes, strict=True))
    editor, made = Editor(copy), dict[fx.Node, tuple[fx.Node | None, ...]]()
    for place in places:
        op = editor.before(twins[place])
        made[place] = tuple(None if new is None else op.node(new) for new in emit(op, place, twins))
    return Beside(copy, twins, made)


def relative(error: Tensor, value: Tensor) -> Tensor:
    """[Σ error², Σ value²], to be summed over calls; the square root of their ratio is the relative error."""
    return torch.stack([error.double().square().sum(), value.double().square().sum()])
