"""The check of one application: what counts as an error, and what it is measured against."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC, APPROXIMATE, ARCHITECTURE, BITWISE
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.errors import ClaimBroken
from tautomer.rewrite.patterns import Found
from tautomer.rewrite.region import _error, _error_above, hold, region_between, signature

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


def test_equal_applications_ask_one_question():
    program = capture(Two(), (torch.randn(3, 4),))
    (x,), (W,) = program.placeholders, program.graph.find_nodes(op="get_attr")
    add, mul = program.output.args[0][2], program.output.args[0][0]
    ask = lambda *values, way=0, created=(): signature(Found(values, (), (), (), way), created, Editor(program))  # noqa: E731

    assert ask(x, W, 2) == ask(x, W, 2)
    assert len({ask(x, W, 2), ask(x, W, 2.0), ask(x, W, True), ask(x, x, 2), ask(W, x, 2)}) == 5
    assert ask([x, x]) != ask([x, mul]), "one value twice is not two"
    assert ask(x, way=1) != ask(x) != ask(x, created=(add,))
    assert ask(add) == ask(mul), "values are known by their metadata"


def test_where_the_old_side_is_no_number_nothing_is_claimed():
    one, nan, inf = torch.tensor([1.0, 2.0]), math.nan, math.inf
    assert _error(torch.tensor([1.0, 5.0]), torch.tensor([1.0, nan])) == 0.0
    assert _error(one, torch.tensor([nan, nan])) == inf, "nothing was compared"
    assert _error(torch.tensor([nan, 1.0]), one) == inf


def test_a_gradient_that_is_zero_is_measured_against_the_others():
    zero, noise = torch.zeros(2), torch.full((2,), 1e-16)
    assert _error_above(noise, zero, 1e-3) == pytest.approx(1e-13)
    assert _error_above(noise, zero, 0.0) == math.inf
    assert _error_above(zero, zero, 0.0) == 0.0
    assert _error_above(torch.tensor([math.nan, 1.0]), zero, 1.0) == math.inf
