"""A program drawn in layers, as SVG: data flows down, repeated blocks in one box, colours by kind.

Layers are the topological generations; an edge that skips layers keeps a free lane through each of them; boxes are
ordered and placed by the mean of their neighbours (Sugiyama, Tagawa, Toda 1981). Weights and sizes are not drawn, the
calls that compute masks and positions are one box, and a call that a rewrite made or fed has a thick border.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

import networkx
from torch import fx

from .blocks import Block, blocks, equal
from .dominators import carries_data, made_of_weights
from .errors import UsageError
from .program import Program, path_of, target_name, tensors
from .shapes import show

COLOURS = {
    "input": "#ffffff", "norm": "#fde3a7", "linear": "#b9d6f2", "attention": "#f6c1c1", "activation": "#c9e7c4",
    "embedding": "#d9cdf0", "mask": "#e4e0d4", "sum": "#fff7c2", "block": "#dfe7ee", "other": "#f2f2f2",
}  # fmt: skip
_ATTENTION = {"scaled_dot_product_attention", "softmax", "matmul", "bmm", "baddbmm"}
_LINEAR = {"linear", "addmm", "mm", "einsum"}
_ACTIVATION = {"gelu", "silu", "relu", "tanh", "sigmoid", "elu", "leaky_relu", "hardswish", "hardsigmoid", "mish", "softplus"}

_NAME = re.compile(r"([^.]*\.\d+|[^.]*)$")
"""The last name of a module path, ``c_proj``, with the one before it if it is a number, ``h.0``."""

_LETTER, _LINE, _PAD, _GAP, _LAYER, _LANE = 7.3, 16.0, 10.0, 18.0, 30.0, 10.0


@dataclass(frozen=True, eq=False)
class Box:
    """One box of a drawing.

    Attributes:
        lines: its text.
        kind: of ``COLOURS``.
        rewritten: whether a rewrite made, or edited a weight of, something in it.
    """

    lines: tuple[str, ...]
    kind: str
    rewritten: bool = False

    @property
    def width(self) -> float:
        return max(map(len, self.lines)) * _LETTER + 2 * _PAD if self.lines else _LANE

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + _PAD


def draw(program: Program, at: str | None = None) -> str:
    """A drawing of a program, or of the calls below one module path, as the text of an SVG file.

    Raises:
        UsageError: no call is below ``at``.

    Example: ``Path("h0.svg").write_text(draw(program, at="transformer.h.0"))``
    """
    graph = boxes(program, at)
    return _svg(graph, _place(graph))


# -- what is drawn ---------------------------------------------------------------------------------------------


def boxes(program: Program, at: str | None = None) -> networkx.DiGraph:
    """The boxes of a drawing, with an edge for every value that one reads from another."""
    home = _homes(program, at)
    graph = networkx.DiGraph()
    for node in program.graph.nodes:  # in the order of the program
        if node in home:
            graph.add_node(home[node])
    graph.add_edges_from(
        (home[x], box) for node, box in home.items() for x in node.all_input_nodes if x in home and home[x] is not box
    )
    return graph


def _homes(program: Program, at: str | None) -> dict[fx.Node, Box]:
    """The box of every node that is drawn."""
    parts = blocks(program)
    inside = {node for block in parts for node in block.nodes if at is None or f"{path_of(node)}.".startswith(f"{at}.")}
    if not inside:
        raise UsageError(f"no call of {program.name} is below '{at}'", hint="a module path such as " + _some_path(parts))
    marked = {node for node in inside if _rewritten(program, node)}
    home = _collapsed(program, parts, marked) if at is None else {}
    data, fixed = carries_data(program), made_of_weights(program)
    masks = [n for n in program.graph.nodes if n in inside and n not in home and _is_mask(n, data, fixed)]
    mask = Box(("masks, positions", f"{len(masks)} calls"), "mask", any(n in marked for n in masks))
    home |= dict.fromkeys(masks, mask)
    for node in program.graph.nodes:
        drawn = node in inside or (at is None and node.op in ("placeholder", "output"))
        border = at is not None and node not in inside and any(user in inside for user in node.users)
        if node in home or node in fixed or not (drawn or border) or not (node.op == "output" or list(tensors(node))):
            continue
        piece = target_name(node) == "getitem" and node.all_input_nodes[0] in home
        home[node] = home[node.all_input_nodes[0]] if piece else _box(node, node in marked, outside=border)
    return home


def _collapsed(program: Program, parts: Sequence[Block], marked: set[fx.Node]) -> dict[fx.Node, Box]:
    """A box for every run of equal blocks, and for a numbered module that has no equal among others that are boxes."""
    group = {block: index for index, same in enumerate(equal(program, parts)) for block in same}
    owned = [block for block in parts if block in group or block.path]
    home: dict[fx.Node, Box] = {}
    for name, run in groupby(parts, lambda block: group.get(block, -1) if block in owned else None):
        same = list(run)
        if name is None or len(owned) < 2:
            continue
        for members in [same] if name >= 0 else [[block] for block in same]:
            inside = {node for block in members for node in block.nodes}
            times = f" × {len(members)}" if len(members) > 1 else ""
            last = f" … {str(members[-1]).rsplit('.', 1)[-1]}" if times and members[0].path else ""
            lines = (f"{members[0]}{last}", f"{len(members[0].nodes)} calls{times}")
            home |= dict.fromkeys(inside, Box(lines, "block", not inside.isdisjoint(marked)))
    return home


def _is_mask(node: fx.Node, data: set[fx.Node], fixed: set[fx.Node]) -> bool:
    """Whether a call computes a mask or a position: no data, and no parameter of its own."""
    return node not in data and node not in fixed and not any(x in fixed for x in node.all_input_nodes)


def _rewritten(program: Program, node: fx.Node) -> bool:
    """Whether a rewrite made a call, or put it in the place of another, or it reads a weight that a rewrite edited."""
    names = (str(x.target) for x in node.all_input_nodes if x.op == "get_attr" and x.target in program.weights)
    made = "rewritten" in node.meta or node.meta.get("origin", node.name) != node.name
    return made or any(program.weights[name].edited for name in names)


def _box(node: fx.Node, rewritten: bool, *, outside: bool) -> Box:
    if node.op == "output":
        return Box(("output",), "input")
    given = outside or node.op == "placeholder"
    name = node.name if given else target_name(node).rsplit(".", 1)[-1]
    owner = "" if given else _NAME.search(path_of(node))[0]  # type: ignore[index]
    first = next(tensors(node))
    return Box((f"{name} · {owner}" if owner else name, show(first.shape)), "input" if given else _kind(name), rewritten)


def _kind(name: str) -> str:
    tests: Mapping[str, bool] = {
        "norm": "norm" in name,
        "linear": name in _LINEAR or name.startswith("conv"),
        "attention": name in _ATTENTION or "attention" in name,
        "activation": name.rstrip("_") in _ACTIVATION,
        "embedding": "embedding" in name,
        "sum": name in ("add", "sub"),
    }
    return next((kind for kind, holds in tests.items() if holds), "other")


def _some_path(parts: Iterable[Block]) -> str:
    paths = [path_of(node) for block in parts for node in block.nodes]
    return next((f"'{block.path}'" for block in parts if block.path), f"'{next(filter(None, paths), '')}'")


# -- where it stands -------------------------------------------------------------------------------------------

Places = dict[Box, tuple[float, float, float]]
Lanes = dict[tuple[Box, Box], list[Box]]


def _place(graph: networkx.DiGraph) -> tuple[Places, Lanes]:
    """Middle, top and bottom of every box, lanes included, and the lanes of every edge."""
    layered, lanes = _with_lanes(graph)
    layers = [list(layer) for layer in networkx.topological_generations(layered)]
    x: dict[Box, float] = {}
    for layer in layers:
        x |= _spread(layer, [0.0] * len(layer))
    for sweep in range(12):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            near = layered.predecessors if down else layered.successors
            wish = {box: _mean([x[other] for other in near(box)], x[box]) for box in layer}
            layer.sort(key=wish.__getitem__)
            x |= _spread(layer, [wish[box] for box in layer])
    places, y = Places(), 0.0
    for layer in layers:
        height = max(box.height for box in layer)
        for box in layer:
            half = (box.height if box.lines else height) / 2
            places[box] = (x[box], y + height / 2 - half, y + height / 2 + half)
        y += height + _LAYER
    return places, lanes


def _with_lanes(graph: networkx.DiGraph) -> tuple[networkx.DiGraph, Lanes]:
    """``graph`` with an empty box in every layer that an edge skips."""
    layer = {box: index for index, boxes in enumerate(networkx.topological_generations(graph)) for box in boxes}
    layered, lanes = networkx.DiGraph(), Lanes()
    layered.add_nodes_from(graph)
    for tail, head in graph.edges:
        lanes[tail, head] = [Box((), "other") for _ in range(layer[head] - layer[tail] - 1)]
        networkx.add_path(layered, [tail, *lanes[tail, head], head])
    return layered, lanes


def _spread(layer: Sequence[Box], wish: Sequence[float]) -> dict[Box, float]:
    """Places in the order of ``layer``, near their wishes and apart: midway between packed to the right and to the left."""
    apart = [(a.width + b.width) / 2 + _GAP for a, b in pairwise(layer)]
    rightward, leftward = list(wish), list(wish)
    for i, distance in enumerate(apart):
        rightward[i + 1] = max(wish[i + 1], rightward[i] + distance)
    for i, distance in reversed(list(enumerate(apart))):
        leftward[i] = min(wish[i], leftward[i + 1] - distance)
    return {box: (a + b) / 2 for box, a, b in zip(layer, rightward, leftward, strict=True)}


def _mean(numbers: Sequence[float], default: float) -> float:
    return sum(numbers) / len(numbers) if numbers else default


# -- ink -------------------------------------------------------------------------------------------------------


def _svg(graph: networkx.DiGraph, placed: tuple[Places, Lanes]) -> str:
    places, lanes = placed
    left = min(x - box.width / 2 for box, (x, _, _) in places.items()) - _GAP
    right = max(x + box.width / 2 for box, (x, _, _) in places.items()) + _GAP
    bottom = max(bottom for _, _, bottom in places.values()) + _GAP
    edges = [_edge([tail, *lanes[tail, head], head], places) for tail, head in graph.edges]
    return svg(left, -_GAP, right - left, bottom + _GAP, [*edges, *(_ink(box, *places[box][:2]) for box in graph)])


def svg(left: float, top: float, width: float, height: float, drawn: Iterable[str]) -> str:
    """The text of an SVG file: what is drawn, on white, in letters of one width."""
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{left:.1f} {top:g} {width:.1f} {height:.1f}" font-family="monospace" font-size="12">',
        f'<rect x="{left:.1f}" y="{top:g}" width="100%" height="100%" fill="white"/>',
        *drawn, "</svg>\n",
    ))  # fmt: skip


def _edge(boxes: Sequence[Box], places: Places) -> str:
    """A curve from box to box, straight down through the lanes."""
    x, _, y = places[boxes[0]]
    path = f"M {x:.1f} {y:.1f}"
    for box in boxes[1:]:
        to, top, bottom = places[box]
        path += f" C {x:.1f} {(y + top) / 2:.1f} {to:.1f} {(y + top) / 2:.1f} {to:.1f} {top:.1f}"
        path += f" V {bottom:.1f}" if not box.lines else ""
        x, y = to, bottom
    return f'<path d="{path}" fill="none" stroke="#8a8a8a"/>'


def _ink(box: Box, x: float, top: float) -> str:
    left = x - box.width / 2
    border = 'stroke="#b03a2e" stroke-width="2.5"' if box.rewritten else 'stroke="#555555"'
    size = f'width="{box.width:.1f}" height="{box.height:.1f}" rx="4"'
    behind = (6, 3) if any("×" in line for line in box.lines) else ()
    shadow = "".join(f'<rect x="{left + d:.1f}" y="{top + d:.1f}" {size} fill="#ffffff" stroke="#999999"/>' for d in behind)
    text = "".join(
        f'<text x="{x:.1f}" y="{top + _PAD / 2 + _LINE * (i + 0.75):.1f}" text-anchor="middle">{escape(line)}</text>'
        for i, line in enumerate(box.lines)
    )
    rectangle = f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{COLOURS[box.kind]}" {border}/>'
    return shadow + rectangle + text
