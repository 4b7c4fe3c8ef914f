"""Hand-written RMSNorm, with the casts of Llama, T5 and Gemma: raised where it is one, left where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.passes.raise_.absorb_rms_norm_gain import AbsorbRmsNormGain
from tautomer.passes.raise_.raise_mixed_rms_norm import RaiseMixedRmsNorm
from tautomer.passes.raise_.raise_rms_norm import RaiseRmsNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten
D, EPS = 6, 1e-6
RULES = (RaiseRmsNorm(), RaiseMixedRmsNorm(), AbsorbRmsNormGain())


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


def gain_first(m, x):
    return (m.g * x) / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def power(m, x):
    return x * torch.pow(torch.square(x).mean(-1, keepdim=True) + EPS, -0.5) * m.g


def run(forward):
    program = capture(Norm(forward), (torch.randn(3, 5, D),))
    before, context = interpret(program, program.example, dtype=torch.float64), Context()
    apply_rules(RULES, program, context)
    torch.testing.assert_close(interpret(program, program.example, dtype=torch.float64), before, rtol=1e-12, atol=1e-12)
    return program, context.log


@pytest.mark.parametrize("forward", [llama, t5, gemma, gain_first, power])
def test_every_spelling_becomes_one_rms_norm(forward):
    program, _ = run(forward)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [aten.rms_norm.default]
    (norm,) = program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    assert norm.args[1] == [D] and norm.args[2].op == "get_attr" and norm.args[3] == EPS


def test_gemmas_gain_is_one_plus_the_weight():
    program, _ = run(gemma)
    (norm,) = program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    torch.testing.assert_close(program.weights.value(norm.args[2].target), 1 + program.weights.leaves["g"])


NEAR_MISSES = {
    "eps outside the root": lambda m, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS),
    "sum for mean": lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
    "another axis": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),
    "another power": lambda m, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS),
    "another tensor": lambda m, x: x.tanh() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "clamped norm": lambda m, x: nn.functional.normalize(x, dim=-1) * D**0.5,
}


@pytest.mark.parametrize("forward", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(forward):
    program, log = run(forward)
    assert not log.applications
    assert program.count(aten.rms_norm.default) == 0
