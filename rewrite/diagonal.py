"""Diagonal affine maps: one factor and one shift per channel, in whatever spelling, and the way to the layers around them.

    batch_norm(x; g, b, m, v) = x s + t        s = g / sqrt(v + eps), t = b - m s        (stored statistics)
    x g,  x / g,  x + b,  x - b,  c - x        g and b computed from weights alone, different along one axis at most

Such a map commutes with what only moves channels about (a view, a mean over other axes, a concatenation) and with sums, so
that the layer it goes into need not stand next to it:

    diag(s) (y + z) + t = (diag(s) y + t) + diag(s) z        diag(s) [y, z] + t = [diag(s_1) y + t_1, diag(s_2) z + t_2]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import fx

from .axes import Axes
from .emit import GraphOps
from .equation import dtype, rank, shape
from .errors import require
from .layers import Factor, layer_of
from .program import arguments, place, target_name
from .readers import Readers, carrier
from .shapes import same, same_shape, static
from .weights import opaque

aten = torch.ops.aten
NORMS = frozenset({aten.batch_norm.default, aten.instance_norm.default})
_PRODUCTS = frozenset({aten.mul.Tensor, aten.div.Tensor})
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar})
DIAGONAL = NORMS | _PRODUCTS | _SUMS


class Diagonal(NamedTuple):
    """x s + t

    Attributes:
        x: what is mapped.
        axis: the axis of the channels, from the left; None if s and t are one number for all.
        s: the factor, or None.
        t: the shift, or None.
    """

    x: fx.Node
    axis: int | None
    s: Factor
    t: Factor


def diagonal_of(node: fx.Node, op: GraphOps) -> Diagonal | None:
    """``node`` as a diagonal affine map of its one operand that is computed at run time; None if it has two, or none.

    Raises:
        Refused: a norm uses the statistics of its batch, or such that the graph writes; a weight differs along several axes.
    """
    if node.target not in DIAGONAL or op.constant(node):
        return None
    found = _of_norm(node, op) if node.target in NORMS else _of_arithmetic(node, op)
    if found is None or opaque(node) or opaque(found.x):
        return None
    return found if same_shape(shape(found.x), shape(node)) and dtype(found.x) == dtype(node) else None


def _of_norm(node: fx.Node, op: GraphOps) -> Diagonal:
    x, g, b, mean, var, training, _, eps, _ = arguments(node).values()
    what = f"the norm at {place(node)}"
    require(not isinstance(training, fx.Node), f"{what} follows {training}: in training it uses the statistics of its batch")
    require(training is False and mean is not None, f"{what} uses the statistics of its batch, not stored ones")
    given = [w for w in (g, b, mean, var) if w is not None]
    require(all(map(op.constant, given)), f"a weight or a statistic of {what} is written or computed while the model runs")
    s = op.rsqrt(op.add(var, eps))
    s = s if g is None else op.mul(g, s)
    t = op.neg(op.mul(mean, s))
    return Diagonal(x, 1, s, t if b is None else op.add(b, t))


def _of_arithmetic(node: fx.Node, op: GraphOps) -> Diagonal | None:
    a, b, *more = (*node.args, *node.kwargs.values())
    if any(x != 1 for x in more):  # alpha, a rounding mode
        return None
    swapped = isinstance(b, fx.Node) and not op.constant(b)
    x, w = (b, a) if swapped else (a, b)
    found = _factor(w, rank(node), op)
    if not isinstance(x, fx.Node) or op.constant(x) or found is None:
        return None
    axis, w = found
    if node.target is aten.mul.Tensor:
        return Diagonal(x, axis, w, None)
    if node.target is aten.add.Tensor:
        return Diagonal(x, axis, None, w)
    if node.target is aten.div.Tensor:
        return None if swapped or w == 0 else Diagonal(x, axis, 1 / w if isinstance(w, float) else op.reciprocal(w), None)
    if swapped or node.target is aten.rsub.Scalar:
        return Diagonal(x, axis, -1.0, w)
    return Diagonal(x, axis, None, -w if isinstance(w, float) else op.neg(w))


def _factor(w: Any, out_rank: int, op: GraphOps) -> tuple[int | None, Factor] | None:
    """The axis along which ``w`` differs, and its entries there; None if it is no weight."""
    if isinstance(w, (int, float)) and not isinstance(w, bool):
        return None, float(w)
    if not isinstance(w, fx.Node) or not op.constant(w) or not dtype(w).is_floating_point:
        return None
    along = [axis for axis, size in enumerate(shape(w)) if not same(size, 1)]
    require(len(along) < 2, f"the factor or shift has the shape {list(shape(w))}, not one number per channel")
    vector = op.reshape(op.weight(w), [-1] if along else [])
    return (out_rank - rank(w) + along[0] if along else None), vector


# -- into the layer that writes x -----------------------------------------------------------------------------


def into_writers(op: GraphOps, node: fx.Node, diagonal: Diagonal) -> fx.Node:
    """What ``node`` computes, by the layers that write its operand alone.

    Raises:
        Refused: a value on the way has another reader, or is written by no layer.
    """
    axes = Axes(op.program)

    def write(value: fx.Node, reader: fx.Node, axis: int | None, s: Factor, t: Factor) -> fx.Node:
        other = next((user for user in value.users if user is not reader), None)
        what = f"{target_name(value)} at {place(value)}"
        require(value.op == "call_function", f"what it scales is {target_name(value)}, which no layer writes")
        require(other is None, f"{what} is also read by {target_name(other)} at {place(other)}" if other else "")
        require(not opaque(value), f"{what} is written in place")
        layer = layer_of(value)
        if layer is not None and axis in (None, layer.axis):
            op.origin = value
            return layer.followed(op, s, t)
        if value.target is aten.cat.default:
            parts: Any = arguments(value)["tensors"]
            dim = arguments(value)["dim"] % rank(value)
            sizes = [static(shape(part)[dim]) or 0 for part in parts]
            shares = (_shares(op, f, sizes) if dim == axis else [f] * len(parts) for f in (s, t))
            written = [write(part, value, axis, *share) for part, *share in zip(parts, *shares, strict=True)]
            return op.cat(written, dim)  # type: ignore[no-any-return]
        if _is_plain_sum(value):
            a, b = value.args
            return op.add(write(a, value, axis, s, t), write(b, value, axis, s, None))  # type: ignore[arg-type, no-any-return]
        source = carrier(axes, value, axis, t is not None)
        require(source or layer is None, f"the channels of {what} are on another axis")
        require(source and not op.constant(source[0]), f"what it scales is written by {what}, which is no layer")
        assert source is not None
        return again(op, value, {source[0]: write(source[0], value, source[1], s, t)})

    return write(diagonal.x, node, diagonal.axis, diagonal.s, diagonal.t)


def _shares(op: GraphOps, factor: Factor, sizes: Sequence[int]) -> list[Factor]:
    """A factor per channel, cut into one per part."""
    if factor is None or isinstance(factor, float) or rank(factor) == 0:
        return [factor] * len(sizes)
    ends = list(accumulate(sizes))
    return [op.slice(factor, 0, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _is_plain_sum(value: fx.Node) -> bool:
    if value.target is not aten.add.Tensor or value.kwargs or len(value.args) != 2:
        return False
    return all(isinstance(x, fx.Node) and same_shape(shape(x), shape(value)) for x in value.args)


# -- into the layers that read it -----------------------------------------------------------------------------


def into_readers(op: GraphOps, node: fx.Node, diagonal: Diagonal, found: Readers, pad: bool = False) -> list[fx.Node]:
    """The layers of ``found``, in order, on what ``diagonal`` maps, where they read it as ``node``.

    Raises:
        Refused: a layer cannot take the factor or the shift.
    """
    new, layers = {node: diagonal.x}, {layer.node: layer for layer in found.layers}
    for user in sorted((*found.moves, *layers)):
        op.anchor = op.origin = user
        if (layer := layers.get(user)) is None:
            new[user] = again(op, user, new)
        else:
            new[user] = layer.preceded(op, new[layer.bound[layer.kind.x]], diagonal.s, diagonal.t, pad)
    return [new[layer.node] for layer in found.layers]


def again(op: GraphOps, call: fx.Node, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """``call`` with other operands."""
    assert callable(call.target)
    args, kwargs = fx.node.map_arg((call.args, dict(call.kwargs)), lambda x: new.get(x, x))  # type: ignore[misc]
    op.origin = call
    op.editor.metadata.learn(call)
    result: fx.Node = op(call.target)(*args, **kwargs)  # type: ignore[arg-type]
    return result
