"""A layer is timed alone, dense and in factors, in turns; a larger rank takes no less time; break-even is where noise begins."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from tautomer.backends.targets import resolve
from tautomer.rewrite.capture import capture
from tautomer.rewrite.latency import GAIN, ROUNDS, Latency, increasing, latency, likeness, positions
from tautomer.rewrite.layers import Layer, layer_of
from tautomer.rewrite.program import Program
from tautomer.rewrite.samples import example_sizes


class Net(nn.Module):
    """Two alike, one without a bias, a convolution of one tap, and a head that reads one position."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bare = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        self.point, self.head = nn.Conv1d(12, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        y = self.one(x) + self.two(x) + self.bare(x)
        return self.head(self.point(y.transpose(1, 2))[..., 0])


X = torch.randn(3, 5, 8)


@pytest.fixture(scope="module")
def found() -> tuple[Program, list[Layer]]:
    program = capture(Net().eval(), (X,))
    layers = [layer_of(node) for node in program.graph.nodes if node.op == "call_function"]
    return program, [layer for layer in layers if layer is not None]


class Watched:
    """A target that keeps what it compiles, and what each run returned."""

    name, device, multiple = "watched", None, 1

    def __init__(self) -> None:
        self.programs: list[Program] = []
        self.calls: list[int] = []
        self.outputs: dict[int, Any] = {}

    def compile(self, program: Program) -> Any:
        index = len(self.programs)
        self.programs.append(program)
        run = resolve("eager").compile(program)

        def watched(inputs: Any) -> Any:
            self.calls.append(index)
            self.outputs[index] = run(inputs)
            return self.outputs[index]

        return watched


def test_where_layers_are_applied_and_which_are_alike(found):
    program, (one, two, bare, point, head) = found
    sizes = example_sizes(program)
    assert [positions(layer, sizes) for layer in (one, two, bare, point, head)] == [15, 15, 15, 15, 3]
    assert likeness(one, sizes) == likeness(two, sizes)
    assert len({likeness(layer, sizes) for layer in (one, bare, point, head)}) == 4


@pytest.mark.parametrize("index", [0, 2, 3], ids=["linear", "without a bias", "convolution"])
def test_every_form_is_the_layer_alone_and_they_take_turns(found, index):
    program, layers = found
    target, layer = Watched(), layers[index]
    time = latency(layer, [2, 4], example_sizes(program), target)
    assert time.ranks == (2, 4) and time.dense > 0 and 0 < time.times[0] <= time.times[1]
    assert [p.count(layer.node.target) for p in target.programs] == [1, 2, 2]
    counts = [sum(p.weights[name].meta.numel() for name in p.weights) for p in target.programs]
    bias = 12 if index == 0 else 8 if index == 3 else 0
    assert counts == [96 + bias, 2 * 20 + bias, 4 * 20 + bias]
    shape = (3, 8, 5) if index == 3 else (3, 5, 12)
    assert {tuple(y[0].shape) for y in target.outputs.values()} == {shape}
    assert len(target.calls) >= 3 * (ROUNDS + 1) and target.calls == [0, 1, 2] * (len(target.calls) // 3)


def test_between_the_ranks_that_were_measured():
    time = Latency(100.0, (8, 16, 32), (40.0, 60.0, 140.0))
    assert [time(rank) for rank in (4, 8, 12, 24, 32, 99)] == [40.0, 40.0, 50.0, 100.0, 140.0, 140.0] and time(None) == 100.0
    assert time.break_even == 22 and time.gains(22) and not time.gains(23) and GAIN == 0.95
    assert Latency(30.0, (8, 16), (40.0, 60.0)).break_even == 0


def test_a_larger_rank_takes_no_less_time():
    assert increasing([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (2.0, 2.0, 2.0, 4.5, 4.5, 6.0)
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    pooled = increasing(values)
    assert all(a <= b for a, b in pairwise(pooled)) and sum(pooled) == pytest.approx(sum(values))


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_on_a_real_target(found, name):
    program, (one, *_) = found
    time = latency(one, [4], example_sizes(program), resolve(name))
    assert time.dense > 0 and time.times[0] > 0
