"""Who reads the channels of a value: the layers that sum over them, behind what only moves them.

    linear(x, W, b)      conv(x, W, b)      x W      W x           each sums over the channels of x times a weight
    reshape, permute, slice, mean over tokens, …                   each treats every channel alike and leaves it where it is

Moves commute with any factor per channel, and those that give entries in other places, or means of them, with any shift. So
these can go to the weights of all readers exactly when every path from the value ends in a layer.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axes import Axes, Value
from .errors import Refused, require
from .layers import Layer, layer_of
from .program import arguments, place, target_name
from .weights import opaque

aten = torch.ops.aten

_KEEP_A_SHIFT = {
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.to.dtype, aten.type_as.default,
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.index.Tensor, aten.index_select.default,
    aten.roll.default, aten.flip.default, aten.mean.dim, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, operator.getitem,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
}  # fmt: skip


@dataclass(frozen=True)
class Readers:
    """Where the channels of a value end, and the moves in between; both in the order of the graph."""

    moves: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]


def readers(axes: Axes, value: fx.Node, axis: int | None, shifted: bool = False) -> Readers:
    """Every reader of the channels of ``value``: of its entries alike, where ``axis`` is None.

    Args:
        shifted: whether the moves must keep a shift, not a factor alone.

    Raises:
        Refused: one of them is no layer with a weight, and does not only move them.
    """
    moves, layers, stack = set[fx.Node](), dict[fx.Node, Layer](), [(value, axis)]
    seen = set(stack)
    while stack:
        value, axis = stack.pop()
        for user in value.users:
            what, layer = f"{target_name(user)} at {place(user)}", layer_of(user, value)
            if layer is not None and (opaque(user) or axes.program.expression(layer.weight) is None):
                layer = None
            if layer is not None and axis in (None, layer.axis):
                layers[user] = layer
                continue
            onward = carried(axes, user, value, axis)
            require(onward or layer is None, f"the channels of what {what} reads are on another axis")
            require(onward, f"{what} reads it, and is no layer that could take it")
            require(not shifted or keeps_a_shift(user), f"{what} changes the shift on its way")
            moves.update((user, *(moved for moved, _ in onward)))
            stack += [moved for moved in onward if moved not in seen]
            seen.update(onward)
    if not layers:
        raise Refused(f"nothing reads {target_name(value)} at {place(value)}")
    return Readers(tuple(sorted(moves)), tuple(layers[node] for node in sorted(layers)))


def carried(axes: Axes, user: fx.Node, value: fx.Node, axis: int | None) -> list[tuple[fx.Node, int | None]]:
    """The channels of ``value`` in what ``user`` makes of them, if a factor per channel commutes with it."""
    if axis is not None:
        onward = axes.carried(Value(value, axis), user)
        alone = all(axes.carriers(moved) == (Value(value, axis),) for moved in onward)
        return [(moved.node, moved.axis) for moved in onward] if alone else []
    if not keeps_a_shift(user) or user.args[0] is not value:
        return []
    results: Any = user.users if isinstance(user.meta["val"], (tuple, list)) else (user,)
    return [(result, None) for result in results if result.meta["val"].is_floating_point()]


def carrier(axes: Axes, value: fx.Node, axis: int | None, shifted: bool) -> tuple[fx.Node, int | None] | None:
    """The operand whose channels ``value`` only moves, so that a diagonal map of the one is one of the other."""
    if (shifted or axis is None) and not keeps_a_shift(value):
        return None
    if axis is None:
        found: Any = [(value.args[0], None)]
    else:
        found = axes.carriers(Value(value, axis)) or ()
    return tuple(found[0]) if len(found) == 1 and found[0][0] in value.args else None  # type: ignore[return-value]


def keeps_a_shift(move: fx.Node) -> bool:
    """Whether move(x + c) = move(x) + c: it puts nothing beside x and weighs nothing."""
    if opaque(move):
        return False
    copies = move.target is aten.pad.default and arguments(move)["mode"] != "constant"
    return copies or move.target in _KEEP_A_SHIFT
