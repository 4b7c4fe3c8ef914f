"""Where a value comes from through views: the tensor it is a part of, and whether two are projections of one tensor."""

from __future__ import annotations

import operator

import torch
from torch import fx

from .ops import OPS

aten = torch.ops.aten

_VIEWS = frozenset(
    {
        operator.getitem,
        aten.alias.default, aten.chunk.default, aten.clone.default, aten.contiguous.default, aten.expand.default,
        aten.flatten.using_ints, aten.narrow.default, aten.permute.default, aten.reshape.default, aten.select.int,
        aten.slice.Tensor, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.squeeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.tensor_split.sections, aten.transpose.int, aten.unbind.int,
        aten.unflatten.int, aten.unsqueeze.default, aten.view.default,
    }
)  # fmt: skip
_PRODUCTS = frozenset(
    {OPS[name].target for name in ("linear", "matmul", "bmm", "conv1d", "conv2d", "conv3d")} | {aten.baddbmm.default}
)


def origin(value: fx.Node) -> fx.Node:
    """The node that ``value`` is a view or a part of."""
    while value.op == "call_function" and value.target in _VIEWS:
        value = _source(value)
    return value


def projected(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values are parts of one tensor, or products of one tensor with two matrices: gate and up, q and k.

    Two inputs of the program may be that, for all it knows.
    """
    first, second = origin(a), origin(b)
    if first is second or first.op == second.op == "placeholder":
        return True
    both = first.target in _PRODUCTS and second.target in _PRODUCTS
    return both and origin(_source(first)) is origin(_source(second))


def common_source(*values: fx.Node) -> bool:
    """Whether values are made of one tensor, each by a product of its own and what is done to it after: q, k and v.

    Inputs of the program may be that, for all it knows.
    """
    found = {_made_of(value) for value in values}
    return len(found) == 1 or all(node.op == "placeholder" for node in found)


def _made_of(value: fx.Node) -> fx.Node:
    """The tensor that the last product before ``value`` reads: behind norms, rotary embeddings, scales, an older cache."""
    while value.op == "call_function":
        joined = value.target is aten.cat.default
        operands = [x for x in value.all_input_nodes if x.op != "get_attr"]
        first = next(iter(operands[-1:] if joined else operands), None)
        if first is None:
            return value
        if value.target in _PRODUCTS:
            return origin(first)
        value = first
    return value


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
