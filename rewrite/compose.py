"""A small program written in the vocabulary: tensors by name, and a function of ``op`` that says what is computed of them.

compose("Layer", {"W": W}, {"x": x}, lambda op, at: [op.linear(at["x"], at["W"], None)])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ._torch import FakeTensorMode, pytree
from .emit import GraphOps
from .metadata import Derived
from .program import Program
from .signature import Signature
from .weights import Weights

Nodes = Mapping[str, fx.Node]


def compose(
    name: str, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], results: Callable[[GraphOps, Nodes], Sequence[Any]]
) -> Program:
    """A program with these parameters, called with these inputs (they are its example), that returns ``results(op, nodes)``.

    Raises:
        Refused: an op does not accept its operands.
    """
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes: dict[str, fx.Node] = {}
    for group, make in ((weights, graph.get_attr), (inputs, graph.placeholder)):
        for key, tensor in group.items():
            nodes[key] = make(key)
            nodes[key].meta["val"] = mode.from_tensor(tensor)
    output = graph.output(())
    table = Weights.of({key: torch.nn.Parameter(tensor) for key, tensor in weights.items()}, {}, {})
    signature = Signature.of(lambda *args: None, name, tuple(inputs.values()), {}, None)
    program = Program(graph, table, signature, tuple(inputs.values()), name=name)
    op = GraphOps(program, output)
    outputs = tuple(op.node(x) if isinstance(x, (fx.Node, Derived)) else x for x in results(op, nodes))
    output.args = (outputs,)
    program.signature = replace(signature, out_spec=pytree.tree_flatten(outputs)[1])
    return program
