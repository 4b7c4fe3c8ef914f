"""Who reads the features of a value: the calls that contract them with a weight, behind those that only move them.

    linear(x, W, b)      conv(x, W, b)      x W      W x           each sums over the features of x times a weight
    reshape, permute, slice, mean over tokens, …                   each treats every feature alike and leaves it where it is

Moves commute with any gain per feature. A gain, a shift or a change of basis of the features can therefore go to the weights
of all readers exactly when every path from the value ends in a contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axes import Axes, Value, rank
from .errors import Refused
from .program import arguments, place, target_name
from .weights import opaque

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """A call that sums over the features of ``value`` times a weight.

    Attributes:
        node: the call.
        value: the operand, and the axis of its features.
        weight: the other operand.
        axis: its axis that is summed over, counted from the end. With groups it holds the features of one group.
        groups: of a convolution, else 1.
    """

    node: fx.Node
    value: Value
    weight: fx.Node
    axis: int
    groups: int = 1


@dataclass(frozen=True)
class Readers:
    """Where the features of a value end, and the moves in between; both in the order of the graph."""

    moves: tuple[fx.Node, ...]
    contractions: tuple[Contraction, ...]


def readers(axes: Axes, value: Value) -> Readers:
    """Every reader of the features of ``value``.

    Raises:
        Refused: one of them is no contraction with a weight.
    """
    moves, ends, stack, seen = set[fx.Node](), list[Contraction](), [value], {value}
    while stack:
        value = stack.pop()
        for user in value.node.users:
            if (end := contraction(axes, user, value)) is not None:
                ends.append(end)
                continue
            onward = axes.carried(value, user)
            if not onward or any(axes.carriers(moved) != (value,) for moved in onward):
                raise Refused(f"{target_name(user)} at {place(user)} reads it too")
            moves.update((user, *(moved.node for moved in onward)))
            stack += [moved for moved in onward if moved not in seen]
            seen.update(onward)
    return Readers(tuple(sorted(moves)), tuple(sorted(ends, key=lambda end: end.node)))


def contraction(axes: Axes, user: fx.Node, value: Value) -> Contraction | None:
    """``user`` as a sum over the features of ``value`` times a weight, if it is one."""
    find = _CONTRACTIONS.get(user.target) if user.op == "call_function" else None
    if find is None or opaque(user) or [x is value.node for x in user.args].count(True) != 1:
        return None
    found = next(find(user, value), None)
    return found if found is not None and axes.program.expression(found.weight) is not None else None


def _linear(user: fx.Node, value: Value) -> Iterator[Contraction]:
    x, W = user.args[:2]
    if x is value.node and value.axis == rank(x) - 1 and rank(W) == 2:
        yield Contraction(user, value, W, -1)  # type: ignore[arg-type]


def _matmul(user: fx.Node, value: Value) -> Iterator[Contraction]:
    x, y = user.args[:2]
    if x is value.node and value.axis == rank(x) - 1 and rank(y) >= 2:
        yield Contraction(user, value, y, -2)  # type: ignore[arg-type]
    if y is value.node and rank(y) >= 2 and value.axis == rank(y) - 2:
        yield Contraction(user, value, x, -1)  # type: ignore[arg-type]


def _conv(dims: int, transposed: bool = False) -> Callable[[fx.Node, Value], Iterator[Contraction]]:
    def find(user: fx.Node, value: Value) -> Iterator[Contraction]:
        bound = arguments(user)
        if value.node in user.args[:1] and value.axis == rank(value.node) - dims - 1:
            axis, groups = (-dims - 2, 1) if transposed else (-dims - 1, bound["groups"])
            yield Contraction(user, value, bound["weight"], axis, groups)

    return find


_CONTRACTIONS: dict[Any, Callable[[fx.Node, Value], Iterator[Contraction]]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    **dict.fromkeys((aten.conv1d.default, aten.conv1d.padding), _conv(1)),
    **dict.fromkeys((aten.conv2d.default, aten.conv2d.padding), _conv(2)),
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), _conv(3)),
    aten.conv_transpose1d.default: _conv(1, transposed=True),
    aten.conv_transpose2d.input: _conv(2, transposed=True),
    aten.conv_transpose3d.input: _conv(3, transposed=True),
}
