"""Emit a program as the graph it was lifted from: the same inputs in the same places, weights among them.

    program(x) over the weights W   →   g(W, n, x)        an edit of W is computed at every call
"""

from __future__ import annotations

from torch import Tensor, fx

from tautomer.rewrite._torch import copy_input
from tautomer.rewrite.lifted import Lifted
from tautomer.rewrite.program import inherit

from .to_torch import as_run, body


def to_lifted(lifted: Lifted, graph_module: fx.GraphModule) -> None:
    """Let ``graph_module``, which ``lifted`` was made from, compute ``lifted.program``; what compilers know of its inputs stays."""
    program = as_run(lifted.program)
    graph = fx.Graph()
    inputs = [copy_input(graph, node) for node in graph_module.graph.find_nodes(op="placeholder")]
    mapped: dict[fx.Node, fx.Node] = {}
    held: dict[str, Tensor | fx.GraphModule] = {}
    for node in program.graph.nodes:
        if node.target in lifted.positions and node.op in ("placeholder", "get_attr"):
            mapped[node] = inputs[lifted.positions[str(node.target)]]
            continue
        if node.op == "get_attr":
            name, target = f"tautomer_{len(held)}", str(node.target)
            held[name] = program.weights.value(target) if target in program.weights else body(program.regions[target])
            mapped[node] = graph.create_node("get_attr", name)
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
