"""Layers that are affine in what they read: linear, convolutions and transposed convolutions, with a diagonal map on either side.

    diag(s) (W x + b) + t = (diag(s) W) x + (s b + t)
    W (diag(s) x + t) + b = (W diag(s)) x + (W t + b)

s and t hold one number per channel. A weight is stored as (a, b / groups, *kernel): linear layers and convolutions map
axis 1 to axis 0, transposed convolutions axis 0 to axis 1. The second line holds only where every output sees t in every
channel equally often: not beside zeros that the layer pads, nor under the unequal overlaps of a transposed convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .emit import GraphOps
from .equation import dtype, rank, shape
from .errors import require
from .ops import fill, form_of
from .program import place, target_name
from .shapes import Size, same, static

aten = torch.ops.aten
Factor = Any
"""One number per channel ([channels]), one for all ([] or a literal), or None: nothing to do. A tensor reads weights alone."""

_KINDS: dict[Any, tuple[int, bool]] = {
    aten.linear.default: (0, False),
    aten.conv1d.default: (1, False),
    aten.conv1d.padding: (1, False),
    aten.conv2d.default: (2, False),
    aten.conv2d.padding: (2, False),
    aten.conv3d.default: (3, False),
    aten.conv3d.padding: (3, False),
    aten.conv_transpose1d.default: (1, True),
    aten.conv_transpose2d.input: (2, True),
    aten.conv_transpose3d.input: (3, True),
}


@dataclass(frozen=True)
class Layer:
    """One call y = W x + b.

    Attributes:
        node: the call.
        bound: its arguments by schema name.
        dims: how many spatial axes it has; the channels are on the axis before them, in x and in y.
        transposed: whether it is a transposed convolution.
    """

    node: fx.Node
    bound: dict[str, Any]
    dims: int
    transposed: bool

    @property
    def axis(self) -> int:
        """The channel axis of x and of y, from the left."""
        return rank(self.node) - 1 - self.dims

    @property
    def groups(self) -> int:
        return int(self.bound.get("groups", 1))

    @property
    def bias(self) -> Any:
        return self.bound["bias"]

    def followed(self, op: GraphOps, s: Factor, t: Factor) -> fx.Node:
        """diag(s) y + t

        Raises:
            Refused: the weight is computed at run time.
        """
        self._require_weights(op)
        W, b = self.bound["weight"], self.bias
        if s is not None:
            W = _times(op, W, s, 1 if self.transposed else 0, self.groups)
            b = None if b is None else op.mul(b, s)
        return self._call(op, self.bound["input"], W, _plus(op, b, t, self.outputs, W))

    def preceded(self, op: GraphOps, x: fx.Node, s: Factor, t: Factor) -> fx.Node:
        """The layer on ``x``, where it read diag(s) x + t.

        Raises:
            Refused: the weight is computed at run time, or t does not reach all outputs alike.
        """
        self._require_weights(op)
        axis, W, b = (0 if self.transposed else 1), self.bound["weight"], self.bias
        if t is not None:
            self._require_even()
            shift = self._summed(op, _times(op, W, t, axis, self.groups))
            b = shift if b is None else op.add(b, shift)
        return self._call(op, x, W if s is None else _times(op, W, s, axis, self.groups), b)

    def _summed(self, op: GraphOps, W: Any) -> Any:
        """A weight summed over its kernel and its input channels: one number per output."""
        matrix = op.sum(op.flatten(op.unsqueeze(W, -1), 2), [-1])
        if not self.transposed:
            return op.sum(matrix, [1])
        return op.reshape(op.sum(op.unflatten(matrix, 0, [self.groups, -1]), [1]), [-1])

    def _call(self, op: GraphOps, x: fx.Node, W: Any, b: Any) -> fx.Node:
        form, old = form_of(self.node.target), self.bound["weight"]
        assert form is not None
        bias = None if b is None else op.node(_as(op, b, old), "bias", beside=old)
        given = {**self.bound, "input": x, "weight": _as(op, W, old), "bias": bias}
        result: fx.Node = op(self.node.target)(*(given[name] for name in form.names))  # type: ignore[arg-type]
        return result

    @property
    def outputs(self) -> int:
        """The channels of y."""
        rows, columns = _static(shape(self.bound["weight"])[:2])
        return columns * self.groups if self.transposed else rows

    @property
    def inputs(self) -> int:
        """The channels of x."""
        rows, columns = _static(shape(self.bound["weight"])[:2])
        return rows if self.transposed else columns * self.groups

    def _require_weights(self, op: GraphOps) -> None:
        weights = [x for x in (self.bound["weight"], self.bias) if x is not None]
        at = place(self.node)
        require(all(map(op.constant, weights)), f"the weight of {target_name(self.node)} at {at} is computed at run time")
        require(rank(weights[0]) == self.dims + 2, f"the weight of {target_name(self.node)} at {at} is no matrix")

    def _require_even(self) -> None:
        what = f"{target_name(self.node)} at {place(self.node)}"
        pointwise = all(n == 1 for n in shape(self.bound["weight"])[2:])
        if self.transposed:
            plain = not any(_numbers(self.bound["padding"]) + _numbers(self.bound["output_padding"]))
            even = pointwise and plain and all(n == 1 for n in _numbers(self.bound["stride"]))
            require(even, f"{what} overlaps unequally, so the shift would not reach all its outputs alike")
            return
        padding = self.bound.get("padding", 0)
        pads = (padding == "same" and not pointwise) if isinstance(padding, str) else any(_numbers(padding))
        require(not pads, f"{what} pads with zeros, to which the shift has not been added")


def layer_of(node: Any) -> Layer | None:
    """``node`` as a layer; None if it is none, or was called with one operand as another's weight."""
    if not isinstance(node, fx.Node) or node.target not in _KINDS:
        return None
    form = form_of(node.target)
    assert form is not None
    bound = dict(zip(form.names, fill(node.target, node.args, node.kwargs), strict=True))
    return Layer(node, bound, *_KINDS[node.target])


