"""A factor after a norm is part of its gain and its shift, whatever it is: a number, a weight, one for all or per feature."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautomer.passes.norm.fold_norm_scale import FoldNormScale
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self, forward, scale=()) -> None:
        super().__init__()
        self.layer, self.rms = nn.LayerNorm(6), nn.RMSNorm(6)
        for parameter in (self.layer.weight, self.layer.bias, self.rms.weight):
            nn.init.normal_(parameter)
        self.layer.weight.data[0], self.s, self.body = 0.0, nn.Parameter(torch.randn(scale)), forward

    def forward(self, x):
        return self.body(self, x)


def run(forward, scale=(), dtype=torch.float32):
    program = capture(Model(forward, scale).to(dtype), (torch.randn(2, 3, 6, dtype=dtype),))
    original, context = program.copy(), Context()
    FoldNormScale().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("scaled", [lambda m, y: y / 3**0.5, lambda m, y: 0.5 * y, lambda m, y: -m.s * y])
def test_layer_norm_scaling_goes_into_gain_and_shift(scaled, norm):
    program, _ = run(lambda m, x: scaled(m, getattr(m, norm)(x)))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function" and not program.expression(node)]
    assert calls == [aten.layer_norm.default if norm == "layer" else aten.rms_norm.default]


@pytest.mark.parametrize("scale", [(), (1,), (6,)])
def test_a_factor_per_feature_or_one_for_all(scale):
    program, log = run(lambda m, x: m.layer(x) * m.s, scale)
    assert len(log.applications) == 1 and program.count(aten.mul.Tensor) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    _, log = run(lambda m, x: m.layer(x) * 0.3, dtype=dtype)
    assert len(log.applications) == 1


def test_a_factor_per_token_is_refused():
    _, log = run(lambda m, x: m.layer(x) * m.s, (3, 1))
    assert log.refusals[0].reason == "the factor is neither one for all nor a vector over the norm's axis"


def test_another_reader_of_the_norm_is_refused():
    def forward(m, x):
        y = m.rms(x)
        return y * 0.5 - y

    _, log = run(forward)
    assert "is also read by aten.sub" in log.refusals[0].reason


def test_a_norm_without_a_gain_is_not_given_one():
    program, log = run(lambda m, x: F.rms_norm(x, (6,)) * 0.5)
    assert not log.applications and program.count(aten.mul.Tensor) == 1


def test_a_shared_norm_keeps_its_own_gain_elsewhere():
    program, log = run(lambda m, x: (m.layer(x) * 0.5, m.layer(x.tanh())))
    assert len(log.applications) == 1
    assert {"layer.weight", "layer.weight_1"} <= set(program.weights)
