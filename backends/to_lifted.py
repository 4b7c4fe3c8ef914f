"""Emit a program as the graph it was lifted from: the same inputs in the same places, weights among them.

program(x) over the weights W   →   g(W, n, x)        an edit of W is computed at every call
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tautomer.rewrite._torch import copy_input
from tautomer.rewrite.errors import require
from tautomer.rewrite.lifted import Lifted
from tautomer.rewrite.program import inherit
from tautomer.rewrite.shapes import tensor_key

from .to_torch import as_run, body


def to_lifted(lifted: Lifted, graph_module: fx.GraphModule) -> None:
    """Let ``graph_module``, which ``lifted`` was made from, compute ``lifted.program``; what compilers know of its inputs stays.

    Raises:
        Refused: an output is no longer what the code around the graph was compiled for.
    """
    program = as_run(lifted.program)
    graph = fx.Graph()
    inputs = [copy_input(graph, node) for node in graph_module.graph.find_nodes(op="placeholder")]
    mapped = {node: inputs[position] for node, position in zip(program.placeholders, lifted.inputs, strict=True)}
    held: dict[str, Tensor | fx.GraphModule] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr" and node.target in lifted.weights:
            mapped[node] = inputs[lifted.weights[str(node.target)]]
            continue
        if node.op == "get_attr":
            name, target = f"tautomer_{len(held)}", str(node.target)
            held[name] = program.weights.value(target) if target in program.weights else body(program.regions[target])
            mapped[node] = graph.create_node("get_attr", name)
            continue
        if node.op == "output":
            graph.output(_like_before(graph, node, graph_module.graph.output_node(), mapped))
            continue
        mapped[node] = graph.node_copy(node, mapped.__getitem__)
        mapped[node].meta = {}
        inherit(mapped[node], node)
    for name, value in held.items():
        if isinstance(value, Tensor):
            graph_module.register_buffer(name, value, persistent=False)
        else:
            graph_module.add_module(name, value)
    graph_module.graph = graph


def _like_before(graph: fx.Graph, output: fx.Node, before: fx.Node, mapped: dict[fx.Node, fx.Node]) -> tuple[Any, ...]:
    """The outputs down to their strides: the code around the graph may have asked for them while it was traced."""
    results = []
    for new, old in zip(output.args[0], before.args[0], strict=True):  # type: ignore[arg-type]
        result = mapped[new] if isinstance(new, fx.Node) else new
        mine, theirs = (x.meta.get(key) if isinstance(x, fx.Node) else None for x, key in ((new, "val"), (old, "example_value")))
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            (shape, strides, *rest), (wanted, steps, *others) = tensor_key(mine), tensor_key(theirs)
            require((shape, rest) == (wanted, others), "an output would have another shape or dtype")
            if strides != steps:
                require(theirs.is_contiguous(), "an output would have other strides")
                result = graph.call_function(torch.ops.aten.contiguous.default, (result,))
        results.append(result)
    return tuple(results)
