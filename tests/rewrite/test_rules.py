"""A rule reads as an equation and says why it did not fire."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.rules import OptionalWeight, Rule, Scalar, Tensor, Weight, is_vector, nearest_miss, require, width


class FoldNormScale(Rule):
    claim = ALGEBRAIC("the product by g is rounded in W, not in the activation")
    paper = "arXiv:2407.09577, Proposition 1"

    def before(self, op, x: Tensor, shape, g, eps, W: Weight, b: OptionalWeight):
        return op.linear(op.rms_norm(x, shape, g, eps), W, b)

    def where(self, m):
        require(m.g is not None, "the norm has no scale left to fold")
        require(is_vector(m.g, width(m.x)), "the scale is not a vector")

    def after(self, op, x, shape, g, eps, W, b):
        return op.linear(op.rms_norm(x, shape, None, eps), op.mul(W, g), b)


class Model(nn.Module):
    def __init__(self, *norms):
        super().__init__()
        self.h = nn.ModuleList(nn.Sequential(norm, nn.Linear(4, 4)) for norm in norms)
        for norm in norms:
            if norm.weight is not None:
                nn.init.normal_(norm.weight)

    def forward(self, x):
        for block in self.h:
            x = x + block(x)
        return x


def program_of(*norms):
    return capture(Model(*norms), (torch.randn(3, 4),))


def test_it_reads_as_an_equation():
    assert FoldNormScale().equation == (
        "linear(rms_norm(x, shape, g, eps), W, b) = linear(rms_norm(x, shape, None, eps), mul(W, g), b)"
    )


def test_a_rule_is_a_pass():
    program, context = program_of(nn.RMSNorm(4), nn.RMSNorm(4)), Context()
    FoldNormScale().run(program, context)
    assert {a.id for a in context.log.applications} == {"fold-norm-scale@h.0.1/linear", "fold-norm-scale@h.1.1/linear_1"}
    assert all(a.error is not None and a.error < 1e-12 for a in context.log.applications)
    assert not context.log.refusals, "its own results are no refusals"


def test_the_nearest_miss_names_what_was_wanted_and_what_was_there():
    miss = nearest_miss(FoldNormScale(), program_of(nn.LayerNorm(4)))
    assert miss is not None and miss.depth == 1
    assert miss.expected == "rms_norm(x, shape, g, eps)"
    assert "layer_norm" in miss.found
    assert miss.pattern_line.startswith("test_rules.py:") and "op.linear(op.rms_norm" in miss.pattern_line
    assert "wanted rms_norm(x, shape, g, eps) at h.0.0 and found" in miss.sentence


def test_it_is_shown_with_the_line_of_the_rule_and_the_line_of_the_model():
    first, wanted, asks, found, where = str(nearest_miss(FoldNormScale(), program_of(nn.LayerNorm(4)))).splitlines()
    assert first == "fold-norm-scale matched 1 ops at h.0.0, then"
    assert wanted == "    wanted rms_norm(x, shape, g, eps)" and found.startswith(
        "    found  layer_norm = aten.layer_norm(x, [4]"
    )
    assert asks.strip().startswith("test_rules.py:") and ".py:" in where


class ScaledTwice(Rule):
    claim = ALGEBRAIC("none")

    def before(self, op, x: Tensor, s: Annotated[Scalar, "> 2"]):
        return op.tanh(op.exp(op.mul(op.sigmoid(x), s)))

    def after(self, op, x, s):
        return op.tanh(op.exp(op.mul(op.sigmoid(x), s)))


class Scaled(nn.Module):
    def __init__(self, *scales):
        super().__init__()
        self.scales = scales

    def forward(self, x):
        for s in self.scales:
            x = (x.sigmoid() * s).exp().tanh()
        return x


def test_a_report_has_one_line_for_a_rule_that_almost_found_something():
    def misses(model, *rules, **options):
        context = Context(**options)
        run_passes(rules, capture(model, (torch.randn(3, 4),)), context, check=False)
        return context.log.misses

    (miss,) = misses(Scaled(2, 1.5), ScaledTwice())
    assert "scaled-twice matched 4 ops, then wanted a number > 2 for s" in miss.sentence and miss.found == "2"
    assert not misses(nn.Sequential(nn.Sigmoid(), nn.Tanh()), ScaledTwice()), "one op alone is no near miss"
    assert not misses(Scaled(2, 1.5), ScaledTwice(), skip=("scaled-twice",)), "nobody asked"
    assert not misses(Model(nn.RMSNorm(4), nn.LayerNorm(4)), FoldNormScale()), "it fired elsewhere"


def test_a_refusal_is_nearer_than_any_mismatch():
    program = program_of(nn.LayerNorm(4), nn.RMSNorm(4, elementwise_affine=False, eps=1e-6))
    miss = nearest_miss(FoldNormScale(), program)
    assert miss is not None
    assert miss.sentence == "fold-norm-scale matched at h.1.1 but refused: the norm has no scale left to fold"
    elsewhere = nearest_miss(FoldNormScale(), program, at="h.0")
    assert elsewhere is not None and "layer_norm" in elsewhere.found


def test_nothing_alike_is_no_miss():
    assert nearest_miss(FoldNormScale(), capture(nn.Tanh(), (torch.randn(3),))) is None
