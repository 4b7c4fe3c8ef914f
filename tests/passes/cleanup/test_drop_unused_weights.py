"""Consumed weights go; what the user has and nothing consumed stays."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.passes.cleanup.drop_unused_weights import DropUnusedWeights
from tautomer.passes.cleanup.name_weights import NameWeights
from tautomer.passes.norm.fold_into_writer import FoldIntoWriter
from tautomer.rewrite.capture import capture
from tautomer.rewrite.pass_base import Context


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.other.weight = self.linear.weight
        self.s = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.linear(x) * self.s + self.other.weight[0]


def test_consumed_weights_leave_and_the_edited_one_takes_the_name(program_of, run):
    program = program_of()
    FoldIntoWriter().run(program, Context())
    assert {"linear.weight_1", "linear.bias_1"} <= set(program.weights)
    log = run(program, DropUnusedWeights(), NameWeights())
    assert list(program.weights) == ["unused", "linear.weight", "linear.bias"]
    assert program.weights["linear.weight"].edited
    assert {node.target for node in program.graph.find_nodes(op="get_attr")} == {"linear.weight", "linear.bias"}
    assert "linear.weight" in log.applications[0].note


def test_a_weight_that_nothing_ever_read_stays(program_of, run):
    program = program_of()
    run(program, DropUnusedWeights())
    assert "unused" in program.weights


def test_a_tied_name_stays_while_its_storage_is_read(run):
    program = capture(Tied(), (torch.randn(3, 5, 4),))
    FoldIntoWriter().run(program, Context())
    run(program, DropUnusedWeights(), NameWeights())
    assert {"linear.weight", "other.weight"} <= set(program.weights)


def test_the_counter_of_a_folded_norm_goes_with_it(run):
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), (torch.randn(3, 4),))
    assert "1.num_batches_tracked" in program.weights
    FoldIntoWriter().run(program, Context())
    run(program, DropUnusedWeights(), NameWeights())
    assert list(program.weights) == ["0.weight", "0.bias"]
