"""The check of one application: what counts as an error, and what it is measured against."""

from __future__ import annotations

import math

import pytest
import torch
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC, APPROXIMATE, ARCHITECTURE, BITWISE
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.errors import ClaimBroken
from tautomer.rewrite.region import Region, hold, region_between, relative_error, signature
from torch import nn

aten = torch.ops.aten


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.tanh(x @ self.W) * 2, torch.tanh(x @ self.W) * 2.0000001, torch.tanh(x @ self.W)


def regions():
    program = capture(Two(), (torch.randn(3, 4),))
    x, outputs = program.placeholders[0], program.output.args[0]
    return Editor(program), [region_between((output,), {x}, {}) for output in outputs]


def test_a_region_stops_at_its_frontier():
    _, (region, _, _) = regions()
    assert sorted(node.name for node in region.inputs) == ["W", "x"]
    assert region.nodes[-1] is region.roots[0]


def test_equal_regions_hold_and_the_number_is_returned():
    editor, (a, _, _) = regions()
    assert hold(ALGEBRAIC, a, a, editor) == 0.0
    assert hold(BITWISE, a, a, editor) == 0.0


def test_a_difference_is_a_broken_claim_or_a_measurement():
    editor, (a, b, _) = regions()
    with pytest.raises(ClaimBroken, match=r"forward differs by 5\.0e-08"):
        hold(ALGEBRAIC, a, b, editor)
    assert hold(APPROXIMATE, a, b, editor) == pytest.approx(5e-8, rel=0.1)
    assert hold(ARCHITECTURE, a, b, editor) is None


def test_the_check_leaves_the_generator_alone():
    editor, (a, _, _) = regions()
    state = torch.get_rng_state()
    hold(ALGEBRAIC, a, a, editor)
    assert torch.equal(torch.get_rng_state(), state)


def test_signatures_see_structure_and_literals():
    editor, (a, b, c) = regions()
    assert signature(a, (), editor) == signature(a, (), editor)
    assert len({signature(region, (), editor) for region in (a, b, c)}) == 3


def test_relative_error():
    one, nan, inf = torch.tensor([1.0, 2.0]), math.nan, math.inf
    assert relative_error(one, one) == 0.0
    assert relative_error(torch.tensor([1.0, 2.2]), one) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1.0, inf]), torch.tensor([nan, inf])) == 0.0, "old is no number there"
    assert relative_error(one, torch.tensor([nan, nan])) == inf, "nothing was compared"
    assert relative_error(torch.tensor([nan, 1.0]), one) == inf
    assert relative_error(one[:1], one) == inf
    assert relative_error(torch.empty(0), torch.empty(0)) == 0.0
    assert Region((), (), {}).inputs == ()
