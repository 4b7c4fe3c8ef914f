"""An export becomes a program: the user's names, one spelling of every call, provenance kept."""

from __future__ import annotations

import keyword

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import CaptureError
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.program import arguments, path_of, source_of

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x, other=None):
        return torch.nn.functional.layer_norm(input=self.block(x), normalized_shape=[4], weight=None, eps=1e-5) + other


def test_names_paths_and_sources():
    program = capture(Net(), (torch.randn(2, 4),), {"other": torch.randn(2, 4)})
    assert [node.name for node in program.placeholders] == ["x", "other"]
    assert set(program.weights) == {"block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias"}
    (linear,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert path_of(linear) == "block.0" and linear.args[1].target == "block.0.weight"
    assert [path_of(n) for n in program.graph.find_nodes(op="call_function", target=aten.layer_norm.default)] == ["block.1", ""]
    assert str(source_of(linear)).endswith("normalized_shape=[4], weight=None, eps=1e-5) + other")
    assert all("val" in node.meta for node in program.graph.nodes if node.op != "output")


def test_the_source_of_a_model_of_torchs_modules_alone_is_theirs_and_not_the_line_that_exports():
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.GELU()), (torch.randn(2, 4),))
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        assert "linear.py" in str(source_of(node)) and "F.linear(" in str(source_of(node))


def test_every_input_has_a_name_of_its_own():
    class Names(nn.Module):
        def forward(self, self_, X, x, named, named_a, *rest, **more):
            return self_ + X * 2 + x * 3 + named["a"] * 4 + named_a * 5 + rest[0] * 6 + more["class"] * 7

    xs = [torch.randn(2, 4) for _ in range(7)]
    program = capture(Names(), (*xs[:3], {"a": xs[3]}, *xs[4:6]), {"class": xs[6]})
    names = [node.target for node in program.placeholders]
    assert len(set(names)) == 7 and "self" not in names and all(name.isidentifier() for name in names)
    assert names == [node.name for node in program.placeholders]
    assert names[0] == "self_" and not any(map(keyword.iskeyword, names))


def test_arguments_stand_by_position_and_defaults_are_left_out():
    program = capture(Net(), (torch.randn(2, 4),), {"other": torch.randn(2, 4)})
    first, second = program.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert first.args[1:] == ([4], *first.args[2:4]) and not first.kwargs
    assert second.args == (second.args[0], [4]) and not second.kwargs
    assert arguments(second)["eps"] == 1e-5 and arguments(second)["weight"] is None


def test_an_autocast_region_stays_one_node():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.linear(x)
            return y.float()

    model = Casts()
    program = capture(model, (torch.randn(2, 4),))
    assert len(program.regions) == 1 and program.count(aten.linear.default) == 0
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(interpret(program, [x])[0], model(x))


def test_what_an_autocast_region_writes_is_a_copy():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.norm(x)

    model = Casts()
    program = capture(model, (torch.randn(4, 4),), mode="train")
    interpret(program, [torch.randn(5, 4)])
    assert len(program.regions) == 1 and torch.equal(model.norm.running_mean, torch.zeros(4))


def test_gradients_switched_twice():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(3))

        def forward(self, x):
            with torch.no_grad():
                y = x * self.a
                with torch.enable_grad():
                    z = y * self.a
            return z + y

    model = Nested()
    program = capture(model, (torch.randn(2, 3),))
    x = torch.randn(4, 3)
    interpret(program, [x])[0].sum().backward()
    mine, model.a.grad = model.a.grad, None
    model(x).sum().backward()
    assert torch.equal(mine, model.a.grad)


def test_checks_of_the_exporter_are_dropped():
    class Casts(nn.Module):
        def forward(self, x):
            return x.to(torch.float32) * 2

    program = capture(Casts(), (torch.randn(2, 4),))
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.mul.Tensor"]


def test_a_forward_that_returns_other_tensors_when_it_is_captured_is_refused():
    class Grows(nn.Module):
        def forward(self, x):
            return (x + 1, x + 2) if torch.compiler.is_exporting() else (x + 1,)

    with pytest.raises(CaptureError, match="Grows returns 1 tensors, 2 when it is captured"):
        capture(Grows(), (torch.randn(2, 4),))
