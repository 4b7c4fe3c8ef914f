"""x sigmoid(x) is a SiLU however the sigmoid is spelled; the quick GELU is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import QuickGELUActivation

from tautomer.passes.raise_.raise_silu import RaiseSilu
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.body = forward

    def forward(self, x):
        return self.body(x)


def run(forward):
    program = capture(Function(forward).eval(), (torch.randn(3, 5, 4),))
    original, context = program.copy(), Context()
    RaiseSilu().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


SPELLINGS = {
    "swish": lambda x: x * torch.sigmoid(x),
    "other order": lambda x: x.sigmoid() * x,
    "exponential": lambda x: x / (1 + torch.exp(-x)),
    "inverse": lambda x: x * (1 / (1 + torch.exp(-x))),
}


@pytest.mark.parametrize("forward", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_becomes_one_silu(forward):
    program, log = run(forward)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [aten.silu.default]
    assert log.applications[0].error <= 1e-12


NEAR_MISSES = {
    "quick GELU": QuickGELUActivation(),
    "GLU": lambda x: x * torch.sigmoid(x + 1),
    "another tensor": lambda x: x.tanh() * torch.sigmoid(x),
    "tanh": lambda x: x * torch.tanh(x),
    "exp(x)": lambda x: x / (1 + torch.exp(x)),
}


@pytest.mark.parametrize("forward", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(forward):
    program, log = run(forward)
    assert not log.applications and program.count(aten.silu.default) == 0


def test_another_reader_of_the_sigmoid_refuses():
    def forward(x):
        gate = x.sigmoid()
        return x * gate + gate

    _, log = run(forward)
    assert "is also read by aten.add" in log.refusals[0].reason
