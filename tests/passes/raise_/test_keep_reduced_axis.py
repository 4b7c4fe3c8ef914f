"""A reduction whose axis is put back keeps it; another axis, or several, stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.passes.raise_.keep_reduced_axis import KeepReducedAxis
from tautomer.passes.raise_.raise_rms_norm import RaiseRmsNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.body = forward

    def forward(self, x):
        return self.body(x)


def run(forward, *rules):
    program, context = capture(Function(forward).eval(), (torch.randn(3, 5, 4),)), Context()
    original = program.copy()
    apply_rules((KeepReducedAxis(), *rules), program, context)
    check_program(original, program, ALGEBRAIC)
    return program, context.log


@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: x.mean(-1).unsqueeze(-1),
        lambda x: x.sum(dim=2)[..., None],
        lambda x: x.norm(dim=-1).unsqueeze(2),
        lambda x: x.amax(-1)[:, :, None],
        lambda x: torch.var(x, dim=-1, correction=0).unsqueeze(-1),
    ],
)
def test_the_axis_is_kept(reduce):
    program, _ = run(lambda x: x - reduce(x))
    assert program.count(aten.unsqueeze.default) == 0


@pytest.mark.parametrize(
    "reduce", [lambda x: x.mean(1).unsqueeze(1), lambda x: x.mean(-1).unsqueeze(0), lambda x: x.mean((1, 2))[:, None]]
)
def test_another_axis_stays(reduce):
    _, log = run(lambda x: reduce(x))
    assert not log.applications


@pytest.mark.parametrize(
    "mean", [lambda x: x.mean(-1)[..., None], lambda x: x.mean(dim=(2,)).unsqueeze(-1), lambda x: x.mean(2, True)]
)
def test_a_norm_behind_it_is_recognised(mean):
    program, _ = run(lambda x: x * torch.rsqrt(mean(x.pow(2)) + 1e-6), RaiseRmsNorm())
    assert program.count(aten.rms_norm.default) == 1
