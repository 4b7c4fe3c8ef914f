"""Emission: nodes where something runs, weights where nothing does, nothing left after a rollback."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.metadata import Derived

aten = torch.ops.aten


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.down(self.up(x))


class Transposed(nn.Module):
    """A weight stored [in, out], as Hugging Face's Conv1D stores it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.t())


def last_linear(program):
    return program.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]


def test_a_call_on_a_runtime_value_is_a_node_with_metadata_and_provenance():
    program = capture(Tiny(), (torch.randn(3, 4),))
    anchor = last_linear(program)
    op = GraphOps(program, anchor)
    node = op.relu(anchor.args[0])
    assert node.next is anchor
    assert node.name == "relu"
    assert tuple(node.meta["val"].shape)[1:] == (6,)
    assert node.meta["nn_module_stack"] == anchor.meta["nn_module_stack"]


def test_a_call_on_weights_alone_is_a_weight():
    program = capture(Tiny(), (torch.randn(3, 4),))
    anchor, nodes = last_linear(program), len(program.graph.nodes)
    op = GraphOps(program, anchor)
    W = anchor.args[1]
    centred = op.sub(W, op.mean(W, [0], True))
    assert isinstance(centred, Derived)
    assert len(program.graph.nodes) == nodes
    new = op.linear(anchor.args[0], centred)
    assert new.args[1].op == "get_attr"
    assert new.args[1].target == "down.weight_1"
    assert program.weights["down.weight_1"].requires_grad
    expected = program.weights.leaves["down.weight"].double()
    torch.testing.assert_close(program.weights.value("down.weight_1", torch.float64), expected - expected.mean(0, keepdim=True))


def test_a_new_weight_is_named_after_the_argument_it_serves():
    program = capture(Tiny(), (torch.randn(3, 4),))
    anchor = last_linear(program)
    op = GraphOps(program, anchor)
    W = anchor.args[1]
    new = op.linear(anchor.args[0], W, op.mean(W, [1]))
    assert new.args[2].target == "down.bias"
    again = op.linear(anchor.args[0], W, op.mean(W, [1]))
    assert again.args[2] is new.args[2], "one expression is one weight"


def test_a_weight_stored_transposed_stays_so():
    program = capture(Transposed(), (torch.randn(3, 4),))
    anchor = last_linear(program)
    op = GraphOps(program, anchor)
    new = op.linear(anchor.args[0], op.mul(anchor.args[1], 2.0))
    assert new.args[1].target is aten.t.default
    assert tuple(program.weights["weight_1"].meta.shape) == (4, 6)
    before = interpret(program, program.example, dtype=torch.float64)
    anchor.replace_all_uses_with(new)
    torch.testing.assert_close(interpret(program, program.example, dtype=torch.float64)[0], 2 * before[0])


def test_rollback_leaves_nothing():
    program = capture(Tiny(), (torch.randn(3, 4),))
    before, names = str(program), list(program.weights)
    op = GraphOps(program, last_linear(program))
    W = last_linear(program).args[1]
    op.relu(op.linear(last_linear(program).args[0], op.mul(W, W)))
    assert op.created and op.staged
    op.rollback()
    assert (str(program), list(program.weights)) == (before, names)
    program.graph.lint()


def test_a_weight_that_the_graph_writes_is_no_constant():
    program = capture(Tiny(), (torch.randn(3, 4),))
    editor, W = Editor(program), last_linear(program).args[1]
    assert editor.constant(W)
    W.meta["tautomer_mutated"] = True
    assert not Editor(program).constant(W)


def test_an_expression_deeper_than_the_stack_is_no_problem():
    class Deep(nn.Module):
        def forward(self, x):
            for _ in range(1500):
                x = x + 1.0
            return x

    program = capture(Deep(), (torch.randn(3, 4),))
    assert program.expression(program.output.args[0][0]) is None
    assert Editor(program).expression(program.output.args[0][0]) is None


def test_the_readers_of_a_leaf_are_found_under_all_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(x).tanh()

    program = capture(Tied(), (torch.randn(3, 4),))
    editor = Editor(program)
    assert [reader.name for reader in editor.readers("a.weight")] == ["linear", "linear_1"]
    tanh = program.graph.find_nodes(op="call_function", target=aten.tanh.default)[0]
    new = editor.before(tanh).linear(tanh.args[0], editor.attribute("a.weight"))
    assert new in list(editor.readers("a.weight")), "also what is emitted later"
