"""The trial of a rule finds rules that are wrong, and says how."""

from __future__ import annotations

import pytest
import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.errors import ClaimBroken
from tautomer.rewrite.rules import Rule, require
from tautomer.rewrite.trial import try_rule


class Square(Rule):
    """x * x = x^2, in two spellings."""

    claim = ALGEBRAIC("none")

    def before(self, op, x, n):
        return op.pow(op.any_of(op.sqrt(x), op.pow(x, 0.5)), n)

    def where(self, m):
        require(m.n == 2, "another power")

    def after(self, op, x, n):
        return op.abs(x)

    def samples(self):
        yield {"x": torch.rand(3, 4, dtype=torch.float64) + 1, "n": 2}


def test_a_right_rule_passes_in_every_spelling():
    trial = try_rule(Square())
    assert (trial.spellings, trial.error < 1e-12) == (2, True)
    assert trial.refused == trial.near_misses > 0, "wrong powers and other readers"


def test_no_samples_is_an_error():
    class Silent(Square):
        def samples(self):
            yield from ()

    with pytest.raises(ClaimBroken, match="silent has no samples"):
        try_rule(Silent())


def test_a_wrong_side_does_not_fire():
    class Wrong(Square):
        def after(self, op, x, n):
            return op.neg(x)

    with pytest.raises(ClaimBroken, match="does not fire"):
        try_rule(Wrong())


def test_a_condition_that_is_missing_is_found_by_a_near_miss():
    class Careless(Square):
        def where(self, m):
            pass

    with pytest.raises(ClaimBroken, match="fires on a near miss"):
        try_rule(Careless())


def test_a_rule_that_feeds_itself_is_found():
    class Again(Rule):
        claim = ALGEBRAIC("none")
        done = False

        def before(self, op, x):
            return op.neg(op.neg(x))

        def where(self, m):
            require(not self.done, "once")
            type(self).done = True

        def after(self, op, x):
            return op.neg(op.neg(x))

        def samples(self):
            yield {"x": torch.ones(2, dtype=torch.float64)}

    class Forgetful(Again):
        def run(self, program, context):
            type(self).done = False
            super().run(program, context)

    with pytest.raises(ClaimBroken, match="fires again on its own result"):
        try_rule(Forgetful())
