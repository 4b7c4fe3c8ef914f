"""Views in a row are one, or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.passes.cleanup.merge_views import MergeViews
from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten


def run(function):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return function(self, x)

    program = capture(Model(), (torch.randn(2, 3, 24),))
    before = interpret(program, program.example)
    MergeViews().run(program, Context())
    assert all(torch.equal(a, b) for a, b in zip(interpret(program, program.example), before, strict=True))
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


UNDONE = {
    "flatten of unflatten": lambda m, x: x.relu().unflatten(-1, (4, 6)).flatten(-2),
    "reshape of unflatten": lambda m, x: x.relu().unflatten(-1, (4, -1)).reshape(x.shape),
    "flatten of a reshape": lambda m, x: x.relu().reshape(*x.shape[:2], -1, 6).flatten(2),
    "squeeze of unsqueeze": lambda m, x: x.relu().unsqueeze(1).squeeze(1),
    "three": lambda m, x: x.relu().unsqueeze(0).unflatten(-1, (4, 6)).reshape(x.shape),
}


@pytest.mark.parametrize("name", UNDONE)
def test_what_is_undone_goes(name):
    calls = run(lambda m, x: UNDONE[name](m, x).exp())
    assert [call for call in calls if call is not aten.sym_size.int] == [aten.relu.default, aten.exp.default]


def test_a_reshape_reads_what_was_viewed():
    calls = run(lambda m, x: x.relu().unflatten(-1, (4, 6)).reshape(-1, 6).exp())
    assert calls == [aten.relu.default, aten.reshape.default, aten.exp.default]


def test_other_views_stay():
    calls = run(lambda m, x: x.relu().unflatten(-1, (4, 6)).flatten(1, 2).exp())
    assert calls == [aten.relu.default, aten.unflatten.int, aten.flatten.using_ints, aten.exp.default]


def test_another_reader_keeps_its_view():
    calls = run(lambda m, x: ((y := x.relu().unflatten(-1, (4, 6))).exp(), y.flatten(-2).exp()))
    assert calls.count(aten.unflatten.int) == 1 and aten.flatten.using_ints not in calls


def test_a_transposition_between_them_stays():
    calls = run(lambda m, x: x.relu().unflatten(-1, (4, 6)).transpose(-1, -2).flatten(-2).exp())
    assert calls.count(aten.transpose.int) == 1 and calls.count(aten.flatten.using_ints) == 1


def test_weights_are_left_alone():
    assert run(lambda m, x: x + m.w.flatten().unflatten(0, (4, 6)).flatten())[-2:] == [aten.flatten.using_ints, aten.add.Tensor]
