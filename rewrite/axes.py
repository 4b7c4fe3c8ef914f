"""An axis of a tensor, followed through the ops that carry it.

A *value* is a node and one of its axes. Let P remove the mean along that axis. An op carries the axis from some of its
operands if it is linear in them jointly and

    P f(x1, .., xk) = f(P x1, .., P xk)

so that its result is centred exactly when those operands are. ``carriers`` answers which operands those are: an empty
tuple when the result has zero mean whatever comes in, None when no choice of operands will do (a nonlinearity, a gain
that varies along the axis, an op this file does not know). Unknown is None: every proof built on it stays a proof.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .library import tautomer
from .program import Program, arguments
from .shapes import Size, product, same
from .weights import opaque

aten = torch.ops.aten


class Value(NamedTuple):
    """One axis of one tensor; ``axis`` counts from the left."""

    node: fx.Node
    axis: int


Carriers = tuple[Value, ...] | None


def shape(node: Any) -> Sequence[Size]:
    """The sizes of a node's tensor, or of a tensor; empty for a scalar, a constant or a node that is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return value.shape if isinstance(value, Tensor) else ()


def rank(node: Any) -> int:
    return len(shape(node))


class Axes:
    """The axis facts of one version of a program, computed on demand and remembered.

    Args:
        program: must not change while these facts are in use.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._carriers: dict[Value, Carriers] = {}
        self._constant: dict[Value, bool] = {}

    def carriers(self, value: Value) -> Carriers:
        """The operands that must be centred for ``value`` to be; see the module."""
        if value not in self._carriers:
            self._carriers[value] = self._find(value)
        return self._carriers[value]

    def carried(self, operand: Value, user: fx.Node) -> list[Value]:
        """The values of ``user`` that carry ``operand``'s axis on."""
        results = user.users if isinstance(user.meta.get("val"), (tuple, list)) else (user,)
        values = (Value(result, axis) for result in results for axis in range(rank(result)))
        return [value for value in values if operand in (self.carriers(value) or ())]

    def _find(self, value: Value) -> Carriers:
        node, axis = value
        if node.op != "call_function" or opaque(node):
            return None
        rule = _RULES.get(node.target)
        return rule(self, node, axis) if rule is not None else None

    # -- constancy --------------------------------------------------------------------------------------------

    def constant(self, x: Any, axis: int, out_rank: int) -> bool:
        """Whether operand ``x`` of a broadcasting op is constant along axis ``axis`` of its result of rank ``out_rank``."""
        if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), Tensor):
            return True
        own = axis - (out_rank - rank(x))
        return own < 0 or self.constant_along(Value(x, own))

    def constant_along(self, value: Value) -> bool:
        """Whether a tensor has the same entries all along an axis."""
        if value not in self._constant:
            self._constant[value] = False  # an entry under computation: a cycle cannot occur, but a default must stand
            self._constant[value] = self._is_constant(value)
        return self._constant[value]

    def _is_constant(self, value: Value) -> bool:
        node, axis = value
        if same(shape(node)[axis], 1):
            return True
        if node.op == "get_attr":
            tensor = self.fixed(node)
            return tensor is not None and bool((tensor == tensor.narrow(axis, 0, 1)).all())
        if node.op != "call_function":
            return False
        if node.target in _FILLED:
            return True
        if node.target is aten.expand.default:
            return self.constant(node.args[0], axis, rank(node))
        if isinstance(node.target, torch._ops.OpOverload) and (torch.Tag.pointwise in node.target.tags or node.target in _SAME):
            return all(self.constant(x, axis, rank(node)) for x in node.all_input_nodes)
        return False

    def fixed(self, node: fx.Node) -> Tensor | None:
        """The value of a weight that does not train. One that trains is whatever it will be, today's value proves nothing."""
        weights = self.program.weights
        if node.target not in weights or weights[str(node.target)].requires_grad or opaque(node):
            return None
        return weights.value(str(node.target), torch.float64)

    def is_zero(self, x: Any) -> bool:
        """Whether an operand is the number zero, spelled as a literal, a filled tensor or a weight."""
        if isinstance(x, fx.Node):
            if x.op == "get_attr":
                tensor = self.fixed(x)
                return tensor is not None and not bool(tensor.any())
            return x.op == "call_function" and (x.target in _ZEROS or (x.target in _FULL and arguments(x)["fill_value"] == 0))
        return bool(x == 0)


_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_FULL = {aten.full.default, aten.full_like.default, aten.new_full.default}
_FILLED = _ZEROS | _FULL | {aten.ones.default, aten.ones_like.default, aten.new_ones.default}

