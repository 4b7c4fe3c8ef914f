"""A float32 mean square under a half-precision quotient is T5's RMSNorm; a mean square of another precision is not."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.passes.raise_.raise_mixed_rms_norm import RaiseMixedRmsNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten


class Norm(nn.Module):
    def __init__(self, precision):
        super().__init__()
        self.precision = precision

    def forward(self, x):
        return x * torch.rsqrt(x.to(self.precision).pow(2).mean(-1, keepdim=True) + 1e-6)


def run(precision):
    program = capture(Norm(precision), (torch.randn(3, 6, dtype=torch.bfloat16),))
    before, context = interpret(program, program.example, dtype=torch.float64), Context()
    RaiseMixedRmsNorm().run(program, context)
    torch.testing.assert_close(interpret(program, program.example, dtype=torch.float64), before, rtol=1e-12, atol=1e-12)
    return program, context.log


def test_it_becomes_a_float32_rms_norm():
    program, _ = run(torch.float32)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [aten.to.dtype, aten.rms_norm.default]
    assert program.output.args[0][0].meta["val"].dtype is torch.float32


def test_another_precision_stays():
    assert not run(torch.float64)[1].applications
