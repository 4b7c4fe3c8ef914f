"""A small model for the tests of this folder, and a run that holds a clean-up to what all of them promise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context


class Body(nn.Module):
    def __init__(self, forward=None):
        super().__init__()
        self.linear, self.unused = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.s = nn.Parameter(torch.randn(4))
        self.body = forward or (lambda m, x: m.linear(x) * m.s)

    def forward(self, x):
        return self.body(self, x)


def _program_of(forward=None):
    return capture(Body(forward).eval(), (torch.randn(3, 5, 4),))


def _run(program, *passes):
    """Apply twice: the bits stay, and the second run finds nothing."""
    before, context, again = interpret(program, program.example), Context(), Context()
    for rewrite in passes:
        rewrite.run(program, context)
    program.graph.lint()
    for a, b in zip(interpret(program, program.example), before, strict=True):
        assert torch.equal(a, b)
    for rewrite in passes:
        rewrite.run(program, again)
    assert not again.log.applications
    return context.log


@pytest.fixture
def program_of():
    return _program_of


@pytest.fixture
def run():
    return _run
