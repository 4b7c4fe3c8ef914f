"""The feedforward layers of a program: linear layers on one tensor, an activation or gate, and a linear layer back to its width.

    linear(act(linear(x, W1, b1)), W2, b2)          linear(act(linear(x, G)) · linear(x, W1), W2)

Between them stand only calls that treat every entry alike, and cuts of a product of gate and up; dropout counts as such. An
activation is what is not linear in the products: a product with a constant, a sum or a cast are none.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .emit import Editor
from .equation import width
from .ops import OPS, aten
from .program import Program

_LINEAR = aten.linear.default
_MOVES = {
    aten.dropout.default, aten.clone.default, aten.contiguous.default, aten.to.dtype, aten.alias.default, aten.type_as.default,
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, aten.narrow.default,
    operator.getitem,
}  # fmt: skip
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.neg.default}
_PRODUCTS = {aten.mul.Tensor, aten.div.Tensor}
_ACTIVATIONS = {OPS["glu"].target, OPS["quick_gelu"].target}


@dataclass(frozen=True)
class Feedforward:
    """One feedforward layer.

    Attributes:
        x: what it reads.
        up: the layers on ``x``, gate and up for one, in the order of the graph.
        down: the last layer.
    """

    x: fx.Node
    up: tuple[fx.Node, ...]
    down: fx.Node


def feedforward_layers(program: Program, editor: Editor | None = None) -> list[Feedforward]:
    """All of them, in the order of the graph."""
    editor = editor or Editor(program)
    found = (_behind(down, editor) for down in program.graph.find_nodes(op="call_function", target=_LINEAR))
    return [layer for layer in found if layer is not None]


def _behind(down: fx.Node, editor: Editor) -> Feedforward | None:
    """The feedforward layer that ends in ``down``."""
    up, active = dict[fx.Node, None](), False
    stack: list[Any] = [down.args[0]]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.target is _LINEAR:
            up[node] = None
            continue
        if not _is_pointwise(node):
            return None
        operands = [operand for operand in node.all_input_nodes if not editor.constant(operand)]
        active = active or _is_active(node, operands)
        stack.extend(operand for operand in operands if operand not in seen)
        seen.update(operands)
    read = {layer.args[0] for layer in up}
    if not active or len(read) != 1:
        return None
    (x,) = read
    assert isinstance(x, fx.Node)
    return Feedforward(x, tuple(sorted(up)), down) if width(x) is not None and width(x) == width(down) else None


def _is_pointwise(node: fx.Node) -> bool:
    target: Any = node.target
    tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return node.op == "call_function" and (tagged or target in _MOVES or target in _ACTIVATIONS)


def _is_active(node: fx.Node, operands: list[fx.Node]) -> bool:
    if node.target in _PRODUCTS:
        return len(operands) > 1 or node.args.count(operands[0]) > 1
    return node.target not in _MOVES and node.target not in _SUMS
