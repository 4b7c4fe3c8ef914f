"""Bisection finds the one application that breaks a metric; a log is replayed on a fresh copy, application by application."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tautomer
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.program import Program

X = torch.randn(3, 8)


class Stack(nn.Module):
    """Eight layers with a scale each: eight applications of ``fold-into-writer``."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(8)])
        self.scales = nn.ParameterList([nn.Parameter(1 + 0.1 * torch.randn(8)) for _ in range(8)])

    def forward(self, x):
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = torch.tanh(layer(x) * scale)
        return x


class BreakOneTanh(Pass):
    """Every tanh is replaced by itself, the one in ``place`` by a sigmoid."""

    claim = ALGEBRAIC("one of them is a lie")

    def __init__(self, place: int) -> None:
        self.place = place

    def run(self, program: Program, context: Context) -> None:
        for index, node in enumerate(program.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)):
            if context.admits(self, node):
                context.applied(self, node)
                node.target = torch.ops.aten.sigmoid.default if index == self.place else node.target


def agrees(model):
    expected = model(X).detach()
    calls = []

    def metric(module):
        calls.append(len(module.report.applications))
        return torch.allclose(module(X), expected, atol=1e-4)

    return metric, calls


@pytest.mark.parametrize("place", range(8))
def test_the_culprit_is_found(place):
    model = Stack().eval()
    metric, calls = agrees(model)
    culprit = tautomer.bisect(model, (X,), None, metric, passes=["fold-into-writer", BreakOneTanh(place), "drop-dead-code"])
    assert culprit.rewrite == "break-one-tanh"
    assert culprit.id == "break-one-tanh@" + ("tanh" if place == 0 else f"tanh_{place}")
    assert len(calls) <= 6  # all, none, and four halvings of sixteen
    skipped = tautomer.optimize(model, (X,), passes=["fold-into-writer", BreakOneTanh(place)], skip=[culprit.id], check=False)
    assert metric(skipped)


def test_nothing_is_found_where_nothing_is_broken():
    model = Stack().eval()
    metric, calls = agrees(model)
    assert tautomer.bisect(model, (X,), None, metric) is None
    assert len(calls) == 1 and calls[0] >= 8


def test_a_metric_that_always_fails_is_bad_input():
    with pytest.raises(UsageError, match="fails before anything was rewritten"):
        tautomer.bisect(Stack().eval(), (X,), {}, lambda module: False)


def test_a_log_is_replayed_on_a_fresh_copy():
    model = Stack().eval()
    fast = tautomer.optimize(model, (X,))
    again = tautomer.replay(fast.report.log, model, (X,))
    assert [a.id for a in again.report.applications] == [a.id for a in fast.report.applications]
    assert again.code == fast.code
    assert again.report.evidence is not None
    torch.testing.assert_close(again(X), fast(X), rtol=0, atol=0)


def test_a_shortened_log_makes_less():
    model = Stack().eval()
    log = tautomer.optimize(model, (X,), passes=["fold-into-writer"]).report.log
    assert len(log.applications) == 8
    del log.applications[::2]
    again = tautomer.replay(log, model, (X,))
    assert [a.id for a in again.report.applications] == [a.id for a in log.applications]
    assert again.report.after.ops["aten.mul"] == 4
    log.applications.clear()
    assert tautomer.replay(log, model, (X,)).report.after.ops["aten.mul"] == 8


def test_a_log_of_another_model_says_what_is_missing():
    log = tautomer.optimize(Stack().eval(), (X,), passes=["fold-into-writer"]).report.log
    with pytest.raises(UsageError, match=r"could be made again: fold-into-writer@mul, "):
        tautomer.replay(log, nn.Linear(8, 8).eval(), (X,))


def test_passes_of_ones_own_are_given_with_the_log():
    model, mine = Stack().eval(), BreakOneTanh(9)
    log = tautomer.optimize(model, (X,), passes=[mine]).report.log
    with pytest.raises(UsageError, match="no pass 'break-one-tanh'"):
        tautomer.replay(log, model, (X,))
    assert len(tautomer.replay(log, model, (X,), passes=[mine]).report.applications) == 8
