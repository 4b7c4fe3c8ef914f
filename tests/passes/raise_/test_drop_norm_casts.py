"""In half precision the casts of Llama's and T5's norm are the kernel's own; a float32 gain keeps them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.passes.raise_.absorb_rms_norm_gain import AbsorbRmsNormGain
from tautomer.passes.raise_.drop_norm_casts import DropNormCasts
from tautomer.passes.raise_.raise_mixed_rms_norm import RaiseMixedRmsNorm
from tautomer.passes.raise_.raise_rms_norm import RaiseRmsNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten
D, EPS = 6, 1e-6
RULES = (RaiseRmsNorm(), RaiseMixedRmsNorm(), AbsorbRmsNormGain(), DropNormCasts())


class Norm(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.g = nn.Parameter(torch.randn(D))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def llama(m, x):
    dtype = x.dtype
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return m.g * h.to(dtype)


def t5(m, x):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + EPS)
    if m.g.dtype in (torch.float16, torch.bfloat16):
        h = h.to(m.g.dtype)
    return m.g * h


def gemma(m, x):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + m.g.float())).type_as(x)


def olmo(m, x):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (m.g * h).to(x.dtype)


def helium(m, x):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (m.g.to(torch.float32) * h).to(x.dtype)


def deepseek(m, x):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype) * m.g


def run(forward):
    program = capture(Norm(forward).bfloat16(), (torch.randn(3, 5, D, dtype=torch.bfloat16),))
    before, context = interpret(program, program.example, dtype=torch.float64), Context()
    apply_rules(RULES, program, context)
    torch.testing.assert_close(interpret(program, program.example, dtype=torch.float64), before, rtol=1e-12, atol=1e-12)
    return program


@pytest.mark.parametrize("forward", [llama, t5, olmo, helium, deepseek])
def test_the_casts_become_the_kernels_own(forward):
    program = run(forward)
    assert program.count(aten.rms_norm.default) == 1
    assert program.count(aten.to.dtype) == 0
    assert program.output.args[0][0].meta["val"].dtype is torch.bfloat16


def test_a_float32_gain_keeps_its_casts():
    program = run(gemma)
    (norm,) = program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    assert norm.meta["val"].dtype is torch.float32
    assert program.output.args[0][0].meta["val"].dtype is torch.bfloat16
