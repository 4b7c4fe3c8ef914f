"""A layer may be factored if its weight is one of the table that nobody else reads; every other one says why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tautomer.passes.lowrank.matrices import Matrix, matrix_of
from tautomer.rewrite.capture import capture
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.layers import layer_of
from tautomer.rewrite.program import Program

D = 8


def found(model: nn.Module, x: Tensor) -> tuple[Program, list[Matrix | str]]:
    """The program, and each of its layers or why it is none that may be factored."""
    program, answers = capture(model.eval(), (x,)), list[Matrix | str]()
    editor = Editor(program)
    for node in program.graph.nodes:
        if node.op == "call_function" and (layer := layer_of(node)) is not None:
            try:
                answers.append(matrix_of(layer, editor))
            except Refused as refusal:
                answers.append(str(refusal))
    return program, answers


@pytest.mark.parametrize("make", [lambda: nn.Linear(D, 3), lambda: Conv1D(3, D), lambda: nn.Conv1d(D, 3, 1)])
def test_it_is_the_matrix_that_is_applied(make) -> None:
    model = nn.Sequential(make()).double()
    x = torch.randn(2, D, 5) if isinstance(model[0], nn.Conv1d) else torch.randn(2, 5, D)
    program, (matrix,) = found(model, x.double())
    assert (matrix.m, matrix.n, matrix.name, matrix.bias, matrix.beside) == (3, D, "0.weight", "0.bias", "0.")
    W = model[0].weight.detach()
    assert torch.equal(matrix.value(program), W.T if isinstance(model[0], Conv1D) else W.reshape(3, D))
    assert matrix.x is program.placeholders[0]


def test_weights_that_something_else_reads_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.twice, self.head = nn.Embedding(50, D), nn.Linear(D, D), nn.Linear(D, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.twice(self.twice(self.table(ids)).tanh()))

    _, (first, second, head) = found(Tied(), torch.randint(50, (3, 7)))
    assert first.startswith("'twice.weight' is also read by aten.linear") and second.startswith("'twice.weight' is also read by")
    assert "weight' is also read by aten.embedding" in head and head.endswith("which needs it whole")


def test_computed_weights_are_refused() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(D, D))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.W * x.mean())

    assert found(Computed(), torch.randn(4, D))[1] == ["the weight is computed at run time, or from others: fold-weights first"]


@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 1, "padding": 1},
                                     {"kernel_size": 1, "groups": 2}])  # fmt: skip
def test_convolutions_that_are_no_linear_layers_are_refused(options) -> None:
    _, (reason,) = found(nn.Sequential(nn.Conv2d(D, D, **options)), torch.randn(2, D, 5, 5))
    assert reason == "a convolution is a linear layer only with kernel and stride 1, without groups and padding"
