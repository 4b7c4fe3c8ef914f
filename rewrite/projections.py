"""Where a value comes from through views: the tensor it is a part of, and the rows of the linear layer that made it.

    linear(x, W, b)  →  chunk, split, view and unbind, permute, …  →  q        q is rows 0..d of W

The rows of q, k and v (or gate and up) say whether and how they were fused: one after the other (GPT-2, timm), or head
by head (GPT-NeoX). They are found by running the views on the numbers 0..n instead of features, so any chain of views
is understood, and nothing is assumed about axes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .ops import OPS
from .shapes import key

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


@dataclass(frozen=True)
class Rows:
    """What of a linear layer's output a value is.

    Attributes:
        layer: the ``linear`` node.
        rows: the rows of its weight, in the order in which the value holds their features.
    """

    layer: fx.Node
    rows: tuple[int, ...]


def rows(value: fx.Node) -> Rows | None:
    """The rows of the linear layer that ``value`` is a view of; None if it is not the view of one.

    Example: for the queries of GPT-2, of width d, ``rows(q).rows == tuple(range(d))``.
    """
    layer = origin(value)
    if layer.target is not OPS["linear"].target:
        return None
    for sizes in ((2, 3, 5, 7), (4, 6, 8, 10)):
        bindings: dict[Any, int] = {}
        concrete = partial(_size, bindings=bindings, sizes=sizes)
        shape = [concrete(size) for size in layer.meta["val"].shape]
        try:
            found = _run(value, layer, torch.arange(shape[-1]).expand(shape), concrete)
        except (RuntimeError, IndexError, ValueError):
            continue  # these sizes do not divide as the views need them
        return Rows(layer, tuple(dict.fromkeys(found.flatten().tolist())))
    return None


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _run(value: fx.Node, layer: fx.Node, features: Tensor, concrete: Any) -> Any:
    path = [value]
    while path[-1] is not layer:
        path.append(_source(path[-1]))
    found: Any = features
    for node in reversed(path[:-1]):
        others = fx.node.map_arg((node.args[1:], node.kwargs), lambda x: concrete(x.meta["val"]))
        args, kwargs = others  # type: ignore[misc]
        found = node.target(found, *args, **kwargs)  # type: ignore[operator]
    return found


def _size(x: Any, bindings: dict[Any, int], sizes: tuple[int, ...]) -> int:
    """A size as a number: symbols become small distinct sizes."""
    if not isinstance(x, torch.SymInt):
        return int(x)
    expression: Any = key(x)
    for symbol in sorted(expression.free_symbols, key=str):
        bindings.setdefault(symbol, sizes[len(bindings) % len(sizes)])
    return int(expression.subs(bindings))