def _times(op: GraphOps, W: Any, s: Factor, axis: int, groups: int) -> Any:
    """W, scaled by s along the channels of ``axis``: those of axis 1 repeat for every group."""
    if isinstance(s, (int, float)) or _is_one(s):
        return op.mul(W, s if isinstance(s, (int, float)) else op.reshape(s, []))
    kernel = [1] * (rank(W) - 2)
    if axis == 0:
        return op.mul(W, op.reshape(s, [-1, 1, *kernel]))
    if groups == 1:
        return op.mul(W, op.reshape(s, [1, -1, *kernel]))
    (rows,) = _static(shape(W)[:1])
    repeated = op(aten.repeat_interleave.self_int)(op.reshape(s, [groups, -1]), rows // groups, 0)
    return op.mul(W, op.reshape(repeated, [rows, -1, *kernel]))


def _plus(op: GraphOps, b: Any, t: Factor, outputs: int, W: Any) -> Any:
    """b + t as a vector over the outputs; None if there is neither."""
    if t is None:
        return b
    if b is not None:
        return op.add(b, t)
    if isinstance(t, (int, float)):
        return op(aten.new_full.default)(W, [outputs], t)
    return op.expand(op.reshape(t, [-1]), [outputs]) if _is_one(t) else t


def _as(op: GraphOps, x: Any, W: Any) -> Any:
    """``x`` in the dtype of the layer's weight: a norm may keep its statistics in another."""
    return x if dtype(x) == dtype(W) else op.cast(x, dtype(W))


def _is_one(x: Any) -> bool:
    return all(same(n, 1) for n in shape(x))


def _static(sizes: Sequence[Size]) -> list[int]:
    """Sizes of a weight, which depend on no input."""
    return [size for size in map(static, sizes) if size is not None]


def _numbers(x: Any) -> list[Any]:
    return list(x) if isinstance(x, Sequence) else [x]
