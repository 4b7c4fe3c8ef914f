"""How a value of the rewritten program stands to the value it comes from, when it is not simply equal.

A pass that changes values inside the graph (a stream loses its mean) says so on the nodes. Verification then compares
every node of the two programs under the stated relation, in float64, and finds the first that lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx


class Relation(Protocol):
    """A map from the original's value to the rewritten program's value of the same node."""

    def __call__(self, original: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Centred:
    """new = old - mean(old) along ``axis``."""

    axis: int

    def __call__(self, original: Tensor) -> Tensor:
        return original - original.mean(self.axis, keepdim=True)


def relate(node: fx.Node, *relations: Relation) -> None:
    """State that ``node`` stands in ``relations`` to its original, on top of those it already has."""
    stated = node.meta.get("relation", ())
    node.meta["relation"] = (*stated, *(relation for relation in relations if relation not in stated))


def related(node: fx.Node, original: Tensor) -> Tensor:
    """What ``node`` should be, given the original's value."""
    for relation in node.meta.get("relation", ()):
        original = relation(original)
    return original
