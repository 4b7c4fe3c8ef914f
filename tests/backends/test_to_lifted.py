"""A rewritten program goes back into the graph of torch.compile it came from, inputs where they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tautomer.backends.to_lifted import to_lifted
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.lifted import lift

X = torch.randn(2, 3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float() + torch.tensor(0.5), x * 2


def test_the_way_there_and_back_keeps_inputs_constants_and_regions() -> None:
    model, seen = Net(), list[fx.GraphModule]()

    def backend(graph_module: fx.GraphModule, inputs: Any) -> Any:
        before = [(node.name, node._dynamo_source.name) for node in graph_module.graph.find_nodes(op="placeholder")]
        to_lifted(lift(graph_module, inputs), graph_module)
        assert before == [(node.name, node._dynamo_source.name) for node in graph_module.graph.find_nodes(op="placeholder")]
        seen.append(graph_module)
        return graph_module.forward

    found = torch.compile(model, backend=backend)(X)
    for a, b in zip(found, model(X), strict=True):
        assert torch.equal(a, b)
    assert len(seen) == 1 and seen[0].graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)


def changed(output: Any) -> Any:
    """Compile a program whose output was replaced by ``output(graph, what it was)``."""

    def backend(graph_module: fx.GraphModule, inputs: Any) -> Any:
        lifted = lift(graph_module, inputs)
        graph = lifted.program.graph
        (last,) = lifted.program.output.args[0]
        with graph.inserting_before(lifted.program.output):
            new = graph.call_function(*output(last))
        with last.meta["val"].fake_mode:
            new.meta["val"] = new.target(last.meta["val"], *new.args[1:])
        lifted.program.output.args = ((new,),)
        to_lifted(lifted, graph_module)
        return graph_module.forward

    return backend


def twice(x: Tensor) -> Tensor:
    return x * 2


def test_an_output_keeps_its_strides_and_another_shape_is_refused() -> None:
    aten = torch.ops.aten
    square = torch.randn(3, 3)
    flipped = torch.compile(twice, backend=changed(lambda y: (aten.transpose.int, (y, 0, 1))))(square)
    assert torch.equal(flipped, 2 * square.T) and flipped.is_contiguous()
    torch.compiler.reset()
    with pytest.raises(Exception, match="another shape or dtype") as caught:
        torch.compile(twice, backend=changed(lambda y: (aten.unsqueeze.default, (y, 0))))(square)
    assert "Refused" in str(caught.value) and issubclass(Refused, Exception)
    torch.compiler.reset()
    with pytest.raises(Exception, match="other strides"):
        torch.compile(twice, backend=changed(lambda y: (aten.contiguous.default, (y,))))(square.T)
