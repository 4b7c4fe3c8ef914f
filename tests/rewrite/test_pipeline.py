"""The pipeline rolls back what breaks its claim, names it, and keeps the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC, BITWISE, FORWARD
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.pipeline import claim_of, run_passes
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import Operand, Ops, Rule

aten = torch.ops.aten


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + x) * torch.sigmoid(x) - torch.exp(x)


class Double(Rule):
    """x + x = 2 x"""

    claim = ALGEBRAIC

    def before(self, op: Ops, x: Operand) -> Operand:
        return op.add(x, x)

    def after(self, op: Ops, x: Operand) -> Operand:
        return op.mul(x, 2)


class Swap(Rule):
    """tanh(x) = sigmoid(x), which is wrong."""

    claim = ALGEBRAIC

    def before(self, op: Ops, x: Operand) -> Operand:
        return op.tanh(x)

    def after(self, op: Ops, x: Operand) -> Operand:
        return op.sigmoid(x)


class Lie(Pass):
    """Negates every exp, which is wrong, in a pass that checks nothing itself."""

    claim = FORWARD

    def run(self, program: Program, context: Context) -> None:
        for node in program.graph.find_nodes(op="call_function", target=aten.exp.default):
            if "lie" not in node.meta:
                node.meta["lie"] = True
                with program.graph.inserting_after(node):
                    new = program.graph.call_function(aten.neg.default, (node,))
                new.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
                context.applied(self, node)


def net() -> Program:
    return capture(Net().eval(), (torch.randn(3, 4),))


def test_a_rule_that_lies_is_refused_where_it_stands() -> None:
    program = net()
    outcome = run_passes((Double(), Swap()), program)
    assert [a.rewrite for a in outcome.log.applications] == ["double"]
    assert any(r.rewrite == "swap" and "claim" in r.reason for r in outcome.log.refusals)
    assert outcome.evidence is not None and outcome.evidence.forward <= 1e-12


def test_a_pass_that_lies_is_rolled_back_and_the_rest_stands() -> None:
    program = net()
    outcome = run_passes((Lie(), Double()), program)
    assert list(outcome.withdrawn) == ["lie"] and program.count(aten.neg.default) == 0
    assert [a.rewrite for a in outcome.log.applications] == ["double"] and program.count(aten.add.Tensor) == 0


def test_rules_of_one_group_are_admitted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the check of single applications blind, the check of the whole still finds the one that lies."""
    monkeypatch.setattr(
        "tautomer.rewrite.pipeline.apply_rules", lambda rules, program, context: apply_rules(rules, program, blind(context))
    )
    program = net()
    outcome = run_passes((Double(), Swap()), program)
    assert list(outcome.withdrawn) == ["swap"] and program.count(aten.tanh.default) == 1
    assert [a.rewrite for a in outcome.log.applications] == ["double"]


def blind(context: Context) -> Context:
    context.check = False
    return context


def test_unchecked_is_unchecked() -> None:
    program = net()
    outcome = run_passes((Lie(),), program, check=False)
    assert outcome.evidence is None and program.count(aten.neg.default) == 1


def test_the_claim_of_a_chain_is_its_weakest() -> None:
    context = Context()
    program = net()
    passes = (Double(), Lie())
    run_passes(passes, program, context, check=False)
    claim = claim_of(context.log, passes)
    assert (claim.forward, claim.gradient) == ("equal", "none")
    assert claim_of(Context().log, passes).forward == BITWISE.forward
