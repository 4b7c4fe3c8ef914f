"""A move commutes with a factor per channel, a layer sums over the channels; what is neither has no readers to rewrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.axes import Axes, rank
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.readers import Readers, readers

D = 6


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.W = function, nn.Parameter(torch.randn(4, D, dtype=torch.float64))
        self.E = nn.Parameter(torch.randn(2, D, 5, dtype=torch.float64))
        self.K = nn.Parameter(torch.randn(4, D // 2, 3, dtype=torch.float64))

    def forward(self, x: Tensor, z: Tensor) -> Any:
        return self.function(self, x, z)


X, Z = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64)


def find(function: Callable[..., Any]) -> Readers:
    program = capture(Lambda(function), (X, Z))
    x = program.placeholders[0]
    return readers(Axes(program), x, rank(x) - 1)


MOVES: dict[str, Callable[..., Tensor]] = {
    "neg": lambda m, x, z: -x,
    "scale": lambda m, x, z: 0.3 * x / 2,
    "gate per token": lambda m, x, z: x * z[..., :1],
    "where": lambda m, x, z: torch.where(z[..., :1] > 0, x, 0.0),
    "reshape": lambda m, x, z: x.reshape(-1, 1, D),
    "slice, select, roll, flip": lambda m, x, z: x[:, 1:].roll(1, 1).flip(1)[:, 0],
    "split": lambda m, x, z: x.split([1, 2], 1)[1],
    "sum": lambda m, x, z: x.sum(0),
    "attention over tokens": lambda m, x, z: (z @ z.transpose(1, 2)) @ x,
    "pad": lambda m, x, z: F.pad(x, (0, 0, 2, 1)),
    "cumsum": lambda m, x, z: x.cumsum(1),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_commutes_with_a_gain_per_feature(name: str) -> None:
    program = capture(Lambda(lambda m, x, z: F.linear(MOVES[name](m, x, z), m.W)), (X, Z))
    x = program.placeholders[0]
    found = readers(Axes(program), x, rank(x) - 1)
    assert found.moves and len(found.layers) == 1
    gain = torch.randn(D, dtype=torch.float64)
    before, after = (interpret(program, inputs, dtype=torch.float64)[0] for inputs in ((X, Z), (X * gain, Z)))
    weight = program.weights.leaves["W"].detach()
    program.weights.leaves["W"] = nn.Parameter(weight * gain)
    torch.testing.assert_close(interpret(program, (X, Z), dtype=torch.float64)[0], after, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(before, after)


LAYERS: dict[str, tuple[Callable[..., Tensor], int, int]] = {
    "linear": (lambda m, x, z: F.linear(x, m.W), -1, 1),
    "product": (lambda m, x, z: x @ m.E, -2, 1),
    "product from the left": (lambda m, x, z: m.E.transpose(1, 2) @ x.transpose(1, 2), -1, 1),
    "grouped convolution": (lambda m, x, z: F.conv1d(x.transpose(1, 2), m.K, groups=2), -2, 2),
    "transposed convolution": (lambda m, x, z: F.conv_transpose1d(x.transpose(1, 2), m.E.transpose(0, 1)), -3, 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_says_which_axis_of_its_weight_it_sums_over(name: str) -> None:
    function, axis, groups = LAYERS[name]
    (layer,) = find(function).layers
    assert (layer.kind.reads, layer.groups) == (axis, groups)
    size = layer.weight.meta["val"].shape[axis] * groups
    assert size == layer.bound[layer.kind.x].meta["val"].shape[layer.axis] == layer.inputs == D
    assert layer.outputs in layer.node.meta["val"].shape


NEITHER: dict[str, tuple[Callable[..., Any], str]] = {
    "nonlinearity": (lambda m, x, z: F.linear(x.tanh(), m.W), "aten.tanh"),
    "sum with another": (lambda m, x, z: F.linear(x + z, m.W), "aten.add"),
    "both factors": (lambda m, x, z: F.linear(x * x, m.W), "aten.mul"),
    "gain of the input": (lambda m, x, z: F.linear(x * z, m.W), "aten.mul"),
    "features reordered": (lambda m, x, z: F.linear(x.roll(1, -1), m.W), "aten.roll"),
    "weight of the input": (lambda m, x, z: F.linear(x, z[0]), "aten.linear"),
    "its own weight": (lambda m, x, z: x @ x.transpose(1, 2), "aten.matmul"),
    "one good, one not": (lambda m, x, z: (F.linear(x, m.W), x.relu()), "aten.relu"),
    "returned": (lambda m, x, z: (F.linear(x, m.W), x[0]), "output"),
}


@pytest.mark.parametrize("name", NEITHER)
def test_anything_else_is_named(name: str) -> None:
    function, call = NEITHER[name]
    with pytest.raises(Refused, match=f"{call} at .* reads it, and is no layer"):
        find(function)
