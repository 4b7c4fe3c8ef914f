"""A LayerScale goes into its writer, in whatever layout the weight is stored; anything else stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.passes.norm.fold_layer_scale import FoldLayerScale
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten


class Scaled(nn.Module):
    def __init__(self, scale, forward=None, bias=True):
        super().__init__()
        self.linear = nn.Linear(4, 6, bias=bias)
        self.s = nn.Parameter(scale)
        self.body = forward or (lambda m, x: m.linear(x) * m.s)

    def forward(self, x):
        return self.body(self, x)


def run(model, x):
    program = capture(model.eval(), (x,))
    original, context = program.copy(), Context()
    FoldLayerScale().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1,), ()])
def test_it_folds(bias, shape):
    program, log = run(Scaled(torch.randn(shape), bias=bias), torch.randn(3, 5, 4))
    assert program.count(aten.mul.Tensor) == 0
    assert len(log.applications) == 1
    assert program.weights["linear.weight_1"].meta.shape == (6, 4)


@pytest.mark.parametrize(
    "scaled", [lambda m, x: m.linear(x) * 0.22, lambda m, x: 3 * m.linear(x), lambda m, x: m.linear(x) / 8**0.5]
)
def test_a_number_folds(scaled):
    program, log = run(Scaled(torch.randn(6), lambda m, x: x[..., :1] + scaled(m, x)), torch.randn(3, 5, 4))
    assert len(log.applications) == 1
    assert program.count(aten.mul.Tensor) == program.count(aten.div.Tensor) == 0


def test_a_weight_stored_transposed_stays_so():
    def forward(m, x):
        return x @ m.linear.weight * m.s

    program, _ = run(Scaled(torch.randn(4), forward), torch.randn(3, 5, 6))
    assert program.count(aten.mul.Tensor) == 0
    assert program.weights["linear.weight_1"].meta.shape == (6, 4)


def test_a_scale_per_token_is_refused():
    _, log = run(Scaled(torch.randn(5, 1)), torch.randn(3, 5, 4))
    assert log.refusals[0].reason == "the factor has the shape [5, 1], not one per feature"


def test_another_reader_of_the_unscaled_output_refuses():
    def forward(m, x):
        y = m.linear(x)
        return y * m.s + y

    _, log = run(Scaled(torch.randn(6), forward), torch.randn(3, 5, 4))
    assert "is also read by aten.add" in log.refusals[0].reason


def test_a_weight_with_another_reader_is_not_stored_twice():
    def forward(m, x):
        return m.linear(x) * m.s @ m.linear.weight

    _, log = run(Scaled(torch.randn(6), forward), torch.randn(3, 5, 4))
    assert "'linear.weight' would be stored twice" in log.refusals[0].reason


def test_a_gate_computed_at_run_time_is_no_weight():
    _, log = run(Scaled(torch.randn(6), lambda m, x: m.linear(x) * m.linear(x).sigmoid()), torch.randn(3, 5, 4))
    assert not log.applications and not log.refusals
