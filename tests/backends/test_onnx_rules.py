"""Rules with several outputs look at the node first, and match what they matched."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import pytest
from onnx import parser
from onnxscript.rewriter._matcher import SimplePatternMatcher

from tautomer.backends.onnx_rules import node_first

HALVES = """
<ir_version: 10, opset_import: ["" : 20]>
rotated (float[n, 8] x) => (float[n, 8] y) <
    int64[1] zero = {0}, int64[1] half = {4}, int64[1] all = {8}, int64[1] last = {1}
> {
    a = Slice(x, zero, half, last)
    b = Slice(x, half, all, last)
    c = Neg(b)
    y = Concat<axis = 1>(c, a)
}
"""


def model() -> ir.Model:
    return ir.from_proto(parser.parse_model(HALVES))


def several() -> list[Any]:
    """The rules that are written with more than one output."""
    return [rule for rule in onnxscript.rewriter._DEFAULT_REWRITE_RULES if not rule._target_pattern.has_single_output_node]


def test_what_matched_still_does_and_the_optimizer_leaves_the_same() -> None:
    plain, quick = model(), model()
    onnxscript.optimizer.optimize(plain)
    with node_first():
        found = [bool(several()[0]._matcher.match(quick, quick.graph, node)) for node in quick.graph]
        onnxscript.optimizer.optimize(quick)
    assert found == [True, True, False, False]
    assert ir.to_proto(plain).SerializeToString() == ir.to_proto(quick).SerializeToString()


def test_a_node_of_another_operator_is_not_looked_for_in_the_whole_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert several(), "there is no such rule any more, and no need of node_first"
    given = model()
    visited = list[Any]()
    monkeypatch.setattr(ir.Graph, "__iter__", lambda self: iter(visited.append(self) or self._nodes))
    negation = given.graph.node(2)
    before = SimplePatternMatcher.match
    for looks, inside in ((1, False), (0, True)):
        visited.clear()
        with node_first() if inside else pytest.MonkeyPatch.context():
            assert not several()[0]._matcher.match(given, given.graph, negation)
        assert bool(visited) == bool(looks)
    assert SimplePatternMatcher.match is before
