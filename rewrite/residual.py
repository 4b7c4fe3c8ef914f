"""The residual streams of a program: how wide they are, who writes them, who reads them.

    x ← x + f(x)        f holds a weight

Values that carry one feature axis on (sums, views, casts, dropout that is off: axes.py) are one connected component. A
component with such a sum in it is a stream; its members that no other member carries are written into it, by a weight
or by an op that mixes or scales features. A norm between two blocks (post-norm) ends one stream and writes the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import networkx
import torch
from torch import fx

from .axes import SIZES_ONLY, Axes, Value, rank, shape
from .dominators import made_of_weights
from .program import Program, place
from .shapes import Size, show

aten = torch.ops.aten


@dataclass(frozen=True)
class Stream:
    """One residual stream.

    Attributes:
        values: the values that carry it, in the order of the program, each with its feature axis.
        width: the size of that axis.
        writers: the values that are written into it.
        readers: the nodes outside that read it.
    """

    values: tuple[Value, ...]
    width: Size
    writers: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]

    def __str__(self) -> str:
        first = self.values[0].node
        lines = [f"width {self.width}, {len(self.values)} values from {first.name} {show(shape(first))}"]
        for what, nodes in (("written by", self.writers), ("read by", self.readers)):
            places = list(dict.fromkeys(map(place, nodes)))
            lines.append(f"  {what} {len(places)}: {', '.join(places)}")
        return "\n".join(lines)


def residual_streams(program: Program) -> tuple[Stream, ...]:
    """The residual streams of a program, in the order in which they begin.

    Example: ``print(*residual_streams(program), sep="\\n")``
    """
    axes, carried, flow = Axes(program), networkx.Graph(), networkx.DiGraph()
    weights = made_of_weights(program)
    written = set[Value]()
    for node in (node for node in program.graph.nodes if node.op in ("call_function", "placeholder") and node not in weights):
        flow.add_edges_from((x, node) for x in node.all_input_nodes if x not in weights)
        for value in (Value(node, axis) for axis in range(rank(node))):
            carriers = axes.carriers(value) or ()
            carried.add_node(value)
            carried.add_edges_from((value, other) for other in carriers if other.node not in weights)
            written |= {value} if carriers and all(other.node in weights for other in carriers) else set()
    components = list(map(frozenset, networkx.connected_components(carried)))
    home = {value: (len(component & written), component) for component in components for value in component}
    found = dict[frozenset[Value], None]()
    for node in program.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if node not in weights and _skips(flow, node, weights):
            last = max(range(rank(node)), key=lambda axis: (home[Value(node, axis)][0], axis))
            count, component = home[Value(node, last)]
            found |= {component: None} if count else {}
    return tuple(_stream(program, axes, component) for component in found)


def _skips(flow: networkx.DiGraph, node: fx.Node, weights: set[fx.Node]) -> bool:
    """Whether a sum is ``x + f(x)`` where ``f`` reads a weight."""
    above = {x: networkx.ancestors(flow, x) for x in node.all_input_nodes if x in flow}
    branches = ((networkx.descendants(flow, x) & above[f] | {f}) for x, f in permutations(above, 2) if x in above[f])
    return any(w in weights for branch in branches for y in branch for w in y.all_input_nodes)


def _stream(program: Program, axes: Axes, component: frozenset[Value]) -> Stream:
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    values = tuple(sorted(component, key=lambda value: order[value.node]))
    members = dict.fromkeys(value.node for value in values)
    writers = (v.node for v in values if not any(c in component for c in axes.carriers(v) or ()))
    readers = (user for node in members for user in node.users if user not in members and user.target not in SIZES_ONLY)
    outside = sorted(dict.fromkeys(readers), key=order.__getitem__)
    return Stream(values, shape(values[0].node)[values[0].axis], tuple(dict.fromkeys(writers)), tuple(outside))
