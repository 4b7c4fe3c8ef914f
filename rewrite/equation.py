"""An equation: two sides over ``op``, the condition under which they are equal, and operands to try it on.

before(op, x, g, …) = after(op, x, g, …)        where(m)
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, fx

from .errors import Refused, require
from .metadata import value_of
from .ops import Ops, TextOps
from .pass_base import Pass, fixed
from .program import Program, target_name
from .shapes import Size, static
from .weights import MUTATED


class Equation(Pass):
    """The two sides of a rewrite.

    ``before`` and ``after`` take ``op`` and the same variables by the same names; an annotation of ``before`` types a
    variable (``Tensor``, ``Weight``, ``OptionalWeight``, ``Scalar``; none binds anything, None included). A variable
    that occurs twice must bind one value. Literals are part of the pattern. Either side may be a tuple: several roots.

    Class attributes:
        interior: whether the ops below the roots may have other readers. "sole" refuses then, because what stays
            alive for them is computed twice; "shared" accepts it.
    """

    interior: ClassVar[Literal["sole", "shared"]] = "sole"

    @abstractmethod
    def before(self, op: Ops, *operands: Any, **more: Any) -> Any:
        """The left side: what is looked for."""

    @abstractmethod
    def after(self, op: Ops, *operands: Any, **more: Any) -> Any:
        """The right side: what stands there afterwards."""

    def where(self, m: Match) -> None:
        """Refuse (``require``) a place where the sides are not equal or nothing is gained. Reads O(1) facts only."""

    def samples(self) -> Iterator[dict[str, Any]]:
        """Operands by variable name, float64: the equation is tested on each. A rule without samples is not accepted."""
        yield from ()

    def misses(self, program: Program) -> Iterator[tuple[fx.Node, str]]:
        """Places of ``program`` that a user may expect to be rewritten and that the pattern does not fit, each with the reason.

        Asked once, when nothing fires any more.
        """
        yield from ()

    @property
    def equation(self) -> str:
        """``linear(rms_norm(x, g), W) = linear(rms_norm(x), mul(W, g))``: both sides, read."""
        sides = []
        for side in (self.before, self.after):
            names = list(inspect.signature(side).parameters)[1:]
            text = side(TextOps(), **{name: name for name in names})
            sides.append(", ".join(map(str, text)) if isinstance(text, tuple) else str(text))
        return " = ".join(sides)


@dataclass(frozen=True)
class Match:
    """Where an equation's left side was found. A variable is read as an attribute: ``m.x``.

    Attributes:
        values: variables by name: a node, or the literal it was bound to.
        roots: the nodes that will be replaced.
        nodes: every node of the left side, roots included.
        program: the program it was found in.
    """

    values: Mapping[str, Any]
    roots: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    program: Program

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def root(self) -> fx.Node:
        return self.roots[0]

    def other_reader(self, node: fx.Node) -> fx.Node | None:
        """A reader of ``node`` outside the match, if there is one."""
        return next((user for user in node.users if user not in self.nodes), None)


def require_match(rule: Equation, m: Match) -> None:
    """Refuse what the pattern cannot see: memory that is written, fixed code, the rule's own condition, other readers.

    An op below the roots that stays alive for another reader would be computed twice; a "shared" rule accepts that.
    """
    for node in m.nodes:
        require(not node.meta.get(MUTATED), "a value in the pattern is written in place")
        require(fixed(node) is None, str(fixed(node)))
    rule.where(m)
    if rule.interior == "shared" or len(m.nodes) == len(m.roots):
        return
    for node in m.nodes:
        if len(node.users) > 1 and node not in m.roots and (reader := m.other_reader(node)) is not None:
            what, who = f"{target_name(node)} '{node.name}'", f"{target_name(reader)} '{reader.name}'"
            raise Refused(f"{what} is also read by {who}, so it would be computed twice")


# -- facts a condition may ask --------------------------------------------------------------------------------


def shape(x: Any) -> tuple[Size, ...]:
    """The shape of a bound tensor; its sizes may be symbols, so compare them with ``shapes.same``."""
    value = value_of(x)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def rank(x: Any) -> int:
    """The number of axes of a bound tensor."""
    return len(shape(x))


def width(x: Any) -> int | None:
    """The size of the last axis, if it is the same for every input."""
    sizes = shape(x)
    return static(sizes[-1]) if sizes else None


def is_vector(x: Any, size: int | None) -> bool:
    """Whether a bound tensor is exactly ``[size]``."""
    return rank(x) == 1 and size is not None and width(x) == size


def dtype(x: Any) -> Any:
    """The dtype of a bound tensor, None for anything else."""
    return getattr(value_of(x), "dtype", None)
