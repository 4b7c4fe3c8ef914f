"""The product after a norm is its gain, if it is a vector over the norm's axis and nobody else reads the norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.passes.raise_.absorb_rms_norm_gain import AbsorbRmsNormGain
from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self, forward, shape=(4,)):
        super().__init__()
        self.v = nn.Parameter(torch.randn(shape))
        self.body = forward

    def forward(self, x):
        return self.body(self, x, nn.functional.rms_norm(x, (4,)))


def run(forward, shape=(4,)):
    program = capture(Model(forward, shape), (torch.randn(3, 5, 4),))
    before, context = interpret(program, program.example, dtype=torch.float64), Context()
    AbsorbRmsNormGain().run(program, context)
    torch.testing.assert_close(interpret(program, program.example, dtype=torch.float64), before, rtol=1e-12, atol=1e-12)
    return program, context.log


@pytest.mark.parametrize("forward", [lambda m, x, y: y * m.v, lambda m, x, y: m.v * y])
def test_it_is_absorbed(forward):
    program, _ = run(forward)
    (norm,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert norm.target is aten.rms_norm.default
    assert norm.args[2].target == "v"


def test_one_computed_from_weights_becomes_a_weight():
    program, _ = run(lambda m, x, y: y * (1 + m.v))
    (norm,) = (node for node in program.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(program.weights.value(norm.args[2].target), 1 + program.weights.leaves["v"])


@pytest.mark.parametrize("shape", [(5, 1), (1,), ()])
def test_another_shape_is_refused(shape):
    _, log = run(lambda m, x, y: y * m.v, shape)
    assert log.refusals[0].reason == "the factor is not a vector over the norm's axis"


def test_another_reader_of_the_norm_is_refused():
    _, log = run(lambda m, x, y: (y * m.v).tanh() - y)
    assert "is also read by aten.sub" in log.refusals[0].reason


def test_a_norm_that_has_one_keeps_it():
    _, log = run(lambda m, x, y: nn.functional.rms_norm(x, (4,), m.v) * m.v)
    assert not log.applications
