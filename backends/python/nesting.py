"""A flat graph as nested calls of modules, as the user's module tree made them.

A call of a module becomes a function if nothing that it computes on the way is needed to compute its inputs: the graph
with every call drawn as one vertex has no cycle. A rewrite may break this (it moves values across modules); such a module
is dissolved, its calls are its parent's. What is left is put in an order: the graph's, as far as the vertices allow.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import networkx
import torch
from torch import fx

from tautomer.rewrite.interpret import roots, writes
from tautomer.rewrite.program import Program, arguments

from .torch_layers import Layer

SEQUENTIAL = "torch.nn.modules.container.Sequential"


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        path: the module, ``transformer.h.3``; empty for the root.
        kind: the user's class, with its module.
        parent: the call it is part of.
        items: what it runs, in order.
    """

    path: str
    kind: str
    parent: Call | None = None
    items: list[fx.Node | Call] = field(default_factory=list)

    @property
    def above(self) -> Iterator[Call]:
        """The call and those it is part of, from inside out."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent

    def nodes(self) -> Iterator[fx.Node]:
        for item in self.items:
            if isinstance(item, Call):
                yield from item.nodes()
            else:
                yield item

    def calls(self) -> Iterator[Call]:
        """All calls in it, itself last."""
        for item in self.items:
            if isinstance(item, Call):
                yield from item.calls()
        yield self


class Graph:
    """What the calls need to know of a program.

    Attributes:
        layers: the nodes that are calls of a layer of torch.nn.
        silent: nodes that are part of such a call.
    """

    def __init__(self, program: Program, layers: dict[fx.Node, Layer]) -> None:
        self.program, self.layers = program, layers
        self.silent = {node for layer in layers.values() for node in layer.silent}
        self.sizes = {node for node in program.graph.nodes if node.op == "call_function" and _is_size(node)}
        self.index = {node: i for i, node in enumerate(program.graph.nodes)}
        calls = [node for node in program.graph.nodes if node.op == "call_function" and node not in self.sizes | self.silent]
        alive = {program.output, *(node for node in calls if writes(node))}
        for node in reversed(program.graph.nodes):
            if node in alive:
                alive.update(node.all_input_nodes)
        self.steps = [node for node in calls if node in alive or _draws(node)]

    @cached_property
    def effects(self) -> set[fx.Node]:
        """The nodes whose order among each other counts: those that draw random numbers or write memory."""
        return {node for node in self.steps if _draws(node) or writes(node)}

    @cached_property
    def order(self) -> list[tuple[fx.Node, fx.Node]]:
        """Pairs of nodes of which the second must run after the first, beyond what it reads."""
        chain = sorted(self.effects, key=self.index.__getitem__)
        pairs = list(pairwise(chain))
        writers = [(node, set().union(*map(self.memory, writes(node)))) for node in chain if writes(node)]
        if not writers:
            return pairs
        for node in self.steps:
            touched = set[Hashable]().union(*map(self.memory, node.all_input_nodes))
            for writer, written in writers:
                if writer is not node and touched & written:
                    pairs.append((node, writer) if self.index[node] < self.index[writer] else (writer, node))
        return pairs

    def memory(self, node: fx.Node) -> set[Hashable]:
        """What the memory of a value may be shared with: weights by storage."""
        weights = self.program.weights
        return {
            ("weight", weights.storage(str(x.target))) if x.op == "get_attr" and x.target in weights else x for x in roots(node)
        }

    @cached_property
    def ordered(self) -> set[fx.Node]:
        """The nodes that must stay where they are among those that write."""
        return {node for pair in self.order for node in pair}


def _is_size(node: fx.Node) -> bool:
    """Whether a call computes with sizes and flags alone; it is spelled where it is needed."""
    if node.target is torch.ops.aten.sym_size.int:
        return True
    if isinstance(node.target, torch._ops.OpOverload) or not isinstance(
        node.meta.get("val"), (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    ):
        return False
    return all(x.op == "get_attr" or _is_size(x) for x in node.all_input_nodes)


def _draws(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = arguments(node)
    return given.get("train", given.get("training", True)) is not False and given.get("dropout_p", 1) != 0.0


def nested(graph: Graph, dissolved: set[str]) -> Call:
    """The calls of a program. The paths in ``dissolved`` are no calls; those that cannot be one are added to it."""
    while True:
        root, owner = _assigned(graph, dissolved)
        found = _cyclic(graph, root, owner)
        if not found:
            return root
        dissolved.update(found)


# -- who owns a node -------------------------------------------------------------------------------------------


def _assigned(graph: Graph, dissolved: set[str]) -> tuple[Call, dict[fx.Node, Call]]:
    root = Call("", _root_kind(graph))
    made: dict[tuple[str, ...], Call] = {(): root}
    owner = dict[fx.Node, Call]()
    for node in graph.steps:
        layer = graph.layers.get(node)
        chain: tuple[str, ...] = ()
        for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
            path = str(path)
            if not path or path in dissolved or (layer is not None and not layer.path.startswith(f"{path}.")):
                continue
            parent = made[chain]
            chain = (*chain, str(key))
            if chain not in made:
                made[chain] = Call(path, _name(kind), parent)
        owner[node] = made[chain]
    _place(graph, owner, root)
    return root, owner


def _root_kind(graph: Graph) -> str:
    for node in graph.steps:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if not path and not _name(kind).startswith(("tautomer.", "torch.fx.", "torch.export.")):
                return _name(kind)
    return graph.program.name


def _name(kind: object) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def _place(graph: Graph, owner: dict[fx.Node, Call], root: Call) -> None:
    """Move what has a better place: members to their tuple, new nodes to their readers, what others share to all of them."""
    for node in graph.steps:
        if len(node.all_input_nodes) == 1 and node.target is operator.getitem and node.all_input_nodes[0] in owner:
            owner[node] = owner[node.all_input_nodes[0]]
    for node in reversed(graph.steps):
        readers = [owner[user] for user in node.users if user in owner]
        if not node.meta.get("nn_module_stack") and node not in graph.layers and len(readers) == len(node.users) and readers:
            owner[node] = _common(readers)
    for node in graph.steps:
        call = owner[node]
        if call.parent is not None and node.target in _VIEWS and _first(graph, node, owner, call):
            owner[node] = call.parent
    for node in graph.steps:
        if node in graph.ordered or any(user.target is operator.getitem for user in node.users):
            continue
        readers = [owner.get(user, root) for user in node.users]
        wanted = _common([owner[node], *readers])
        known = all(_common([owner[x], owner[node]]) in wanted.above for x in _operands(graph, node) if x in owner)
        if wanted is not owner[node] and known and not graph.layers.get(node) and not _reads_own(node, owner[node]):
            owner[node] = wanted


_VIEWS = {torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default}


def _first(graph: Graph, node: fx.Node, owner: dict[fx.Node, Call], call: Call) -> bool:
    """Whether a view of its input is what a module without submodules begins with: its caller may as well hand it in."""
    x = node.args[0]
    outside = isinstance(x, fx.Node) and x in owner and owner[x] is not call and any(c is call.parent for c in owner[x].above)
    alone = not any(other is not call and call in other.above for other in set(owner.values()))
    return outside and alone and not any(owner.get(user) is call for user in x.users if user is not node)  # type: ignore[union-attr]


def _reads_own(node: fx.Node, call: Call) -> bool:
    """Whether a node reads a weight of the module that runs it."""
    return any(x.op == "get_attr" and str(x.target).startswith(f"{call.path}.") for x in node.all_input_nodes)


def _operands(graph: Graph, node: fx.Node) -> Iterator[fx.Node]:
    """The values that a node needs; of what a silent part of it needs too."""
    if node in graph.layers:
        yield graph.layers[node].operand
        return
    stack = list(node.all_input_nodes)
    while stack:
        x = stack.pop()
        if x in graph.sizes:
            stack.extend(x.all_input_nodes)
        else:
            yield x


def _common(calls: Iterable[Call]) -> Call:
    first, *rest = calls
    for call in first.above:
        if all(call in other.above for other in rest):
            return call
    raise AssertionError("calls of two programs")


# -- the order in a call ---------------------------------------------------------------------------------------


def _cyclic(graph: Graph, root: Call, owner: dict[fx.Node, Call]) -> set[str]:
    """Put the items of every call in order; the paths of modules that must be dissolved for it."""
    inside: dict[Call, set[fx.Node | Call]] = {}
    edges: dict[Call, set[tuple[fx.Node | Call, fx.Node | Call]]] = {}
    first: dict[fx.Node | Call, int] = {}
    above = {call: list(call.above) for call in {*owner.values(), root}}
    for node, call in owner.items():
        item: fx.Node | Call = node
        for outer in above[call]:
            inside.setdefault(outer, set()).add(item)
            first[item] = min(first.get(item, graph.index[node]), graph.index[node])
            item = outer

    def join(before: fx.Node, after: fx.Node) -> None:
        a, b = list(reversed(above[owner[before]])), list(reversed(above[owner[after]]))
        depth = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x is not y), min(len(a), len(b)))
        left = a[depth] if depth < len(a) else before
        right = b[depth] if depth < len(b) else after
        if left is not right:
            edges.setdefault(a[depth - 1], set()).add((left, right))

    for node in graph.steps:
        for x in _operands(graph, node):
            if x in owner:
                join(x, node)
    for before, after in graph.order:
        if before in owner and after in owner:
            join(before, after)
    found = set[str]()
    for call, items in inside.items():
        digraph = networkx.DiGraph()
        digraph.add_nodes_from(items)
        digraph.add_edges_from(edges.get(call, ()))
        for component in networkx.strongly_connected_components(digraph):
            members = [x for x in component if isinstance(x, Call)]
            if len(component) > 1:
                found.add(min(members, key=lambda c: (len(list(inside.get(c, ()))), c.path)).path)
        if not found:
            call.items = _sorted(digraph, first)
    return found


def _sorted(digraph: networkx.DiGraph, first: dict[fx.Node | Call, int]) -> list[fx.Node | Call]:
    """A topological order that keeps to the graph's."""
    waiting = {item: digraph.in_degree(item) for item in digraph}
    ready = [(first[item], item) for item, count in waiting.items() if count == 0]
    heap = [(index, id(item), item) for index, item in ready]
    heapq.heapify(heap)
    order = list[fx.Node | Call]()
    while heap:
        _, _, item = heapq.heappop(heap)
        order.append(item)
        for reader in digraph.successors(item):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(heap, (first[reader], id(reader), reader))
    return order
