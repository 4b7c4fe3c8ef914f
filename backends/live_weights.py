"""Compute edited weights at every call, from the user's own parameters, instead of once.

    y = linear(h, W')   ->   y = linear(h, W - mean(W))        W is the parameter

A gradient that reaches W' goes on to W through the edit, so whatever optimizer steps on W steps as it would on the original
model: the trajectory is the original's. It costs a pass over the weight at every call, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tautomer.rewrite.weights import Apply, Expression, Leaf, Weight, Weights, evaluate


def compute_edits(graph: fx.Graph, weights: Weights) -> None:
    """Let ``graph`` read the leaves alone: an edited weight becomes calls before its first reader, equal ones made once."""
    known: dict[Expression, fx.Node] = {}
    order = {node: index for index, node in enumerate(graph.nodes)}
    reads = [node for node in graph.find_nodes(op="get_attr") if node.target in weights and weights[str(node.target)].edited]
    for read in sorted((node for node in reads if node.users), key=lambda node: min(map(order.__getitem__, node.users))):
        with graph.inserting_before(min(read.users, key=order.__getitem__)):
            read.replace_all_uses_with(computed(graph, weights[str(read.target)], weights, graph.get_attr, known))
        graph.erase_node(read)


def computed(
    graph: fx.Graph, weight: Weight, weights: Weights, read: Callable[[str], fx.Node], known: dict[Expression, fx.Node]
) -> fx.Node:
    """The node that computes an edited weight from the leaves that ``read`` reads; ``known`` are those made already."""

    def node(expression: Expression) -> fx.Node:
        if expression not in known:
            if isinstance(expression, Leaf):
                known[expression] = read(expression.name)
            else:
                args = tuple(map(operand, expression.args))
                known[expression] = graph.call_function(expression.target, args, {k: operand(x) for k, x in expression.kwargs})
        return known[expression]

    def operand(x: Any) -> Any:
        return [operand(y) for y in x] if isinstance(x, tuple) else node(x) if isinstance(x, Leaf | Apply) else x

    made = evaluate(weight.expression, lambda leaf: torch.empty_like(weights.leaves[leaf], device="meta"), None).dtype
    value = node(weight.expression)
    return value if made == weight.meta.dtype else graph.call_function(torch.ops.aten.to.dtype, (value, weight.meta.dtype))
