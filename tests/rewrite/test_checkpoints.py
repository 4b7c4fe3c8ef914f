"""A marked part becomes one call where the program is emitted, if it can be one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tautomer
from tautomer.backends.to_torch import to_torch
from tautomer.rewrite.blocks import Block
from tautomer.rewrite.checkpoints import mark, outlined, parts
from tautomer.rewrite.program import Program

X = torch.randn(3, 4)


class Diamond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x)
        v = torch.tanh(u)
        return self.b(v).view(x.shape[0], -1) * u


def program() -> Program:
    return tautomer.capture(Diamond().train(), (X,))


def named(program: Program, *targets: str) -> Block:
    return Block("part", tuple(n for n in program.graph.nodes if n.op == "call_function" and n.name.startswith(targets)))


def test_a_part_is_one_call_with_what_it_reads_and_returns() -> None:
    captured = program()
    mark(named(captured, "linear", "tanh"))
    assert list(parts(captured.graph)) == ["part from linear"]
    graph, bodies = outlined(captured.graph, {"checkpoint_0"})
    assert list(bodies) == ["checkpoint_1"], "the first name is the model's"
    (call,) = [n for n in graph.nodes if "checkpointed" in n.name]
    assert {str(x) for x in call.all_input_nodes} > {"checkpoint_1", "a_weight", "b_bias"} and len(call.users) == 2
    graph.lint()
    assert str(captured) == str(program()), "the program itself is flat"


def test_what_stands_between_its_calls_comes_before_or_after() -> None:
    captured = program()
    mark(named(captured, "linear_1", "tanh"))
    fast, model = to_torch(captured), Diamond().train()
    fast.load_state_dict(model.state_dict())
    y = fast(X)
    assert torch.equal(y, model(X))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), list(fast.parameters())),
                               torch.autograd.grad(model(X).sum(), list(model.parameters())), rtol=0, atol=0)  # fmt: skip


def test_a_part_that_reads_what_is_computed_from_it_is_none() -> None:
    captured = program()
    mark(named(captured, "linear"))  # both layers, and not the tanh between them
    assert parts(captured.graph) == {}
    assert torch.equal(to_torch(captured)(X), to_torch(program()).requires_grad_()(X)) is False  # other weights
    assert "checkpointed" not in to_torch(captured).code
