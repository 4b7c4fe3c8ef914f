"""x over its root mean square is an RMSNorm without eps; with eps beside the root it is another function."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tautomer.passes.raise_.absorb_rms_norm_gain import AbsorbRmsNormGain
from tautomer.passes.raise_.raise_bare_rms_norm import RaiseBareRmsNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.rules import nearest_miss
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
D = 6


class Norm(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.g = nn.Parameter(torch.randn(D))
        self.body = forward

    def forward(self, x):
        return self.body(x) * self.g


def run(forward, dtype=torch.float32):
    program, context = capture(Norm(forward).to(dtype).eval(), (torch.randn(3, 5, D, dtype=dtype),)), Context()
    original = program.copy()
    apply_rules((RaiseBareRmsNorm(), AbsorbRmsNormGain()), program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


SPELLINGS = {
    "norm over sqrt(d)": lambda x: x / (x.norm(dim=-1, keepdim=True) / math.sqrt(D)),
    "norm times d^-1/2": lambda x: x / (x.norm(2, dim=-1, keepdim=True) * D**-0.5),
    "vector_norm": lambda x: x / (D**-0.5 * torch.linalg.vector_norm(x, dim=-1, keepdim=True)),
    "linalg.norm": lambda x: x / (torch.linalg.norm(x, dim=-1, keepdim=True) / D**0.5),
    "mean": lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt(),
    "rsqrt": lambda x: x * (x * x).mean(-1, keepdim=True).rsqrt(),
}


@pytest.mark.parametrize("forward", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_spelling_becomes_one_rms_norm(forward, dtype):
    program, _ = run(forward, dtype)
    (norm,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert norm.target is aten.rms_norm.default and norm.args[3] == 0.0


OUTSIDE = {
    "the paper's first code": lambda x: x / (x.norm(2, dim=-1, keepdim=True) * D**-0.5 + 1e-8),
    "mean": lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-8),
}


@pytest.mark.parametrize("forward", OUTSIDE.values(), ids=OUTSIDE)
def test_an_epsilon_outside_the_root_is_refused_and_explained(forward):
    program, log = run(forward)
    assert not log.applications
    wanted = "1e-08 is added to the root, not under it: x / (rms + eps) is no rms_norm"
    assert log.refusals[0].reason == wanted
    assert wanted in nearest_miss(RaiseBareRmsNorm(), program).sentence


def test_a_length_that_is_divided_by_another_number_is_refused():
    _, log = run(lambda x: x / (x.norm(dim=-1, keepdim=True) / 2))
    assert "is not sqrt(6) but" in log.refusals[0].reason


NEAR_MISSES = {
    "another norm": lambda x: x / (x.norm(1, dim=-1, keepdim=True) / math.sqrt(D)),
    "another tensor": lambda x: x.tanh() / (x.norm(dim=-1, keepdim=True) / math.sqrt(D)),
    "another axis": lambda x: x / x.pow(2).mean(1, keepdim=True).sqrt(),
}


@pytest.mark.parametrize("forward", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(forward):
    assert not run(forward)[1].applications
