"""Which linear layers may be factored: those of one weight of the table that nobody else reads.

y = W x + b        a linear layer, the Conv1D of transformers, or a convolution with kernel and stride 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tautomer.rewrite.emit import Editor
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.layers import Layer
from tautomer.rewrite.program import Program, target_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Matrix:
    """A layer y = W x + b that may be factored.

    Attributes:
        layer: the call; ``layer.weight`` may be the transpose of the weight of the table.
        name: of the weight in the table.
        bias: the name of its bias in the table; None if it has none.
        m, n: outputs and inputs.
    """

    layer: Layer
    name: str
    bias: str | None
    m: int
    n: int

    @property
    def x(self) -> fx.Node:
        x: fx.Node = self.layer.bound[self.layer.kind.x]
        return x

    @property
    def beside(self) -> str:
        """What a name begins with that stands beside the weight."""
        return "".join(self.name.rpartition(".")[:2])

    def value(self, program: Program) -> Tensor:
        """W as [m, n], in float64."""
        return self.turned(program.weights.value(self.name, torch.float64)).reshape(self.m, self.n)

    def turned(self, W: Tensor) -> Tensor:
        """W of the layer from that of the table, or the other way round."""
        return W if self.layer.weight.op == "get_attr" else W.T


def matrix_of(layer: Layer, editor: Editor) -> Matrix:
    """The layer, if it may be factored.

    Raises:
        Refused: it may not.
    """
    program, W, b = editor.program, layer.weight, layer.bias
    require(not program.weights.live, "its weight is edited at every call: factor the model first, and train the factors")
    if layer.kind.dims:
        pointwise = not layer.transposed and layer.groups == 1 and all(size == 1 for size in W.meta["val"].shape[2:])
        plain = pointwise and not any(map(any, layer.padding)) and _all_one(layer.bound["stride"])
        require(plain, "a convolution is a linear layer only with kernel and stride 1, without groups and padding")
    stored = W.args[0] if W.target is aten.t.default else W
    is_weight = isinstance(stored, fx.Node) and stored.op == "get_attr" and editor.constant(stored)
    require(is_weight, "the weight is computed at run time, or from others: fold-weights first")
    assert isinstance(stored, fx.Node)
    name = str(stored.target)
    names = {str(n.target) for n in program.graph.find_nodes(op="get_attr") if str(n.target) in program.weights.aliases(name)}
    readers = {r for n in program.graph.find_nodes(op="get_attr") if str(n.target) in names for r in n.users}
    readers = {user for r in readers for user in (r.users if r.target is aten.t.default else [r])}
    other = next((reader for reader in readers if reader is not layer.node), None)
    if other is not None:
        raise Refused(f"'{name}' is also read by {target_name(other)} '{other.name}', which needs it whole")
    bias = str(b.target) if isinstance(b, fx.Node) and b.op == "get_attr" and editor.constant(b) else None
    return Matrix(layer, name, bias, layer.outputs, layer.inputs)


def _all_one(stride: Any) -> bool:
    return all(n == 1 for n in (stride if isinstance(stride, Sequence) else [stride]))
