"""A scale per channel goes into its convolution, also with a dynamic batch; a scale per pixel stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.passes.norm.fold_channel_scale import FoldChannelScale
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten


class Scaled(nn.Module):
    def __init__(self, shape, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.s = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.conv(x) * self.s


def run(model):
    program = capture(model.eval(), (torch.randn(2, 3, 8, 8),))
    original, context = program.copy(), Context()
    FoldChannelScale().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,)])
def test_it_folds(shape):
    program, _ = run(Scaled(shape))
    assert program.count(aten.mul.Tensor) == 0
    assert program.weights["conv.weight_1"].meta.shape == (6, 3, 3, 3)
    assert program.weights["conv.bias_1"].meta.shape == (6,)


def test_without_a_bias_none_is_made():
    program, _ = run(Scaled((6, 1, 1), bias=False))
    assert program.count(aten.mul.Tensor) == 0
    assert not any("bias" in name for name in program.weights)


def test_a_scale_per_pixel_is_refused():
    _, log = run(Scaled((8,)))
    assert log.refusals[0].reason == "the factor has the shape [8], not one per channel"
