"""The trial of a rule finds rules that are wrong, and says how."""

from __future__ import annotations

import pytest
import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.errors import ClaimBroken
from tautomer.rewrite.rules import Rule, Weight, dtype, require
from tautomer.rewrite.trial import DTYPES, examine, try_rule


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
    assert (trial.spellings, trial.fired, trial.error < 1e-12) == (2, 2, True)
    assert trial.refused == trial.near_misses > 0, "wrong powers and other readers"
    assert trial.harmed == 0 and not trial.failures


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


class Doubled(Rule):
    """x + x/3 + x/3 + x/3 = 2x."""

    claim = ALGEBRAIC("none")

    def before(self, op, x):
        third = op.div(x, 3)
        return op.add(op.add(op.add(x, third), third), third)

    def after(self, op, x):
        return op.add(x, x)

    def samples(self):
        yield {"x": torch.rand(3, 4, dtype=torch.float64) + 1}


def test_errors_by_dtype_stand_beside_those_of_the_left_side():
    errors = try_rule(Doubled()).errors
    assert list(errors) == list(DTYPES)
    for kind, (new, old) in errors.items():
        assert new < 1e-15, "doubling rounds nothing, but for the division that it is held against"
        assert old < 4 * torch.finfo(kind).eps
    assert errors[torch.float32][1] > 1e-8


def test_a_dtype_in_which_a_rule_does_not_fire_has_no_error():
    class Half(Square):
        def where(self, m):
            super().where(m)
            require(dtype(m.x) == torch.bfloat16, "half precision alone")

        def samples(self):
            yield {"x": torch.rand(3, 4).bfloat16() + 1, "n": 2}

    assert list(examine(Half()).errors) == [torch.bfloat16]


def test_what_is_wrong_is_counted_and_said():
    class Careless(Square):
        def where(self, m):
            pass

    trial = examine(Careless())
    assert trial.harmed and trial.harmed + trial.refused == trial.near_misses
    assert len(trial.failures) == trial.harmed and trial.failures[0].startswith("careless fires on a near miss")


def test_a_weight_that_is_computed_at_run_time_is_a_near_miss():
    class Scale(Rule):
        claim = ALGEBRAIC("none")

        def before(self, op, x, s: Weight, W: Weight):
            return op.linear(op.mul(x, s), W)

        def after(self, op, x, s, W):
            return op.linear(x, op.mul(W, s))

        def samples(self):
            x, s, W = (torch.randn(n, dtype=torch.float64) for n in ((3, 4), (4,), (5, 4)))
            yield {"x": x, "s": s, "W": W}

    trial = try_rule(Scale())
    assert trial.near_misses == trial.refused == 3, "another reader of the product, and each of the two weights"
