"""A sum that starts from zero is what is added to it."""

from __future__ import annotations

import torch

from tautomer.passes.raise_.drop_added_zero import DropAddedZero

X = torch.randn(2, 6, 32)


def test_sums_from_zero(raised, body):
    done = raised(body(lambda m, x: sum([m.q(x), m.k(x)]) + 0.0), X, passes=(DropAddedZero,))
    assert done.count("add") == 1


def test_other_numbers_stay(raised, body):
    done = raised(body(lambda m, x: (m.q(x) + 1e-12) + (m.k(x) - 1)), X, passes=(DropAddedZero,))
    assert not done.log.applications


def test_a_zero_that_stretches_or_promotes_stays(raised, body):
    done = raised(body(lambda m, x: m.q(x) + torch.zeros(3, 1, 1, 1)), X, passes=(DropAddedZero,))
    assert not done.log.applications
