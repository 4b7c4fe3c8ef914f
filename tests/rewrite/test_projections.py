"""What a value is a part of, however it was cut out, and what is a projection of the same tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.projections import origin, projected

B, H, D = 2, 3, 4
N = H * D


class Fused(nn.Module):
    def __init__(self, split, outputs=3 * N):
        super().__init__()
        self.qkv, self.other, self.split = nn.Linear(N, outputs), nn.Linear(N, N), split

    def forward(self, x):
        return self.split(self, self.qkv(x))


def outputs(split, features=3 * N):
    program = capture(Fused(split, features).eval(), (torch.randn(B, 5, N),))
    return program.output.args[0]


def heads(x):
    return x.unflatten(-1, (H, D)).transpose(1, 2)


ONE_BY_ONE = {
    "gpt2": lambda m, y: tuple(heads(x) for x in y.split(N, dim=2)),
    "chunk": lambda m, y: y.chunk(3, -1),
    "timm": lambda m, y: y.reshape(y.shape[0], y.shape[1], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0),
    "slices": lambda m, y: (y[..., :N], y[..., N : 2 * N], y[..., 2 * N :]),
    "select": lambda m, y: tuple(y.unflatten(-1, (3, N)).select(2, i) for i in range(3)),
}


@pytest.mark.parametrize("split", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_parts_of_one_layer_have_one_origin(split):
    parts = outputs(split)
    (layer,) = {origin(x) for x in parts}
    assert layer.target is torch.ops.aten.linear.default and projected(*parts[:2])


def test_a_value_that_was_computed_is_no_view():
    q, *_ = outputs(lambda m, y: (y.chunk(3, -1)[0].tanh(), y))
    assert origin(q).target is torch.ops.aten.tanh.default


def test_projections_of_one_tensor_are_told_from_others():
    x, y, z = outputs(lambda m, y: (m.other(y[..., :N]), m.qkv(y[..., :N]).chunk(3, -1)[0], m.other(y[..., :N].tanh())))
    assert projected(x, y) and not projected(x, z)
