"""Which rewrites to apply together, when they depend on each other: the most profitable closed selection.

    maximise   sum of rewards of chosen items  -  sum of costs of (a chosen, b not)
    subject to a chosen  =>  b chosen                     for every implication

This is project selection; its optimum is a minimum cut (Picard 1976), solved by networkx.
"""

from __future__ import annotations

from collections.abc import Hashable

import networkx

_SOURCE, _SINK = "source", "sink"


class Selection:
    """A selection problem over hashable items.

    Example:
        >>> s = Selection()
        >>> s.reward("norm", 3); s.implies("norm", "writer"); s.price("writer", "edit", 2); s.forbid("edit")
        >>> sorted(s.solve())
        ['norm', 'writer']
    """

    def __init__(self) -> None:
        self._graph = networkx.DiGraph()
        self._graph.add_nodes_from((_SOURCE, _SINK))

    def reward(self, item: Hashable, amount: int) -> None:
        """Choosing ``item`` gains ``amount``."""
        self._edge(_SOURCE, item, amount)

    def price(self, item: Hashable, unless: Hashable, amount: int) -> None:
        """Choosing ``item`` costs ``amount`` unless ``unless`` is chosen too."""
        self._edge(item, unless, amount)

    def implies(self, item: Hashable, other: Hashable) -> None:
        """``item`` can only be chosen together with ``other``."""
        self._graph.add_edge(item, other)  # networkx reads a missing capacity as infinite

    def forbid(self, item: Hashable) -> None:
        """``item`` cannot be chosen."""
        self._graph.add_edge(item, _SINK)

    def solve(self) -> set[Hashable]:
        """The chosen items of the smallest optimal selection: what gains nothing is left alone."""
        residual = networkx.algorithms.flow.boykov_kolmogorov(self._graph, _SOURCE, _SINK)
        infinite = residual.graph["inf"]
        open_edges = (
            (tail, head)
            for tail, head, edge in residual.edges(data=True)
            if edge["flow"] < edge["capacity"] or edge["capacity"] >= infinite
        )
        reachable = networkx.DiGraph(open_edges)
        reachable.add_node(_SOURCE)
        return set(networkx.descendants(reachable, _SOURCE))

    def _edge(self, tail: Hashable, head: Hashable, amount: int) -> None:
        if self._graph.has_edge(tail, head):
            if "capacity" in self._graph[tail][head]:
                self._graph[tail][head]["capacity"] += amount
            return
        self._graph.add_edge(tail, head, capacity=amount)
