"""The tanh form of GELU, as GPT-2 and those after it spell it; a constant with fewer digits is another function."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn, tanh
from transformers.activations import AccurateGELUActivation, FastGELUActivation, GELUTanh, NewGELUActivation

from tautomer.passes.raise_.raise_tanh_gelu import RaiseTanhGelu
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
C, K = math.sqrt(2 / math.pi), 0.044715


class Function(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.body = forward

    def forward(self, x):
        return self.body(x)


def run(model, x=None):
    program = capture(model.eval(), (torch.randn(3, 5, 4) if x is None else x,))
    original, context = program.copy(), Context()
    RaiseTanhGelu().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


SPELLINGS = {
    "GPT-2": NewGELUActivation(),
    "accurate": AccurateGELUActivation(),
    "python": GELUTanh(use_gelu_tanh_python=True),
    "power": lambda x: 0.5 * x * (1 + tanh(C * (x + K * x**3))),
    "cube": lambda x: 0.5 * x * (1 + tanh(C * (x + K * x * x * x))),
    "cube first": lambda x: 0.5 * x * (1 + tanh(C * (x + K * (x * x * x)))),
    "fast": lambda x: 0.5 * x * (1 + tanh(x * C * (1 + K * x * x))),
    "factored": lambda x: x * (0.5 * (1 + tanh(C * (x * (1 + K * x**2))))),
    "expanded": lambda x: 0.5 * (x + x * tanh(C * (x + K * x**3))),
}


@pytest.mark.parametrize("forward", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_becomes_one_gelu(forward):
    program, log = run(Function(forward))
    (gelu,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert gelu.target is aten.gelu.default and gelu.kwargs == {"approximate": "tanh"}
    assert log.applications[0].error <= 1e-12


@pytest.mark.parametrize(("kind", "options"), [("GPT2", {"n_embd": 16}), ("GPTJ", {"n_embd": 16, "rotary_dim": 4})])
def test_every_one_of_a_model_is_found(kind, options):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=19, n_layer=2, n_head=2, n_positions=20, use_cache=False, **options
    )
    program, log = run(getattr(transformers, f"{kind}Model")(config), torch.randint(19, (2, 6)))
    assert len(log.applications) == program.count(aten.gelu.default) == 2
    assert program.count(aten.tanh.default) == 0


NEAR_MISSES = {
    "another cubic": lambda x: 0.5 * x * (1 + tanh(C * (x + 0.0447 * x**3))),
    "another power": lambda x: 0.5 * x * (1 + tanh(C * (x + K * x**2))),
    "another tensor": lambda x: 0.5 * x.relu() * (1 + tanh(C * (x + K * x**3))),
    "no one": lambda x: 0.5 * x * tanh(C * (x + K * x**3)),
}


@pytest.mark.parametrize("forward", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(forward):
    program, log = run(Function(forward))
    assert not log.applications
    assert program.count(aten.tanh.default) == 1


def bloom(x):
    return x * 0.5 * (1.0 + tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


ROUNDED = {"BLOOM": (bloom, "0.79788456 is not sqrt(2/pi) but 1.0e-09"), "fast": (FastGELUActivation(), "but 3.6e-12")}


@pytest.mark.parametrize(("forward", "sentence"), ROUNDED.values(), ids=ROUNDED)
def test_a_rounded_constant_is_refused_with_its_difference(forward, sentence):
    program, log = run(Function(forward))
    assert not log.applications and program.count(aten.tanh.default) == 1
    assert sentence in log.refusals[0].reason
