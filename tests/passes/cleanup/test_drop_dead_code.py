"""What nothing reads goes; what has an effect stays."""

from __future__ import annotations

import torch

from tautomer.passes.cleanup.drop_dead_code import DropDeadCode
from tautomer.rewrite.emit import GraphOps

aten = torch.ops.aten


def test_dead_calls_go_and_effects_stay(program_of, run):
    program = program_of(lambda m, x: x + 1)
    op = GraphOps(program, program.output)
    op.exp(op.tanh(program.placeholders[0]))
    random = op(aten.rand_like.default)(program.placeholders[0])
    log = run(program, DropDeadCode())
    assert len(log.applications) == 2
    assert random in program.graph.nodes, "what runs after it would draw other numbers"
