"""The rules of onnxscript's optimizer in time linear in the graph.

A rule with several outputs looks through the whole graph for the others before it looks at the node it was called on; with one
such rule (two slices that are a split), optimizing n nodes takes n². Inside ``node_first`` it looks at the node first: where it
would not have matched it says so at once, and every other match is what it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher


@contextlib.contextmanager
def node_first() -> Iterator[None]:
    """See the module."""
    match = SimplePatternMatcher.match

    def quick(self: SimplePatternMatcher, model: Any, graph: Any, node: Any, **options: Any) -> MatchResult:
        pattern = self.pattern
        if not pattern.has_single_output_node and pattern.output_nodes[0].op_identifier() not in (None, node.op_identifier()):
            return MatchResult().fail("another operator")
        return match(self, model, graph, node, **options)

    SimplePatternMatcher.match = quick  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        SimplePatternMatcher.match = match  # type: ignore[method-assign]
