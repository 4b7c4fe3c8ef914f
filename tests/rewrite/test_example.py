"""The example at other sizes, and when a program agrees with the model."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.example import agrees, call_of, resized, trials_of


class Adds(nn.Module):
    def forward(self, ids, mask, table):
        return ids * mask + table.sum()


def example():
    return call_of(Adds(), (torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7), torch.ones(5)), {}, resolve=True)


def test_batch_and_length():
    call = example()
    assert (call.batch, call.length, call.names) == (2, 7, ("ids", "mask", "table"))
    assert [tuple(leaf.shape) for leaf in resized(call, batch=3, length=6)] == [(3, 6), (3, 6), (5,)]


def test_trials_are_calls_the_model_accepts():
    assert [tuple(trial.leaves[0].shape) for trial in trials_of(example(), None)] == [(2, 7), (1, 7), (3, 6)]
    fixed = call_of(nn.BatchNorm1d(4), (torch.randn(2, 4),), {}, resolve=False)
    assert [tuple(trial.leaves[0].shape) for trial in trials_of(fixed, True)] == [(2, 4), (3, 4)]


def test_agreement():
    call = example()
    program = capture(Adds(), call.args)
    trials = trials_of(call, None)
    assert [agrees(program, trial) for trial in trials] == [True, True, True]
    (mul,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    mul.target = torch.ops.aten.sub.Tensor
    assert [agrees(program, trial) for trial in trials] == [False, False, False]
    fixed = capture(Adds(), call.args, dynamic_shapes=None)
    assert [agrees(fixed, trial) for trial in trials] == [True, None, None]