Rule = Callable[[Axes, fx.Node, int], Carriers]
_RULES: dict[Any, Rule] = {}


# -- ops that act on every element alike -----------------------------------------------------------------------


def _first(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """f(x) with the shape of x, linear in x."""
    return (Value(node.all_input_nodes[0], axis),)


_SAME = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.neg.default,
}


def _sum(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """x + a y: both terms must be centred; a term that is constant along the axis would shift the result."""
    found = []
    for x in node.args[:2]:
        own = axis - (rank(node) - rank(x))
        if isinstance(x, fx.Node) and own >= 0 and same(shape(x)[own], shape(node)[axis]):
            found.append(Value(x, own))
        elif not axes.is_zero(x):
            return None
    return tuple(found)


def _scaled(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """x y where one factor is constant along the axis (a scalar, a mask per token, a drop-path sample)."""
    a, b = node.args[:2]
    a_constant, b_constant = (axes.constant(x, axis, rank(node)) for x in (a, b))
    if a_constant == b_constant or (node.target in _QUOTIENTS and a_constant):
        return None
    varying = b if a_constant else a
    assert isinstance(varying, fx.Node)
    return (Value(varying, axis - (rank(node) - rank(varying))),)


_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}


def _rotary(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """A rotation of channels by angles that are constant along another axis: every head turns alike."""
    x, *angles = node.args[:3]
    turns = axis == rank(node) - 1 or not all(axes.constant(angle, axis, rank(node)) for angle in angles)
    return None if turns else _operands((x, axis))


def _where(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """where(m, x, y) with a mask that is constant along the axis; each branch is centred or zero."""
    mask, *branches = node.args
    if not axes.constant(mask, axis, rank(node)):
        return None
    found = []
    for x in branches:
        own = axis - (rank(node) - rank(x))
        if axes.is_zero(x):
            continue
        if not isinstance(x, fx.Node) or own < 0 or not same(shape(x)[own], shape(node)[axis]):
            return None
        found.append(Value(x, own))
    return tuple(found)


def _masked_fill(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """masked_fill(x, m, 0) with a mask that is constant along the axis."""
    x, mask, fill = node.args
    if not axes.constant(mask, axis, rank(node)) or not axes.is_zero(fill):
        return None
    assert isinstance(x, fx.Node)
    return (Value(x, axis - (rank(node) - rank(x))),)


def _dropout(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """Identity when it is off; elementwise noise is not constant along any axis."""
    _, p, train = node.args
    return _first(axes, node, axis) if train is False or p == 0 else None


# -- ops that move axes ----------------------------------------------------------------------------------------


def _view(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """A reshape keeps an axis whole iff some input axis has its size and as many elements behind it."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = shape(source), shape(node)
    behind = product(after[axis + 1 :])
    for own in range(len(before)):
        if same(before[own], after[axis]) and same(product(before[own + 1 :]), behind):
            return (Value(source, own),)
    return None


def _expand(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    source = node.args[0]
    own = axis - (rank(node) - rank(source))
    if own < 0 or not same(shape(source)[own], shape(node)[axis]):
        return None
    return (Value(source, own),)  # type: ignore[arg-type]


def _repeat(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    repeats: Any = node.args[1]
    return _expand(axes, node, axis) if same(repeats[axis], 1) else None


def _permute(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    dims: Any = node.args[1]
    return (Value(node.args[0], dims[axis] % rank(node)),)  # type: ignore[arg-type]


def _transpose(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    a, b = (d % rank(node) for d in (node.args[1:] or (0, 1)))  # type: ignore[operator]
    return (Value(node.args[0], {a: b, b: a}.get(axis, axis)),)  # type: ignore[arg-type]


def _t(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    return (Value(node.args[0], rank(node) - 1 - axis),)  # type: ignore[arg-type]


def _unsqueeze(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    given: Any = node.args[1]
    new = given % rank(node)
    return None if axis == new else (Value(node.args[0], axis - (axis > new)),)  # type: ignore[arg-type]


def _squeeze(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    source = node.args[0]
    given: Any = node.args[1] if len(node.args) > 1 else range(rank(source))
    removed = {d % rank(source) for d in ([given] if isinstance(given, int) else given)}
    kept = [d for d in range(rank(source)) if d not in removed or not same(shape(source)[d], 1)]
    return (Value(source, kept[axis]),) if len(kept) == rank(node) else None  # type: ignore[arg-type]


def _along_another(position: int, default: int = 0) -> Rule:
    """Ops that act along one dim (argument ``position``) and keep the rank: slice, roll, index_select, cumsum."""

    def rule(axes: Axes, node: fx.Node, axis: int) -> Carriers:
        given: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
        dims = {d % rank(node) for d in ([given] if isinstance(given, int) else given)}
        return None if axis in dims else (Value(node.args[0], axis),)  # type: ignore[arg-type]

    return rule


def _select(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    given: Any = node.args[1]
    removed = given % rank(node.args[0])
    return (Value(node.args[0], axis + (axis >= removed)),)  # type: ignore[arg-type]


def _index(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """x[i, j, :]: axes behind the last indexed one keep their distance from the end."""
    source, indices = node.args
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    own = rank(source) - (rank(node) - axis)
    indexed = [d for d, index in enumerate(indices) if index is not None]
    booleans = any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices if isinstance(i, fx.Node))
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1)) if indexed else False
    return (Value(source, own),) if adjacent and not booleans and own > indexed[-1] else None


def _cat(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return None if dim % rank(node) == axis else tuple(Value(part, axis) for part in parts)


def _stack(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    parts: Any = node.args[0]
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    new = given % rank(node)
    return None if new == axis else tuple(Value(part, axis - (axis > new)) for part in parts)


def _piece(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """One piece of a split, chunk or unbind along another axis."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_function" or source.target not in _SPLITS:
        return None
    whole = source.args[0]
    dim = arguments(source)["dim"] % rank(whole)
    if source.target is aten.unbind.int:
        return (Value(whole, axis + (axis >= dim)),)  # type: ignore[arg-type]
    return None if dim == axis else (Value(whole, axis),)  # type: ignore[arg-type]


_SPLITS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
}


# -- reductions, pools and pads over other axes ----------------------------------------------------------------


def _reduce(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    source = node.args[0]
    given = arguments(node)["dim"]
    if given is None or given == []:
        return None
    reduced = {d % rank(source) for d in ([given] if isinstance(given, int) else given)}
    if arguments(node)["keepdim"]:
        return None if axis in reduced else (Value(source, axis),)  # type: ignore[arg-type]
    kept = [d for d in range(rank(source)) if d not in reduced]
    return (Value(source, kept[axis]),)  # type: ignore[arg-type]


def _spatial(dims: int) -> Rule:
    """Pools and interpolations over the last ``dims`` axes are linear maps of them."""
    return lambda axes, node, axis: _first(axes, node, axis) if axis < rank(node) - dims else None


def _pad(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """Zeros around other axes; the amounts come in pairs, last axis first."""
    amounts: Any = node.args[1]
    bound = arguments(node)
    behind = 2 * (rank(node) - 1 - axis)
    fills = bound.get("mode", "constant") == "constant" and bound["value"] not in (None, 0, 0.0)
    return None if fills or any(amounts[behind : behind + 2]) else (Value(node.args[0], axis),)  # type: ignore[arg-type]


# -- products: their weights carry the axis --------------------------------------------------------------------


def _operands(*found: tuple[Any, Any]) -> Carriers:
    return tuple(Value(node, axis) for node, axis in found if isinstance(node, fx.Node))


def _linear(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """x W^T + b: along the output features, W (out, in) carries by its rows; along another axis x does, without a bias."""
    x, W, b = (*node.args, None)[:3]
    if axis == rank(node) - 1:
        return _operands((W, 0), (b, 0))
    return _operands((x, axis)) if b is None else None


def _addmm(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """b + x W: along the columns."""
    b, _, W = node.args[:3]
    if axis != 1 or node.kwargs or not same(shape(b)[-1], shape(node)[1]):
        return None
    return _operands((b, rank(b) - 1), (W, 1))


def _matmul(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """x y: the columns come from y, the rows from x."""
    x, y = node.args[:2]
    if rank(x) < 2 or rank(y) < 2:
        return None
    if axis == rank(node) - 1:
        return _operands((y, rank(y) - 1))
    return _operands((x, rank(x) - 2)) if axis == rank(node) - 2 else None


def _embedding(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    return _operands((node.args[0], 1)) if axis == rank(node) - 1 else None


def _conv(dims: int) -> Rule:
    """conv(x, W (out, in/g, ..), b): the channels come from W's rows, if every filter sees every input channel."""

    def rule(axes: Axes, node: fx.Node, axis: int) -> Carriers:
        bound = arguments(node)
        if axis != rank(node) - dims - 1 or bound["groups"] != 1:
            return None
        return _operands((bound["weight"], 0), (bound["bias"], 0))

    return rule


def _conv_transpose(dims: int) -> Rule:
    """conv_transpose(x, W (in, out/g, ..), b)."""

    def rule(axes: Axes, node: fx.Node, axis: int) -> Carriers:
        bound = arguments(node)
        if axis != rank(node) - dims - 1 or bound["groups"] != 1:
            return None
        return _operands((bound["weight"], 1), (bound["bias"], 0))

    return rule


# -- norms -----------------------------------------------------------------------------------------------------


def _layer_norm(axes: Axes, node: fx.Node, axis: int) -> Carriers:
    """(x - mean)/std g + b over the axis has zero mean if g is constant, once b is centred."""
    bound = arguments(node)
    if axis != rank(node) - 1 or len(bound["normalized_shape"]) != 1 or not axes.constant(bound["weight"], 0, 1):
        return None
    return _operands((bound["bias"], 0))


def _table() -> dict[Any, Rule]:
    rows: list[tuple[Sequence[Any], Rule]] = [
        (tuple(_SAME), _first),
        ((aten.add.Tensor, aten.sub.Tensor), _sum),
        ((aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar), _scaled),
        ((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
        ((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
        ((aten.dropout.default,), _dropout),
        (
            (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten._unsafe_view.default),
            _view,
        ),
        ((aten.expand.default,), _expand),
        ((aten.repeat.default,), _repeat),
        ((aten.permute.default,), _permute),
        ((aten.transpose.int,), _transpose),
        ((aten.t.default, aten.numpy_T.default), _t),
        ((aten.unsqueeze.default,), _unsqueeze),
        ((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
        ((aten.slice.Tensor, aten.index_select.default, aten.narrow.default, aten.cumsum.default), _along_another(1)),
        ((aten.flip.default,), _along_another(1)),
        ((aten.repeat_interleave.self_int,), _along_another(2)),
        ((aten.roll.default,), _along_another(2, default=())),  # type: ignore[arg-type]
        ((aten.select.int,), _select),
        ((aten.index.Tensor,), _index),
        ((aten.cat.default,), _cat),
        ((aten.stack.default,), _stack),
        ((operator.getitem,), _piece),
        ((aten.mean.dim, aten.sum.dim_IntList), _reduce),
        (
            (aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default, aten.upsample_linear1d.vec, aten.upsample_nearest1d.vec),
            _spatial(1),
        ),
        (
            (
                aten.avg_pool2d.default,
                aten.adaptive_avg_pool2d.default,
                aten.upsample_bilinear2d.vec,
                aten.upsample_bicubic2d.vec,
                aten.upsample_nearest2d.vec,
            ),
            _spatial(2),
        ),
        ((aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default, aten.upsample_trilinear3d.vec), _spatial(3)),
        ((aten.pad.default, aten.constant_pad_nd.default), _pad),
        ((aten.linear.default,), _linear),
        ((aten.addmm.default,), _addmm),
        ((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
        ((aten.embedding.default,), _embedding),
        ((aten.conv1d.default, aten.conv1d.padding), _conv(1)),
        ((aten.conv2d.default, aten.conv2d.padding), _conv(2)),
        ((aten.conv3d.default, aten.conv3d.padding), _conv(3)),
        ((aten.conv_transpose1d.default,), _conv_transpose(1)),
        ((aten.conv_transpose2d.input,), _conv_transpose(2)),
        ((aten.conv_transpose3d.input,), _conv_transpose(3)),
        ((aten.layer_norm.default,), _layer_norm),
        ((tautomer.rotary.v1,), _rotary),
    ]
    return {target: rule for targets, rule in rows for target in targets}


_RULES.update(_table())


# -- who is blind to the mean ----------------------------------------------------------------------------------


def blind(user: fx.Node, operand: Value) -> bool:
    """Whether ``user`` gives the same result when any constant is added along ``operand``'s axis, one per other index.

    Blindness must hold for one *free* constant per token: a LayerNorm over a concatenation of tokens sees the
    differences of their means, a GroupNorm over channels and positions likewise; neither is blind.
    """
    if user.op != "call_function" or opaque(user):
        return False
    if user.target in SIZES_ONLY:
        return True
    if not user.args or user.args[0] is not operand.node or user.all_input_nodes.count(operand.node) != 1:
        return False
    if user.target is aten.layer_norm.default:
        others = (arguments(user)["weight"], arguments(user)["bias"])
        return (
            len(arguments(user)["normalized_shape"]) == 1
            and operand.axis == rank(operand.node) - 1
            and operand.node not in others
        )
    if user.target in (aten.softmax.int, aten._softmax.default, aten.log_softmax.int):
        return bool(arguments(user)["dim"] % rank(operand.node) == operand.axis)
    return False


SIZES_ONLY = {
    aten.sym_size.int,
    aten._assert_tensor_metadata.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}
"""Ops that look at the sizes of an operand and not at its values."""
