"""A graph of torch.compile as a program: weights by name, sizes from tensors, nothing that may change known by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautomer.rewrite.errors import Refused
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.lifted import Lifted, lift
from tautomer.rewrite.program import path_of, source_of


class Net(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers[0].requires_grad_(False)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        with torch.no_grad():
            shift = self.layers[1].weight.sum() * 2
        for layer in self.layers:
            x = layer(x) * self.scale + torch.tensor(0.5)
        return x.view(x.shape[0] * x.shape[1], -1) + shift, x.shape[1]


def lifted(model: Callable[..., Any], *args: Any, dynamic: bool = False) -> list[Lifted]:
    found: list[Lifted] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        before = graph_module.code
        found.append(lift(graph_module, inputs))
        assert graph_module.code == before
        return graph_module.forward

    torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    return found


X = torch.randn(2, 3, 4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_have_the_names_and_nodes_the_places_of_the_model(dynamic: bool) -> None:
    model = Net()
    (found,) = lifted(model, X, dynamic=dynamic)
    program = found.program
    named = {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "scale"}
    assert named < set(program.weights) and named == set(found.weights) and len(found.inputs) == 1 and program.weights.live
    assert all(program.weights[name].requires_grad for name in named)  # the next call may bring other values, frozen or not
    constants = [program.weights[name] for name in set(program.weights) - named]
    assert len(constants) == 2 and not any(weight.requires_grad or weight.kind != "constant" for weight in constants)
    linears = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [path_of(node) for node in linears] == ["layers.0", "layers.1"]
    assert "test_lifted.py" in (source_of(linears[0]) or "")
    assert [node.target for node in program.placeholders] == ["x"]
    torch.testing.assert_close(interpret(program, (X,))[0], model(X)[0])


def test_sizes_are_read_from_tensors_and_other_numbers_stay_inputs() -> None:
    def scaled(x: Tensor, n: int) -> Tensor:
        return x * n + x.shape[0]

    found = lifted(scaled, torch.randn(5, 4), 7, dynamic=True)[0]
    values = [node.meta["val"] for node in found.program.placeholders]
    assert sorted(type(value).__name__ for value in values) == ["FakeTensor", "SymInt"]


def test_refusals() -> None:
    def refused(model: Callable[..., Any], *args: Any, around: Any = torch.enable_grad) -> str:
        with around(), pytest.raises(Exception) as caught:
            lifted(model, *args)
        assert "Refused" in str(caught.value)
        return str(caught.value)

    checkpointed = lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)  # noqa: E731
    assert "which hides a graph" in refused(checkpointed, X)

    def enables(x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.sin()
        return y * 2

    assert "enables gradients" in refused(enables, X, around=torch.no_grad)
    assert Refused is not None
