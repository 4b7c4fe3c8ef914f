"""In-place calls become functional where nothing else sees the memory; what stays is marked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.weights import opaque


class Runs(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x):
        return self.function(self, x)


def shift_then_read(m, x):
    y = x * 2
    y.add_(1)
    return y.relu()


def chain(m, x):
    return (x + 1).mul_(2).relu_().view(-1).sub_(1)


def view_made_afterwards(m, x):
    y = x * 2
    y.add_(1)
    return y[:, 0]


def write_through_a_view(m, x):
    y = x * 2
    y[:, 0].fill_(7)
    return y


def older_view_read(m, x):
    y = x * 2
    z = y[:, 0]
    y.add_(1)
    return z


def lower_precision(m, x):
    y = (x * 2).half()
    y.add_(x)
    return y


def input_written(m, x):
    x.add_(1)
    return x * 2


def buffer_written(m, x):
    m.state.add_(x.sum(0))
    return x + m.state


def program_of(function):
    torch.manual_seed(0)
    model = Runs(function)
    x = torch.randn(3, 4)
    program = capture(model, (x,))
    for batch in (1, 3):
        given = torch.randn(batch, 4)
        before = given.clone()
        expected = Runs(function)(given.clone())
        assert torch.equal(interpret(program, [given])[0], expected)
        assert torch.equal(given, before) and torch.equal(model.state, torch.zeros(4))
    return program


def in_place(program):
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [target for target in targets if target._schema.is_mutable]


@pytest.mark.parametrize("function", [shift_then_read, chain, view_made_afterwards])
def test_made_functional(function):
    program = program_of(function)
    assert in_place(program) == [] and not any(map(opaque, program.graph.nodes))


@pytest.mark.parametrize("function", [write_through_a_view, older_view_read, lower_precision, input_written, buffer_written])
def test_left_and_marked(function):
    program = program_of(function)
    assert len(in_place(program)) == 1
    (write,) = [node for node in program.graph.nodes if node.target in in_place(program)]
    assert opaque(write) and opaque(write.args[0])


def test_reads_of_other_memory_are_not_marked():
    program = program_of(buffer_written)
    marked = {node.name for node in program.graph.nodes if opaque(node)}
    assert "state" in marked and "x" not in marked
