"""Equal pure calls become one; what only looks equal, draws numbers, is written or is returned does not."""

from __future__ import annotations

import torch

from tautomer.passes.cleanup.merge_equal_expressions import MergeEqualExpressions
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten


def test_equal_calls_are_merged_transitively(program_of, run):
    program = program_of(lambda m, x: (x.tanh() + 1).exp() + (x.tanh() + 1).exp())
    assert len(run(program, MergeEqualExpressions()).applications) == 3
    assert (program.count(aten.tanh.default), program.count(aten.exp.default)) == (1, 1)


def test_calls_that_only_look_equal_stay(program_of, run):
    program = program_of(lambda m, x: (x * 2, x * 2.0, x * 3, x.mean(-1), x.mean(1)))
    assert not run(program, MergeEqualExpressions()).applications


def test_random_numbers_are_drawn_twice(program_of, run):
    program = program_of(lambda m, x: torch.rand_like(x).sign() + torch.rand_like(x).sign())
    context = Context()
    MergeEqualExpressions().run(program, context)
    assert not context.log.applications


def test_two_results_stay_two_tensors(program_of, run):
    program = program_of(lambda m, x: (x.tanh(), x.tanh()))
    assert not run(program, MergeEqualExpressions()).applications


def test_written_memory_is_not_merged(program_of, run):
    program = program_of(lambda m, x: x.tanh() + x.tanh())
    for node in program.graph.find_nodes(op="call_function", target=aten.tanh.default):
        node.meta["tautomer_mutated"] = True
    assert not run(program, MergeEqualExpressions()).applications
