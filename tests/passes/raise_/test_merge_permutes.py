"""Two permutations in a row are one, or none."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tautomer.passes.raise_.merge_permutes import MergePermutes
from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten


def run(function):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 5))

        def forward(self, x):
            return function(self, x)

    program, context = capture(Model(), (torch.randn(2, 3, 4),)), Context()
    before = interpret(program, program.example)
    MergePermutes().run(program, context)
    assert all(torch.equal(a, b) for a, b in zip(interpret(program, program.example), before, strict=True))
    return [node.target for node in program.graph.nodes if node.op == "call_function"], context.log


@pytest.mark.parametrize(("p", "q"), list(itertools.product([(1, 2, 0), (0, 2, 1), (2, 1, 0)], repeat=2)))
def test_every_pair(p, q):
    calls, log = run(lambda m, x: x.relu().permute(p).permute(q).exp())
    product = [p[axis] for axis in q]
    moved = sum(axis != source for axis, source in enumerate(product))
    expected = {0: [], 2: [aten.transpose.int], 3: [aten.permute.default]}[moved]
    assert calls == [aten.relu.default, *expected, aten.exp.default]
    assert len(log.applications) == 1


def test_a_transposition_is_a_permutation():
    calls, _ = run(lambda m, x: x.relu().permute(1, 0, 2).transpose(-2, -3) * 2)
    assert calls == [aten.relu.default, aten.mul.Tensor]


def test_another_reader_keeps_its_view():
    calls, log = run(lambda m, x: ((y := x.relu().transpose(0, 1)).exp(), y.transpose(0, 1).exp()))
    assert calls.count(aten.transpose.int) == 1
    assert len(log.applications) == 1


def test_weights_are_left_alone():
    _, log = run(lambda m, x: x * m.w.transpose(0, 1).transpose(0, 1)[:, 0])
    assert not log.applications
