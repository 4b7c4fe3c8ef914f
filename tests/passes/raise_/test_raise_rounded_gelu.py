"""On request, a constant that float32 cannot tell from sqrt(2/pi) is taken for it; no recipe does so by itself."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn, tanh
from transformers.activations import FastGELUActivation

from tautomer.passes.raise_.raise_rounded_gelu import RaiseRoundedGelu
from tautomer.passes.recipes import EXACT
from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context

aten = torch.ops.aten


class Gelu(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, x):
        return 0.5 * x * (1 + tanh(self.c * x * (1 + 0.044715 * x * x)))


def run(model, x):
    program = capture(model.eval(), (x,))
    before, context = interpret(program, program.example), Context()
    RaiseRoundedGelu().run(program, context)
    torch.testing.assert_close(interpret(program, program.example), before)
    return program, context.log


@pytest.mark.parametrize("model", [Gelu(0.79788456), Gelu(0.7978845608), FastGELUActivation()])
def test_the_digits_people_write_are_taken(model):
    program, log = run(model, torch.randn(3, 8))
    assert program.count(aten.gelu.default) == len(log.applications) == 1
    assert 0 < log.applications[0].error < 1e-8


@pytest.mark.parametrize("c", [0.7978, 0.797885, 0.8])
def test_one_that_float32_can_tell_apart_is_not(c):
    assert "is not sqrt(2/pi)" in run(Gelu(c), torch.randn(3, 8))[1].refusals[0].reason


def test_every_one_of_bloom_is_found():
    config = transformers.BloomConfig(vocab_size=19, hidden_size=16, n_layer=2, n_head=2, use_cache=False)
    program, log = run(transformers.BloomModel(config), torch.randint(19, (2, 6)))
    assert program.count(aten.gelu.default) == len(log.applications) == 2


def test_no_recipe_has_it():
    assert RaiseRoundedGelu not in EXACT and not RaiseRoundedGelu.claim.exact
