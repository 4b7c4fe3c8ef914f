"""Which linear layers are a feedforward layer: with an activation or gate, gate and up in one product, back to the width."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautomer.rewrite.capture import capture
from tautomer.rewrite.feedforward import feedforward_layers

D, W = 8, 12


class Function(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.up, self.gate, self.both = nn.Linear(D, W), nn.Linear(D, W, bias=False), nn.Linear(D, 2 * W)
        self.down, self.out, self.scale = nn.Linear(W, D), nn.Linear(W, 5), nn.Parameter(torch.ones(W))
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def packed(m, x):
    gate, up = m.both(x).chunk(2, -1)
    return m.down(F.dropout(F.silu(gate) * up, 0.1, m.training))


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3))))


@pytest.mark.parametrize(
    ("body", "ups"),
    [
        (lambda m, x: m.down(F.gelu(m.up(x))), 1),
        (lambda m, x: x + m.down(F.dropout(F.relu(m.up(x)), 0.1, m.training)), 1),
        (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), 2),
        (lambda m, x: m.down(m.gate(x) * m.up(x)), 2),
        (packed, 1),
        (lambda m, x: m.down(tanh_gelu(m.up(x)) * m.scale), 1),
        (lambda m, x: m.down(F.relu(m.up(x)).square()), 1),
        (lambda m, x: m.down(m.up(x) * m.up(x).sigmoid()), 2),
    ],
)
def test_a_feedforward_layer(body, ups):
    program = capture(Function(body), (torch.randn(2, 3, D),))
    (layer,) = feedforward_layers(program)
    linears = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert (*layer.up, layer.down) == tuple(linears) and len(layer.up) == ups
    assert layer.x is program.placeholders[0]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.down(m.up(x)),  # nothing in between
        lambda m, x: m.down(m.up(x) * m.scale + 1),  # affine
        lambda m, x: m.out(F.gelu(m.up(x))),  # a head: not back to the width
        lambda m, x: m.down(F.gelu(m.up(x)) + m.gate(x.tanh())),  # two tensors are read
        lambda m, x: m.down(F.softmax(m.up(x), -1)),  # entries meet
        lambda m, x: m.down(F.gelu(m.up(x)).transpose(0, 1).contiguous()),
        lambda m, x: m.down(F.gelu(x[..., :1] * m.scale)),  # no layer before it
        lambda m, x: m.down(F.gelu(m.up(x)) * x[..., :1]),  # something else is multiplied in
    ],
)
def test_no_feedforward_layer(body):
    assert not feedforward_layers(capture(Function(body), (torch.randn(2, 3, D),)))
