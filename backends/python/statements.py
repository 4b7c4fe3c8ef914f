"""What a function of a written module is made of: statements, loops over numbered modules, inputs and results."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import fx

from .pieces import Code, Var, code, literal, plain

Index = tuple[str, int]
"""A numbered module: the path of its list, its number."""


@dataclass
class Statement:
    """``targets = value``.

    Attributes:
        targets: the values it gives a name; None for a member that nothing reads.
        value: the expression.
        index: the numbered module that it calls, if any.
        spread: whether the targets are the members of the value.
    """

    targets: tuple[Hashable | None, ...]
    value: Code
    index: Index | None = None
    spread: bool = False


@dataclass
class Loop:
    """``for module in self.list[start:stop]: body``.

    Attributes:
        carried: pairs of values: what a variable is before the loop, and after one turn.
        whole: whether the loop is over the whole list.
        last: the values of the last turn, by the variables that hold them after the loop.
    """

    path: str
    start: int
    stop: int
    whole: bool
    body: list[Statement]
    carried: list[tuple[Hashable, Hashable]]
    last: dict[Hashable, Hashable] = field(default_factory=dict)


@dataclass
class Function:
    """The ``forward`` of a module.

    Attributes:
        inputs: the values it takes.
        outputs: the values it returns.
        body: its statements.
        result: what it returns, as text; None for the whole model, whose result is built of ``kept``.
        kept: the values that are needed after the last statement.
    """

    inputs: list[fx.Node]
    outputs: list[fx.Node]
    body: list[Statement | Loop] = field(default_factory=list)
    result: Code | None = None
    kept: list[Hashable] = field(default_factory=list)


LOOP = Var("the module of a loop")


def attribute(path: str, owner: Code | None = None) -> Code:
    """``self.h[0].norm`` for the path ``h.0.norm``."""
    found = plain("self") if owner is None else owner
    for part in path.split(".") if path else []:
        if part.isdigit():
            found = code(found, f"[{part}]", cost=0)
        elif part.isidentifier():
            found = code(found, f".{part}", cost=0)
        else:
            found = code(found, ".get_submodule(", literal(part, "path"), ")", cost=0)
    return found
