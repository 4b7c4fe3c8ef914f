"""x sigmoid(1.702 x) in every spelling is one quick GELU; another factor or another tensor is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn, sigmoid
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from tautomer.passes.raise_.raise_quick_gelu import RaiseQuickGelu
from tautomer.passes.raise_.raise_silu import RaiseSilu
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.library import tautomer
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program


class Function(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.body = forward

    def forward(self, x):
        return self.body(x)


def run(forward, dtype=torch.float32):
    program = capture(Function(forward).eval(), (torch.randn(3, 5, 4, dtype=dtype),))
    original, context = program.copy(), Context()
    apply_rules((RaiseSilu(), RaiseQuickGelu()), program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


SPELLINGS = {
    "transformers": ACT2FN["quick_gelu"],
    "CLIP": lambda x: x * sigmoid(1.702 * x),
    "gate first": lambda x: sigmoid(x * 1.702) * x,
    "quotient": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "inverse": lambda x: x * (1 / (1 + torch.exp(-(1.702 * x)))),
    "scaled SiLU": lambda x: silu(1.702 * x) / 1.702,
}


@pytest.mark.parametrize("forward", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_spelling_becomes_one_quick_gelu(forward, dtype):
    program, log = run(forward, dtype)
    (gelu,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert gelu.target is tautomer.quick_gelu.v1
    assert log.applications[-1].error <= 1e-12


NEAR_MISSES = {
    "another factor": lambda x: x * sigmoid(1.703 * x),
    "another tensor": lambda x: x.tanh() * sigmoid(1.702 * x),
    "divided by another": lambda x: silu(1.702 * x) / 1.7,
    "growing": lambda x: x / (1 + torch.exp(1.702 * x)),
}


@pytest.mark.parametrize("forward", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(forward):
    program, log = run(forward)
    assert not log.applications
    assert program.count(tautomer.quick_gelu.v1) == 0
