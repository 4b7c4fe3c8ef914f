"""x/2 (1 + erf(x / sqrt(2))) in every order is one GELU; another root, another factor or another tensor is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import erf, nn
from transformers.activations import GELUActivation

from tautomer.passes.raise_.raise_gelu import RaiseGelu
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
    RaiseGelu().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


SPELLINGS = {
    "ESM": lambda x: x * 0.5 * (1.0 + erf(x / math.sqrt(2.0))),
    "BERT": lambda x: x * (0.5 * (1.0 + erf(x / math.sqrt(2.0)))),
    "half last": lambda x: (x * (erf(x * math.sqrt(0.5)) + 1)) / 2,
    "distribution": lambda x: 0.5 * (1 + erf(0.7071067811865476 * x)) * x,
    "expanded": lambda x: 0.5 * x + 0.5 * x * erf(x / 2**0.5),
    "transformers": GELUActivation(use_gelu_python=True),
}


@pytest.mark.parametrize("forward", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_becomes_one_gelu(forward):
    program, log = run(forward)
    (gelu,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert gelu.target is aten.gelu.default and not gelu.kwargs
    assert log.applications[0].error <= 1e-12


def test_two_in_a_row_are_both_found():
    gelu = SPELLINGS["ESM"]
    program, log = run(lambda x: gelu(gelu(x) + x))
    assert len(log.applications) == program.count(aten.gelu.default) == 2


NEAR_MISSES = {
    "another tensor": lambda x: x * 0.5 * (1 + erf(x.tanh() / math.sqrt(2))),
    "not halved": lambda x: x * (1 + erf(x / math.sqrt(2))),
    "no one": lambda x: x * 0.5 * erf(x / math.sqrt(2)),
    "minus": lambda x: x * 0.5 * (1 - erf(x / math.sqrt(2))),
}


@pytest.mark.parametrize("forward", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(forward):
    program, log = run(forward)
    assert not log.applications
    assert program.count(aten.erf.default) == 1


@pytest.mark.parametrize(("argument", "name"), [(lambda x: x / 1.4142, "sqrt(2)"), (lambda x: x * 0.70710678, "1/sqrt(2)")])
def test_a_rounded_root_is_refused_with_its_difference(argument, name):
    _, log = run(lambda x: x * 0.5 * (1 + erf(argument(x))))
    assert f"is not {name} but" in log.refusals[0].reason and "away from it" in log.refusals[0].reason


def test_another_reader_inside_refuses():
    def forward(x):
        y = 1 + erf(x / math.sqrt(2))
        return x * 0.5 * y + y

    _, log = run(forward)
    assert "is also read by aten.add" in log.refusals[0].reason
