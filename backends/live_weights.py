"""Compute edited weights at every call, from the user's own parameters, instead of once.

    y = linear(h, W')   ->   y = linear(h, W - mean(W))        W is the parameter

A gradient that reaches W' goes on to W through the edit, so whatever optimizer steps on W steps as it would on the original
model: the trajectory is the original's. It costs a pass over the weight at every call, whatever the batch.
"""

from __future__ import annotations

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
            read.replace_all_uses_with(_cast(graph, weights, weights[str(read.target)], known))
        graph.erase_node(read)


def _cast(graph: fx.Graph, weights: Weights, weight: Weight, known: dict[Expression, fx.Node]) -> fx.Node:
    node = _node(graph, weight.expression, known)
    made = evaluate(weight.expression, lambda leaf: torch.empty_like(weights.leaves[leaf], device="meta"), wide=False).dtype
    return node if made == weight.meta.dtype else graph.call_function(torch.ops.aten.to.dtype, (node, weight.meta.dtype))


def _node(graph: fx.Graph, expression: Expression, known: dict[Expression, fx.Node]) -> fx.Node:
    if expression not in known:
        if isinstance(expression, Leaf):
            known[expression] = graph.get_attr(expression.name)
        else:
            args = tuple(_operand(graph, x, known) for x in expression.args)
            kwargs = {name: _operand(graph, x, known) for name, x in expression.kwargs}
            known[expression] = graph.call_function(expression.target, args, kwargs)
    return known[expression]


def _operand(graph: fx.Graph, x: Any, known: dict[Expression, fx.Node]) -> Any:
    if isinstance(x, tuple):
        return [_operand(graph, y, known) for y in x]
    return _node(graph, x, known) if isinstance(x, Leaf | Apply) else x
