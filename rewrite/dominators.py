"""The smallest part of a program with one way in and one way out: what can be checkpointed, replaced or checked alone.

    entry dominates, and exit post-dominates, every call of the part        (immediate dominators: Cooper, Harvey, Kennedy)

A way is a way of data: of floating inputs, and of what parameters make of an input. Masks are made without parameters,
positions without an input's values; a part may read them from anywhere, and they are named as its context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx
from torch import Tensor, fx

from .axes import SIZES_ONLY
from .blocks import Block
from .program import Program

_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True)
class Section:
    """A part of a program: ``exit = f(entry, *context)``.

    Attributes:
        entry: the one value of data that it reads; no call of it.
        exit: the one value of data that is read outside; its last call.
        block: its calls, with those that make masks and positions for it alone.
        context: the masks, positions and sizes that it reads.
    """

    entry: fx.Node
    exit: fx.Node
    block: Block
    context: tuple[fx.Node, ...]


def smallest_section(program: Program, nodes: Iterable[fx.Node]) -> Section | None:
    """The smallest section that contains ``nodes``; None if there is none smaller than the program.

    Args:
        nodes: of these, the calls that carry data.

    Example: ``smallest_section(program, program.graph.find_nodes(op="call_function", target=aten.gelu.default)[:2])``
    """
    data = carries_data(program)
    flow = _flow(data)
    before = networkx.immediate_dominators(flow, _SOURCE)
    after = networkx.immediate_dominators(flow.reverse(copy=False), _SINK)
    inside = set(nodes) & data
    while inside and inside <= data:
        entry, exit = _common(before, [before[node] for node in inside]), _common(after, inside)
        if not isinstance(entry, fx.Node) or not isinstance(exit, fx.Node):
            return None
        grown = inside | {exit}
        grown |= {x for node in grown for x in flow.predecessors(node) if x is not entry}
        grown |= {x for node in grown for x in flow.successors(node) if node is not exit}
        if grown == inside:
            return _section(program, entry, exit, inside)
        inside = grown
    return None


def carries_data(program: Program) -> set[fx.Node]:
    """The inputs and calls that data flows through: floating inputs, and what parameters make of an input's values."""
    given, trained, data = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    for node in program.graph.nodes:
        read = set(node.all_input_nodes) if node.target not in SIZES_ONLY else set()
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            given.add(node)
            data |= {node} if value.is_floating_point() else set()
        elif node.op == "get_attr" and node.target in program.weights:
            trained |= {node} if program.weights[str(node.target)].kind == "parameter" else set()
        elif node.op == "call_function":
            given |= {node} if read & given else set()
            trained |= {node} if read & trained else set()
            data |= {node} if read & data or (node in given and node in trained) else set()
    return data


def made_of_weights(program: Program) -> set[fx.Node]:
    """The weights, and the calls that read nothing but weights."""
    found = set[fx.Node]()
    for node in program.graph.nodes:
        made = node.op == "call_function" and bool(node.all_input_nodes) and all(x in found for x in node.all_input_nodes)
        found |= {node} if made or (node.op == "get_attr" and node.target in program.weights) else set()
    return found


def _flow(data: set[fx.Node]) -> networkx.DiGraph:
    """The dataflow among ``data``, with one source and one sink."""
    flow = networkx.DiGraph()
    for node in data:
        operands = [x for x in node.all_input_nodes if x in data]
        flow.add_edges_from(((x, node) for x in operands) if operands else [(_SOURCE, node)])
        if not all(user in data for user in node.users) or not node.users:
            flow.add_edge(node, _SINK)
    return flow


def _common(tree: dict[Any, Any], nodes: Iterable[Any]) -> Any:
    """The nearest common ancestor of ``nodes`` in a tree of immediate dominators."""
    ways = [list(_way(tree, node))[::-1] for node in nodes]
    common = None
    for level in zip(*ways, strict=False):
        if any(x is not level[0] for x in level):
            break
        common = level[0]
    return common


def _way(tree: dict[Any, Any], node: Any) -> Iterator[Any]:
    """``node`` and its dominators, the root last."""
    while node is not None:
        yield node
        above = tree.get(node)
        node = None if above is node else above  # the root's own entry differs between versions of networkx


def _section(program: Program, entry: fx.Node, exit: fx.Node, inside: set[fx.Node]) -> Section:
    nodes = set(inside)
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and node.users and all(user in nodes for user in node.users) and node is not entry:
            nodes.add(node)
    block = Block("", tuple(node for node in program.graph.nodes if node in nodes))
    return Section(entry, exit, block, tuple(x for x in block.inputs if x is not entry))
