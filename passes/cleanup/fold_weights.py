"""Compute once what depends on weights alone: a weight and its norm, a standardised weight, a mask, a low-rank update.

    linear(x, v g / |v|)   ->   linear(x, W),     W = v g / |v| one weight        (weight normalisation, arXiv:1602.07868)

The value is computed in float64 and rounded once. What would be larger than the weights it is made from stays (a low-rank
product, a broadcast), unless ``grow`` asks for it; a small table made from buffers (the cosine and the sine of angles) may
grow. What draws random numbers stays, what the graph writes (the power iteration of a spectral norm in training), and what
the caller gets, who may write into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, fx
from torch.nn import Parameter

from tautomer.rewrite._torch import storage_key
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.interpret import may_alias
from tautomer.rewrite.ops import aten
from tautomer.rewrite.pass_base import Context, Pass, Phase
from tautomer.rewrite.program import Program
from tautomer.rewrite.shapes import product
from tautomer.rewrite.weights import leaves

from .fold_constants import LARGEST


class FoldWeights(Pass):
    """Calls on weights alone → one weight; see the module.

    Args:
        grow: also where the weight is larger than those it is made from.
    """

    claim = ALGEBRAIC("what was rounded at every call is computed in float64 and rounded once")
    paper: ClassVar[str] = "arXiv:1602.07868, arXiv:1802.05957, arXiv:2101.08692"
    phase: ClassVar[Phase] = "cleanup"

    def __init__(self, grow: bool = False) -> None:
        self.grow = grow

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for node in computed_weights(editor):
            if not context.admits(self, node):
                continue
            try:
                require(not _returned(node), "the caller gets it, and may write into it")
                grow = self.grow or is_small_table(node, editor)
                if not grow:
                    require_no_larger(node, editor)
                emit = lambda op, node=node: [weight(op, node)]  # type: ignore[misc]  # noqa: E731
                substitute(self, (node,), emit, editor, context, copies=grow)
            except Refused as refusal:
                context.refused(self, node, str(refusal))


def computed_weights(editor: Editor) -> list[fx.Node]:
    """The outermost calls that compute on weights alone; a view of a weight computes nothing."""
    found: dict[fx.Node, None] = {}
    for node in editor.program.graph.nodes:
        if node.op == "call_function" and editor.constant(node) and not all(map(editor.constant, node.users)):
            while sources := may_alias(node):
                node = sources[0]
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point():
                found[node] = None
    return list(found)


def weight(op: GraphOps, node: fx.Node) -> fx.Node:
    """What ``node`` computes, as a weight, which is stored row by row."""
    value = op.weight(node)
    return op.node(value if value.fake.is_contiguous() else op(aten.contiguous.default)(value))


def is_small_table(node: fx.Node, editor: Editor) -> bool:
    """Whether ``node`` is made from buffers alone, and costs more to compute than to keep."""
    trains = any(isinstance(tensor, Parameter) for tensor in _sources(node, editor))
    return not trains and product(node.meta["val"].shape) <= LARGEST


def require_no_larger(node: fx.Node, editor: Editor) -> None:
    """Refuse to store more bytes than what the weight is made from."""
    tensors = {storage_key(tensor): tensor for tensor in _sources(node, editor)}
    made, sources = _bytes(node.meta["val"]), sum(map(_bytes, tensors.values()))
    require(made <= sources, f"it has {made} bytes, what it is computed from has {sources}")


def _sources(node: fx.Node, editor: Editor) -> Iterator[Tensor]:
    """The leaves that ``node`` is computed from."""
    expression = editor.expression(node)
    assert expression is not None
    return map(editor.program.weights.leaves.__getitem__, leaves(expression))


def _bytes(tensor: Tensor) -> Any:
    return product(tensor.shape) * tensor.element_size()


def _returned(node: fx.Node) -> bool:
    """Whether the caller gets ``node`` or a view of it."""
    return any(user.op == "output" or (node in may_alias(user) and _returned(user)) for user in node.users)
