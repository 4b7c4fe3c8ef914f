"""The edited weight takes the name it replaces, if it has that weight's shape."""

from __future__ import annotations

import torch

from tautomer.passes.cleanup.drop_unused_weights import DropUnusedWeights
from tautomer.passes.cleanup.name_weights import NameWeights
from tautomer.rewrite.emit import GraphOps

aten = torch.ops.aten


def test_a_name_of_another_shape_is_not_taken(program_of, run):
    program = program_of()
    op = GraphOps(program, program.output)
    W = program.graph.find_nodes(op="call_function", target=aten.linear.default)[0].args[1]
    mean = op.node(op.mean(W, [0]))
    old = program.output.args[0][0]
    program.output.args = ((op.add(old, op.mul(mean, 0.0)),),)
    run(program, DropUnusedWeights(), NameWeights())
    assert program.weights["linear.weight"].meta.shape == (4, 4)
