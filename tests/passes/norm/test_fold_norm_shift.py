"""A shift goes into every reader that can take it, or into none."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.passes.norm.fold_norm_shift import FoldNormShift
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten


class Shifted(nn.Module):
    def __init__(self, forward, shape=(4,)):
        super().__init__()
        self.c = nn.Parameter(torch.randn(shape))
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 8)
        self.head = nn.Linear(4, 99, bias=False)
        self.body = forward

    def forward(self, x):
        return self.body(self, x + self.c)


def run(forward, shape=(4,)):
    program = capture(Shifted(forward, shape), (torch.randn(3, 5, 4),))
    original, context = program.copy(), Context()
    FoldNormShift().run(program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


def test_every_reader_takes_it_and_the_sum_is_gone():
    program, log = run(lambda m, y: (m.q(y), m.k(y), m.v(y)))
    assert len(log.applications) == 3
    assert program.count(aten.add.Tensor) == 0
    assert program.weights["k.bias"].meta.shape == (4,), "a reader without a bias gets one"


def test_one_reader_that_cannot_keeps_it_for_all():
    program, log = run(lambda m, y: (m.q(y), y.tanh()))
    assert not log.applications
    assert log.refusals[0].reason == "aten.tanh at tanh reads the shifted features too, so the shift cannot go"
    assert program.count(aten.add.Tensor) == 1


def test_a_returned_value_is_a_reader():
    _, log = run(lambda m, y: (m.q(y), y))
    assert "output at output reads the shifted features too" in log.refusals[0].reason


def test_a_wide_head_without_a_bias_is_not_given_one():
    _, log = run(lambda m, y: m.head(y))
    assert log.refusals[0].reason == "head has no bias: adding one over 99 channels costs more than a shift over 4"


def test_a_shift_per_token_is_refused():
    _, log = run(lambda m, y: m.q(y), shape=(5, 4))
    assert log.refusals[0].reason == "the shift is not a vector over the features"


def test_features_used_as_a_weight_are_no_reader_that_can():
    _, log = run(lambda m, y: nn.functional.linear(m.q(y), y[0]))
    assert not log.applications
