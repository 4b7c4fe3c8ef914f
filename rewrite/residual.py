"""The residual streams of a program: how wide they are, who writes them, who reads them.

    x ← x + f(x)        f holds a weight

Values that carry one feature axis on (sums, views, casts, dropout that is off: axes.py) are one connected component. A
component with such a sum in it is a stream; its members that no other member carries are written into it, by a weight
or by an op that mixes or scales features. A norm between two blocks (post-norm) ends one stream and writes the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations

import networkx
import torch
from torch import fx

from .axes import SIZES_ONLY, Axes, Value, rank, shape
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
    axes, carried = Axes(program), networkx.Graph()
    for node in program.graph.nodes:
        for value in (Value(node, axis) for axis in range(rank(node)) if node.op in ("call_function", "placeholder")):
            carried.add_node(value)
            carried.add_edges_from((value, other) for other in axes.carriers(value) or () if not _is_weight(program, other.node))
    home = {value: frozenset(component) for component in networkx.connected_components(carried) for value in component}
    found = dict[frozenset[Value], None]()
    for node in _skips(program):
        written = {axis: _written(program, axes, home[Value(node, axis)]) for axis in range(rank(node))}
        if any(written.values()):
            found[home[Value(node, max(written, key=lambda axis: (written[axis], axis)))]] = None
    return tuple(_stream(program, axes, component) for component in found)


def _is_weight(program: Program, node: fx.Node) -> bool:
    return program.expression(node) is not None


def _written(program: Program, axes: Axes, component: Iterable[Value]) -> int:
    """How many values of a component have this axis from a weight."""
    carriers = (axes.carriers(value) for value in component)
    return sum(bool(found) and all(_is_weight(program, c.node) for c in found) for found in carriers if found)


def _skips(program: Program) -> Iterator[fx.Node]:
    """The sums ``x + f(x)`` where something between ``x`` and ``f(x)`` reads a weight."""
    flow = networkx.DiGraph((x, node) for node in program.graph.nodes for x in node.all_input_nodes)
    for node in program.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        terms = [x for x in node.all_input_nodes if not _is_weight(program, x)]
        above = {x: networkx.ancestors(flow, x) for x in terms}
        branches = ((networkx.descendants(flow, x) & above[f] | {f}) for x, f in permutations(terms, 2) if x in above[f])
        if any(_is_weight(program, w) for branch in branches for y in branch for w in y.all_input_nodes):
            yield node


def _stream(program: Program, axes: Axes, component: frozenset[Value]) -> Stream:
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    values = tuple(sorted(component, key=lambda value: order[value.node]))
    members = dict.fromkeys(value.node for value in values)
    writers = (v.node for v in values if not any(c in component for c in axes.carriers(v) or ()))
    readers = (user for node in members for user in node.users if user not in members and user.target not in SIZES_ONLY)
    outside = sorted(dict.fromkeys(readers), key=order.__getitem__)
    return Stream(values, shape(values[0].node)[values[0].axis], tuple(dict.fromkeys(writers)), tuple(outside))
