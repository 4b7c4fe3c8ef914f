"""Layers of one parent that read one tensor are a group; another tensor, parent or dtype, or a missing bias, is not."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.parallel import parallel_linears


class Attention(nn.Module):
    def __init__(self, biases=(True, True, True)):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 4, bias=bias) for bias in biases)

    def forward(self, x, y):
        return self.q(x), self.k(y), self.v(y)


class Stack(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList([Attention(**options), Attention(**options)])

    def forward(self, x, y):
        return [layer(x, y) for layer in self.layers]


X, Y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)


def groups(model):
    program = capture(model.eval(), (X, Y))
    return [[str(layer.args[1].target).removesuffix(".weight") for layer in group] for group in parallel_linears(program)]


def test_siblings_with_one_input_are_a_group_and_cousins_are_not():
    assert groups(Stack()) == [["layers.0.k", "layers.0.v"], ["layers.1.k", "layers.1.v"]]


def test_a_layer_without_a_bias_stands_apart():
    assert groups(Attention(biases=(True, False, True))) == []
    assert groups(Attention(biases=(True, False, False))) == [["k", "v"]]


def test_a_weight_computed_at_run_time_is_no_layer():
    class Dynamic(nn.Module):
        def forward(self, x, y):
            return nn.functional.linear(x, y[0]), nn.functional.linear(x, y[1])

    assert groups(Dynamic()) == []
