"""The pipeline rolls back what breaks its claim, names it, and keeps the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tautomer.rewrite.attention_report import AttentionReport
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC, APPROXIMATE, ARCHITECTURE, BITWISE, FORWARD
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.pipeline import claim_of, run_passes
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import Operand, Ops, Rule
from tautomer.rewrite.samples import samples

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


class GiveUp(Lie):
    """Does half of its work, and then meets what it cannot do."""

    def run(self, program: Program, context: Context) -> None:
        super().run(program, context)
        context.log.attentions.append(AttentionReport(self.name, self.claim.name, ()))
        raise Refused("the rest depends on the input")


@pytest.mark.parametrize("check", [True, False])
def test_a_pass_that_gives_up_half_way_is_undone_and_the_rest_stands(check: bool) -> None:
    program = net()
    outcome = run_passes((Double(), GiveUp()), program, check=check)
    assert program.count(aten.neg.default) == 0 and program.count(aten.mul.Tensor) == 2
    assert [(r.rewrite, r.reason) for r in outcome.log.refusals] == [
        ("give-up", "rolled back: the rest depends on the input")
    ] and [a.rewrite for a in outcome.log.applications] == ["double"]
    assert outcome.log.attentions == []


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


class Soften(Rule):
    """sigmoid(x) = tanh(x), which is wrong, and claims no more than to be measured."""

    claim = APPROXIMATE

    def before(self, op: Ops, x: Operand) -> Operand:
        return op.sigmoid(x)

    def after(self, op: Ops, x: Operand) -> Operand:
        return op.tanh(x)


class Forget(Pass):
    """Replaces every tanh by what it reads, or by what ``function`` makes of it."""

    claim = ARCHITECTURE

    def __init__(self, *functions: Callable[..., Tensor]) -> None:
        self.functions = functions

    def run(self, program: Program, context: Context) -> None:
        for node in program.graph.find_nodes(op="call_function", target=aten.tanh.default):
            context.applied(self, node)
            new = node.args[0]
            for function in self.functions:
                with program.graph.inserting_before(node):
                    new = program.graph.call_function(function, (new,))
                new.meta["val"] = function(new.args[0].meta["val"])
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)


def test_a_rewrite_that_claims_less_is_measured_and_said() -> None:
    program = net()
    original = program.copy()
    outcome = run_passes((Double(), Forget(), Soften()), program)
    assert [a.rewrite for a in outcome.log.applications] == ["double", "forget", "soften"]
    evidence = outcome.evidence
    assert evidence is not None and evidence.forward <= 1e-12 and evidence.gradient is not None
    forget, soften = evidence.differences
    assert (forget.rewrite, forget.claim, soften.rewrite, soften.claim) == ("forget", "architecture", "soften", "approximate")
    assert forget.error > 0.1 and soften.error > 0.01
    inputs = next(samples(original)).inputs
    (was,), (now,) = (interpret(p, inputs, dtype=torch.float64) for p in (original, program))
    assert evidence.moved == pytest.approx(float((now - was).abs().max() / was.abs().max()))


@pytest.mark.parametrize("passes", [(Forget(), Lie(), Double()), (Lie(), Forget(), Double()), (Double(), Lie(), Forget())])
def test_equality_is_held_beside_a_rewrite_that_claims_less(passes: tuple[Pass, ...]) -> None:
    outcome = run_passes(passes, program := net())
    assert list(outcome.withdrawn) == ["lie"] and program.count(aten.neg.default) == 0
    assert sorted(a.rewrite for a in outcome.log.applications) == ["double", "forget"]
    assert outcome.evidence is not None and [d.rewrite for d in outcome.evidence.differences] == ["forget"]


def test_even_those_keep_outputs_finite() -> None:
    program = net()
    outcome = run_passes((Forget(aten.log.default), Double()), program)
    assert "not finite" in outcome.withdrawn["forget"] and program.count(aten.tanh.default) == 1
    assert [a.rewrite for a in outcome.log.applications] == ["double"] and not outcome.evidence.differences


def test_another_dtype_is_rolled_back() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    program = capture(Pair().eval(), (torch.randn(3, 4),))
    outcome = run_passes((Forget(aten.isnan.default),), program)
    assert "was torch.float32[" in outcome.withdrawn["forget"] and outcome.evidence is None
    assert program.count(aten.tanh.default) == 1 and not outcome.log.applications


def test_an_index_that_moves_is_counted() -> None:
    class Index(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (torch.tanh(x) - x.abs() / 4).argmax(-1)

    outcome = run_passes((Forget(aten.neg.default),), capture(Index().eval(), (torch.randn(64, 4),)))
    assert 0.2 < outcome.evidence.moved <= 1.0


def test_the_claim_of_a_chain_is_its_weakest() -> None:
    context = Context()
    program = net()
    passes = (Double(), Lie())
    run_passes(passes, program, context, check=False)
    claim = claim_of(context.log.applications, passes)
    assert (claim.forward, claim.gradient) == ("equal", "none")
    assert claim_of((), passes).forward == BITWISE.forward
