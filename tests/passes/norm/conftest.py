"""A run that holds a fold to its claim."""

from __future__ import annotations

from functools import partial

import pytest
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.verification import check_program


class Body(nn.Module):
    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def _fold(randomized, rewrite, forward, x, mode="eval", prepare=lambda model: None, **parts):
    """The program after ``rewrite`` and its log; values and gradients agree, and a second run finds nothing."""
    model = randomized(Body(forward, **parts))
    prepare(model)
    program = capture(model if mode == "eval" else model.train(), (x,), mode=mode)
    original, context, again = program.copy(), Context(), Context()
    rewrite.run(program, context)
    program.graph.lint()
    evidence = check_program(original, program, ALGEBRAIC)
    assert evidence.forward <= 1e-12 and not evidence.notes
    rewrite.run(program, again)
    assert not again.log.applications
    return program, context.log


@pytest.fixture
def fold(randomized):
    return partial(_fold, randomized)
