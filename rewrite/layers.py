"""Layers that are affine in what they read: linear, convolutions and products with a weight, with a diagonal map on either side.

    diag(s) (W x + b) + t = (diag(s) W) x + (s b + t)
    W (diag(s) x + t) + b = (W diag(s)) x + (W t + b)

s and t hold one number per channel. The second line holds only where every output sees t in every channel equally often: not
under the unequal overlaps of a transposed convolution, and not beside zeros that the layer pads, unless x is padded with
-t/s instead, which the map takes to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from .emit import GraphOps
from .equation import dtype, rank, shape
from .errors import require
from .expressions import evaluate
from .ops import fill, form_of
from .program import place, target_name
from .shapes import Size, same, static

aten = torch.ops.aten
Factor = Any
"""One number per channel ([channels]), one for all ([] or a literal), or None: nothing to do. A tensor reads weights alone."""


class Kind(NamedTuple):
    """How a call is a layer; axes count from the end.

    Attributes:
        x: the name of the operand.
        W: the name of the weight.
        axis: the channels of x, and of y.
        reads: the axis of W that is summed over.
        writes: the axis of W that is left.
        dims: how many spatial axes there are.
    """

    x: str
    W: str
    axis: int
    reads: int
    writes: int
    dims: int = 0


def _conv(dims: int) -> tuple[Kind, ...]:
    return (Kind("input", "weight", -dims - 1, -dims - 1, -dims - 2, dims),)


def _transposed(dims: int) -> tuple[Kind, ...]:
    return (Kind("input", "weight", -dims - 1, -dims - 2, -dims - 1, dims),)


_KINDS: dict[Any, tuple[Kind, ...]] = {
    aten.linear.default: _conv(0),
    aten.matmul.default: (Kind("self", "other", -1, -2, -1), Kind("other", "self", -2, -1, -2)),
    aten.conv1d.default: _conv(1),
    aten.conv1d.padding: _conv(1),
    aten.conv2d.default: _conv(2),
    aten.conv2d.padding: _conv(2),
    aten.conv3d.default: _conv(3),
    aten.conv3d.padding: _conv(3),
    aten.conv_transpose1d.default: _transposed(1),
    aten.conv_transpose2d.input: _transposed(2),
    aten.conv_transpose3d.input: _transposed(3),
}


@dataclass(frozen=True)
class Layer:
    """One call y = W x + b: its arguments by schema name, and how they are a layer."""

    node: fx.Node
    bound: dict[str, Any]
    kind: Kind

    @property
    def axis(self) -> int:
        """The channel axis of x, from the left; of y too, unless the layer is a product."""
        return rank(self.bound[self.kind.x]) + self.kind.axis

    @property
    def weight(self) -> fx.Node:
        W: fx.Node = self.bound[self.kind.W]
        return W

    @property
    def bias(self) -> Any:
        return self.bound.get("bias")

    @property
    def groups(self) -> int:
        return int(self.bound.get("groups", 1))

    @property
    def transposed(self) -> bool:
        return self.kind.dims > 0 and self.kind.reads < self.kind.writes

    @property
    def is_product(self) -> bool:
        """Whether it has no place for a bias."""
        return "bias" not in self.bound

    @property
    def inputs(self) -> int:
        """The channels of x."""
        (size,) = _static([shape(self.weight)[self.kind.reads]])
        return size if self.transposed else size * self.groups

    @property
    def outputs(self) -> int:
        """The channels of y."""
        (size,) = _static([shape(self.weight)[self.kind.writes]])
        return size * self.groups if self.transposed else size

    def followed(self, op: GraphOps, s: Factor, t: Factor) -> fx.Node:
        """diag(s) y + t

        Raises:
            Refused: the weight is computed at run time.
        """
        self._require_weights(op)
        W, b = self.weight, self.bias
        if s is not None:
            W, b = self._times(op, s, self.kind.writes), None if b is None else op.mul(b, s)
        return self._call(op, {self.kind.W: W}, _plus(op, b, t, self.outputs, W))

    def preceded(self, op: GraphOps, x: fx.Node, s: Factor, t: Factor, pad: bool = False) -> fx.Node:
        """The layer on ``x``, where it read diag(s) x + t; with ``pad``, ``x`` may be padded to that end.

        Raises:
            Refused: the weight is computed at run time, or t does not reach all outputs alike.
        """
        self._require_weights(op)
        b, given = self.bias, {self.kind.x: x}
        if t is not None:
            if pad and any(map(any, self.padding)):
                given = {"input": self._padded(op, x, s, t), "padding": _no(self.bound["padding"])}
            else:
                self._require_even()
            shift = self._summed(op, self._times(op, t, self.kind.reads))
            b = shift if b is None else op.add(b, shift)
        W = self.weight if s is None else self._times(op, s, self.kind.reads)
        return self._call(op, {**given, self.kind.W: W}, b)

    def on(self, op: GraphOps, x: Any, W: Any, b: Any) -> fx.Node:
        """The same call on other operands; stride, padding and dilation stay."""
        bound = {**self.bound, self.kind.x: x, self.kind.W: W, "bias": b}
        made: fx.Node = op(self.node.target)(*bound.values())  # type: ignore[arg-type]
        return made

    # -- weights ----------------------------------------------------------------------------------------------

    def _times(self, op: GraphOps, s: Factor, axis: int) -> Any:
        """W, scaled by s along the channels of ``axis``; the second of a convolution's repeats for every group."""
        W, behind = self.weight, [1] * (-axis - 1)
        if isinstance(s, (int, float)) or _is_one(s):
            return op.mul(W, s if isinstance(s, (int, float)) else op.reshape(s, []))
        if self.groups == 1 or axis == -rank(W):
            return op.mul(W, op.reshape(s, [-1, *behind]) if behind else s)
        rows, columns = _static(shape(W)[:2])
        per_group = op.expand(op.reshape(s, [self.groups, 1, -1]), [self.groups, rows // self.groups, columns])
        return op.mul(W, op.reshape(per_group, [rows, columns, *behind]))

    def _summed(self, op: GraphOps, W: Any) -> Any:
        """A weight summed over all that one output sees: what the bias grows by."""
        if self.is_product:
            return op.sum(W, [self.kind.reads], rank(self.bound[self.kind.x]) > 1)
        if not self.transposed:
            return op.sum(W, list(range(1, rank(W))))
        _, columns, *kernel = _static(shape(W))
        grouped = op.reshape(W, [self.groups, -1, columns, *kernel])
        return op.reshape(op.sum(grouped, [1, *range(3, rank(grouped))]), [-1])

    def _call(self, op: GraphOps, given: dict[str, Any], b: Any) -> fx.Node:
        form, old = form_of(self.node.target), self.weight
        assert form is not None
        bias = None if b is None else op.node(_as(op, b, old), "bias", beside=old)
        bound = {**self.bound, **given, self.kind.W: _as(op, given[self.kind.W], old), "bias": bias}
        result: fx.Node = op(self.node.target)(*(bound[name] for name in form.names))  # type: ignore[arg-type]
        return op.add(result, bias) if self.is_product and bias is not None else result  # type: ignore[no-any-return]

    def _require_weights(self, op: GraphOps) -> None:
        weights = [x for x in (self.weight, self.bias) if x is not None]
        what = f"{target_name(self.node)} at {place(self.node)}"
        require(all(map(op.constant, weights)), f"the weight of {what} is computed at run time")

    # -- the border -------------------------------------------------------------------------------------------

    @property
    def padding(self) -> list[tuple[int, int]]:
        """How many zeros a convolution pads before and behind, by spatial axis."""
        padding, dims = self.bound.get("padding", 0), self.kind.dims
        if isinstance(padding, str):
            kernel = _static(shape(self.weight)[2:]) if padding == "same" else [1] * dims
            total = [d * (n - 1) for d, n in zip(_spread(self.bound["dilation"], dims), kernel, strict=True)]
            return [(n // 2, n - n // 2) for n in total]
        return [(n, n) for n in _spread(padding, dims)]

    def _require_even(self) -> None:
        what, dims = f"{target_name(self.node)} at {place(self.node)}", self.kind.dims
        if self.transposed:
            pointwise = all(n == 1 for n in shape(self.weight)[2:])
            plain = not any(map(any, self.padding)) and not any(_spread(self.bound["output_padding"], dims))
            even = pointwise and plain and all(n == 1 for n in _spread(self.bound["stride"], dims))
            require(even, f"{what} overlaps unequally, so the shift would not reach all its outputs alike")
            return
        request = "pad=True pads with what becomes zero, at the price of a copy"
        require(not any(map(any, self.padding)), f"{what} pads with zeros, to which the shift has not been added ({request})")

    def _padded(self, op: GraphOps, x: fx.Node, s: Factor, t: Factor) -> fx.Node:
        """``x`` within a border of -t/s."""
        what, dims = f"{target_name(self.node)} at {place(self.node)}", self.kind.dims
        require(not self.transposed, f"{what} overlaps unequally, so the shift would not reach all its outputs alike")
        zero = f"{what} pads with zeros, and no entry is mapped to zero where the factor is zero"
        require(s is None or _never_zero(op, s), zero)
        amounts = [n for before, behind in reversed(self.padding) for n in (before, behind)]
        value = _quotient(op, t, s)
        if not isinstance(value, float):
            value = op.node(_as(op, op.reshape(value, [-1, *[1] * dims]), x), "padding", beside=self.weight)
        plane = x
        for _ in range(rank(x) - dims):
            plane = op.select(plane, 0, 0)
        outside = op(aten.pad.default)(op(aten.zeros_like.default)(plane), amounts, "constant", 1.0)
        # Any copy with a border does; that of repeated entries is the one whose layout torch can tell for every size.
        bordered = op(aten.pad.default)(x, amounts, "replicate")
        border = op.cast(outside, torch.bool)
        if isinstance(value, float):
            return op.masked_fill(bordered, border, value)  # type: ignore[no-any-return]
        return op.where(border, value, bordered)  # type: ignore[no-any-return]


def layer_of(node: Any, x: fx.Node | None = None) -> Layer | None:
    """``node`` as a layer that reads ``x``; None if it is none, or reads ``x`` as a weight too.

    Without ``x`` a product is none: which of its operands is the weight, nobody said.
    """
    if not isinstance(node, fx.Node) or node.target not in _KINDS or (x is None and node.target is aten.matmul.default):
        return None
    form = form_of(node.target)
    assert form is not None
    bound = dict(zip(form.names, fill(node.target, node.args, node.kwargs), strict=True))
    for kind in _KINDS[node.target]:
        W, fits = bound[kind.W], rank(bound[kind.x]) >= -kind.axis
        if not fits or (x is not None and (bound[kind.x] is not x or list(bound.values()).count(x) != 1)):
            continue
        if isinstance(W, fx.Node) and (rank(W) == kind.dims + 2 or (node.target is aten.matmul.default and rank(W) >= 2)):
            return Layer(node, bound, kind)
    return None


def _quotient(op: GraphOps, t: Factor, s: Factor) -> Any:
    """-t/s"""
    if isinstance(t, (int, float)):
        return -t / s if isinstance(s, (int, float)) else -float(t) if s is None else op.mul(op.reciprocal(s), -t)
    return op.neg(t) if s is None else op.div(op.neg(t), s)


def _never_zero(op: GraphOps, s: Factor) -> bool:
    """Whether no entry is zero today: the answer of one checkpoint."""
    if isinstance(s, (int, float)):
        return s != 0
    expression = op.expression(s)
    return expression is not None and bool(evaluate(expression, op.program.weights.leaf).all())


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


def _spread(x: Any, dims: int) -> list[Any]:
    """One number per spatial axis, from as many or one for all."""
    numbers = list(x) if isinstance(x, Sequence) else [x]
    return numbers * dims if len(numbers) == 1 else numbers


def _no(padding: Any) -> Any:
    return "valid" if isinstance(padding, str) else [0] * len(padding)
