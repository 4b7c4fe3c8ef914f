"""The engine: a fixpoint of transactions. What does not hold leaves no trace but its sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC, BITWISE, FORWARD
from tautomer.rewrite.engine import apply_rules, compiled
from tautomer.rewrite.errors import InvalidGraph
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.rules import Rule, Weight, require

aten = torch.ops.aten


class DoubleIsAdd(Rule):
    claim = ALGEBRAIC

    def before(self, op, x):
        return op.mul(x, 2)

    def after(self, op, x):
        return op.add(x, x)


class DropDoubleNeg(Rule):
    claim = BITWISE

    def before(self, op, x):
        return op.neg(op.neg(x))

    def after(self, op, x):
        return x


class FoldScale(Rule):
    claim = ALGEBRAIC

    def before(self, op, x, s: Weight, W: Weight):
        return op.linear(op.mul(x, s), W)

    def after(self, op, x, s, W):
        return op.linear(x, op.mul(W, s))


class MergeSiblings(Rule):
    claim = ALGEBRAIC

    def before(self, op, x, A: Weight, B: Weight):
        return op.linear(x, A), op.linear(x, B)

    def after(self, op, x, A, B):
        both = op.split(op.linear(x, op.cat([A, B], 0)), op.width(op.t(A)), -1)
        return op.getitem(both, 0), op.getitem(both, 1)


class Body(nn.Module):
    def __init__(self, forward, **weights):
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def program_of(forward, **weights):
    return capture(Body(forward, **weights), (torch.randn(3, 5, 4),))


def rewrite(program, *rules, **options):
    """Apply, and hold the whole program to the original in float64."""
    before, context = interpret(program, program.example, dtype=torch.float64), Context(**options)
    apply_rules(rules, program, context)
    program.graph.lint()
    for a, b in zip(before, interpret(program, program.example, dtype=torch.float64), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    return context.log


def test_it_fires_everywhere_and_once():
    program = program_of(lambda m, x: (x * 2).tanh() * 2)
    assert len(rewrite(program, DoubleIsAdd()).applications) == 2
    assert program.count(aten.mul.Tensor) == 0
    assert not rewrite(program, DoubleIsAdd()).applications


def test_the_new_node_stands_for_the_old_one():
    program = program_of(lambda m, x: x * 2)
    old = program.output.args[0][0]
    value = old.meta["val"]
    rewrite(program, DoubleIsAdd())
    new = program.output.args[0][0]
    assert new.meta["origin"] == old.name
    assert new.meta["val"] is value, "metadata that did not change is kept"


def test_chained_matches_are_all_rewritten():
    program = program_of(lambda m, x: x.add(1).neg().neg().neg().neg())
    assert len(rewrite(program, DropDoubleNeg()).applications) == 2
    assert program.count(aten.neg.default) == 0


def test_a_result_may_be_an_operand():
    program = program_of(lambda m, x: x.neg().neg() + 1)
    rewrite(program, DropDoubleNeg())
    assert "neg" not in str(program)


def test_weights_are_staged_and_the_old_chain_dies():
    program = program_of(lambda m, x: nn.functional.linear(x * m.s, m.W), s=torch.randn(4), W=torch.randn(6, 4))
    rewrite(program, FoldScale())
    assert program.count(aten.mul.Tensor) == 0
    assert [node.target for node in program.graph.find_nodes(op="get_attr")] == ["W_1"]


def test_siblings_become_one_and_stand_before_their_first_reader():
    weights = {"A": torch.randn(6, 4), "B": torch.randn(6, 4)}
    program = program_of(lambda m, x: nn.functional.linear(x, m.A).tanh() + nn.functional.linear(x, m.B), **weights)
    assert len(rewrite(program, MergeSiblings()).applications) == 1
    assert program.count(aten.linear.default) == 1


def test_another_reader_inside_refuses_and_is_named():
    program = program_of(lambda m, x: (nn.functional.linear(y := x * m.s, m.W), y), s=torch.randn(4), W=torch.randn(4, 4))
    before = str(program)
    log = rewrite(program, FoldScale())
    assert not log.applications and str(program) == before
    assert "is also read by output" in log.refusals[0].reason


def test_a_matrix_is_not_stored_twice():
    program = program_of(lambda m, x: nn.functional.linear(x * m.s, m.W) @ m.W, s=torch.randn(4), W=torch.randn(4, 4))
    names = list(program.weights)
    (refusal,) = rewrite(program, FoldScale()).refusals
    assert refusal.reason.startswith("'W' would be stored twice: aten.") and "also reads it" in refusal.reason
    assert list(program.weights) == names


def test_a_broken_claim_is_rolled_back_with_its_number():
    class Wrong(DoubleIsAdd):
        def after(self, op, x):
            return op.add(op.mul(x, 2.001), 0.0)

    program = program_of(lambda m, x: x * 2 + (x + 1) * 2)
    before = str(program)
    log = rewrite(program, Wrong())
    assert str(program) == before and not log.applications
    assert len(log.refusals) == 2
    assert "claim 'algebraic' does not hold here: forward differs by" in log.refusals[0].reason


def test_a_wrong_gradient_is_a_broken_claim_unless_none_was_promised():
    class Detach(Rule):
        claim = ALGEBRAIC

        def before(self, op, x):
            return op.mul(op.tanh(x), 2)

        def after(self, op, x):
            return op.add(op.tanh(op.detach(x)), op.tanh(op.detach(x)))

    class DetachForInference(Detach):
        claim = FORWARD

    program = program_of(lambda m, x: (x * m.s).tanh() * 2, s=torch.randn(4))
    assert "gradient differs" in rewrite(program, Detach()).refusals[0].reason
    assert len(rewrite(program, DetachForInference()).applications) == 1


def test_a_wrong_epsilon_is_a_broken_claim():
    class LosesEps(Rule):
        claim = ALGEBRAIC

        def before(self, op, x, shape, eps):
            return op.layer_norm(x, shape, None, None, eps)

        def after(self, op, x, shape, eps):
            return op.layer_norm(x, shape, None, None, eps * 10)

    program = program_of(lambda m, x: nn.functional.layer_norm(x, (4,), eps=1e-8))
    assert "does not hold" in rewrite(program, LosesEps()).refusals[0].reason


def test_an_impossible_shape_is_rolled_back():
    class Impossible(DoubleIsAdd):
        def after(self, op, x):
            return op.matmul(x, x)

    class OtherShape(DoubleIsAdd):
        def after(self, op, x):
            return op.mean(op.add(x, x), [-1], True)

    program = program_of(lambda m, x: x.exp() * 2)
    before = str(program)
    assert "is impossible" in rewrite(program, Impossible()).refusals[0].reason
    sentence, *lines = rewrite(program, OtherShape()).refusals[0].reason.splitlines()
    assert sentence.startswith("the result would change: shape [")
    assert [row[:4] + row[4:].split("(")[0] for row in lines] == [
        "    exp = aten.exp",
        "  + add = aten.add",
        "  + mean = aten.mean",
        "  - mul = aten.mul",
        "    output = output",
    ]
    assert str(program) == before


def test_other_strides_are_repaired_downstream_or_refused():
    class Restride(Rule):
        claim = BITWISE

        def before(self, op, x):
            return op.tanh(x)

        def after(self, op, x):
            return op.transpose(op.transpose(op(aten.clone.default)(op.transpose(op.tanh(x), -2, -1)), -2, -1), -2, -1)

    class Transposing(Restride):
        def before(self, op, x):
            return op.sigmoid(x)

        def after(self, op, x):
            copied = op(aten.contiguous.default)(op.transpose(op.sigmoid(x), -2, -1))
            return op.transpose(copied, -2, -1)

    program = program_of(lambda m, x: (x.sigmoid() + 1).exp())
    assert len(rewrite(program, Transposing(), fuel=1).applications) == 1
    assert not program.output.args[0][0].meta["val"].is_contiguous(), "metadata downstream follows"
    program = program_of(lambda m, x: torch.ops.aten.view.default(x.sigmoid(), [-1, 20]))
    program.output.args[0][0].target = aten.view.default
    assert "downstream could not run" in rewrite(program, Transposing(), fuel=1).refusals[0].reason


def test_memory_that_is_written_is_not_matched():
    program = program_of(lambda m, x: x * 2)
    program.output.args[0][0].meta["tautomer_mutated"] = True
    assert "written in place" in rewrite(program, DoubleIsAdd()).refusals[0].reason


def test_larger_patterns_go_first_then_the_declared_order():
    class Triple(Rule):
        claim = BITWISE

        def before(self, op, x):
            return op.neg(op.neg(op.neg(x)))

        def after(self, op, x):
            return op.neg(x)

    log = rewrite(program_of(lambda m, x: x.neg().neg().neg()), DropDoubleNeg(), Triple())
    assert [a.rewrite for a in log.applications] == ["triple"]
    assert [(r.id.rpartition("/")[2], r.reason) for r in log.refusals] == [
        ("drop-double-neg@neg_2", "triple took these nodes first"),
        ("drop-double-neg@neg_1", "triple took these nodes first"),
    ]


def test_overlapping_rules_fire_in_a_defined_order():
    """Downstream first, larger before smaller, then as declared; what lost its match to another rule does not fire."""

    class ExpOfNeg(Rule):
        claim = ALGEBRAIC

        def before(self, op, x):
            return op.exp(op.neg(x))

        def after(self, op, x):
            return op.reciprocal(op.exp(x))

    class MulExp(Rule):
        claim = ALGEBRAIC

        def before(self, op, x, y):
            return op.mul(op.exp(x), op.exp(y))

        def after(self, op, x, y):
            return op.exp(op.add(x, y))

    forward = lambda m, x: (-x).exp() * x.tanh().exp()  # noqa: E731
    for rules in ((ExpOfNeg(), MulExp()), (MulExp(), ExpOfNeg())):
        log = rewrite(program_of(forward), *rules)
        assert [(a.rewrite, a.id.rpartition("/")[2]) for a in log.applications] == [("mul-exp", "mul-exp@mul")]
        assert [(r.id, r.reason) for r in log.refusals] == [("exp-of-neg@exp", "mul-exp took these nodes first")]

    class AlsoDoubleIsAdd(DoubleIsAdd):
        pass

    for first, second in ((DoubleIsAdd(), AlsoDoubleIsAdd()), (AlsoDoubleIsAdd(), DoubleIsAdd())):
        log = rewrite(program_of(lambda m, x: x * 2), first, second)
        assert [a.rewrite for a in log.applications] == [first.name]
        assert [(r.rewrite, r.reason) for r in log.refusals] == [(second.name, f"{first.name} took these nodes first")]


def test_who_would_not_have_fired_has_lost_nothing():
    class Choosy(DoubleIsAdd):
        def where(self, m):
            require(m.root.name == "nothing", "another node")

    class NegExp(Rule):
        claim = ALGEBRAIC

        def before(self, op, x):
            return op.neg(op.exp(op.mul(x, 2)))

        def after(self, op, x):
            return op.neg(op.exp(op.add(x, x)))

    forward = lambda m, x: -(x * 2).exp()  # noqa: E731
    assert not rewrite(program_of(forward), NegExp(), Choosy()).refusals, "its condition does not hold"
    assert not rewrite(program_of(lambda m, x: (-(y := x * 2).exp(), y)), NegExp(), DoubleIsAdd()).refusals[1:], "it fires itself"
    log = rewrite(program_of(forward), NegExp(), DoubleIsAdd(), skip=("double-is-add",))
    assert not log.refusals, "it was not wanted"
    log = rewrite(program_of(forward), NegExp(), DoubleIsAdd())
    assert [(a.rewrite) for a in log.applications] == ["neg-exp"]
    assert [(r.rewrite, r.reason) for r in log.refusals] == [("double-is-add", "neg-exp took these nodes first")]


def test_what_a_rule_makes_is_rewritten_by_the_next():
    class SigmoidIsTanh(Rule):
        claim = ALGEBRAIC

        def before(self, op, x):
            return op.add(op.mul(op.sigmoid(op.add(x, x)), 2), -1)

        def after(self, op, x):
            return op.tanh(x)

    program = program_of(lambda m, x: (x * 2).sigmoid() * 2 + -1)
    log = rewrite(program, DoubleIsAdd(), SigmoidIsTanh())
    assert "sigmoid-is-tanh" not in [a.rewrite for a in log.applications], "the outer product became a sum first"

    class Outer(SigmoidIsTanh):
        def before(self, op, x):
            sigmoid = op.sigmoid(op.add(x, x))
            return op.add(op.add(sigmoid, sigmoid), -1)

    program = program_of(lambda m, x: (x * 2).sigmoid() * 2 + -1)
    log = rewrite(program, Outer(), DoubleIsAdd())
    assert [a.rewrite for a in log.applications] == ["double-is-add", "double-is-add", "outer"]
    assert program.count(aten.tanh.default) == 1


def test_a_chain_through_the_whole_graph_is_followed_up_to_its_end():
    def forward(m, x):
        for _ in range(40):
            x = x.neg()
        return x.add(1)

    program = program_of(forward)
    assert len(rewrite(program, DropDoubleNeg()).applications) == 20
    assert program.count(aten.neg.default) == 0


def test_rules_that_undo_each_other_are_stopped():
    class AddIsDouble(Rule):
        claim = ALGEBRAIC

        def before(self, op, x):
            return op.add(x, x)

        def after(self, op, x):
            return op.mul(x, 2)

    with pytest.raises(InvalidGraph, match=r"does not end: (double-is-add|add-is-double) and"):
        rewrite(program_of(lambda m, x: x * 2), DoubleIsAdd(), AddIsDouble())


def test_fuel_and_skip_hold():
    forward = lambda m, x: (x * 2).tanh() * 2  # noqa: E731
    assert len(rewrite(program_of(forward), DoubleIsAdd(), fuel=1).applications) == 1
    assert not rewrite(program_of(forward), DoubleIsAdd(), skip=("double-is-add",)).applications


def test_a_refusal_that_lost_its_reason_is_tried_again():
    class DropSecondReader(Rule):
        claim = ALGEBRAIC

        def before(self, op, x):
            return op.mul(op.tanh(x), 0.0)

        def after(self, op, x):
            return op.mul(x, 0.0)

    class TanhNeg(Rule):
        claim = ALGEBRAIC

        def before(self, op, x):
            return op.neg(op.tanh(x))

        def where(self, m):
            require(len(m.nodes[1].users) == 1, "tanh has another reader")

        def after(self, op, x):
            return op.tanh(op.neg(x))

    class DropSharedTanh(DropSecondReader):
        interior = "shared"

    program = program_of(lambda m, x: (-(y := x.tanh()), y * 0.0))
    log = rewrite(program, TanhNeg(), DropSharedTanh())
    assert not log.refusals
    assert len(log.applications) == 2


def test_twelve_equal_layers_are_checked_once(monkeypatch):
    from tautomer.rewrite import engine

    held = []
    hold = engine.hold
    monkeypatch.setattr(engine, "hold", lambda *question: held.append(1) or hold(*question))

    def forward(m, x):
        for _ in range(12):
            x = (x * 2).tanh()
        return x

    assert len(rewrite(program_of(forward), DoubleIsAdd()).applications) == 12
    assert len(held) == 1


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.s, self.t = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return nn.functional.linear(x * self.s, self.W) + nn.functional.linear(x.tanh() * self.t, self.W)


def test_a_matrix_that_two_applications_would_edit_in_two_ways_stays():
    class Both(Rule):
        claim = ALGEBRAIC

        def before(self, op, x, y, s: Weight, t: Weight, W: Weight):
            return op.add(op.linear(op.mul(x, s), W), op.linear(op.mul(y, t), W))

        def after(self, op, x, y, s, t, W):
            return op.add(op.linear(x, op.mul(W, s)), op.linear(y, op.mul(W, t)))

    program, context = capture(Wide(), (torch.randn(3, 4),)), Context()
    apply_rules((Both(),), program, context)
    assert not context.log.applications
    assert context.log.refusals[0].reason.startswith("'W' would be stored twice, edited in two ways")
    assert set(program.weights) == {"W", "s", "t"}


class ReluOfHalf(Rule):
    """Expects that somebody means a relu of any product."""

    claim = BITWISE
    asked = 0

    def before(self, op, x):
        return op.mul(op.relu(x), 0.5)

    def after(self, op, x):
        return op.relu(op.mul(x, 0.5))

    def misses(self, program):
        type(self).asked += 1
        for node in program.graph.find_nodes(op="call_function", target=aten.relu.default):
            if not any(user.target is aten.mul.Tensor for user in node.users) and node.args[0].target is not aten.mul.Tensor:
                yield node, "the relu is not halved"


def test_what_the_pattern_does_not_fit_is_said_once_when_nothing_fires_any_more():
    """Asked too early, the relu that is halved later on would be a miss."""

    class Model(nn.Module):
        def forward(self, x):
            return (x.neg().neg().relu() * 0.5).relu(), x.tanh().relu() + 1

    program, context = capture(Model(), (torch.randn(3, 4),)), Context()
    ReluOfHalf.asked = 0
    apply_rules([ReluOfHalf(), DropDoubleNeg()], program, context)
    assert ReluOfHalf.asked == 1
    assert {a.rewrite for a in context.log.applications} == {"relu-of-half", "drop-double-neg"}
    places = [(r.rewrite, r.reason) for r in context.log.refusals]
    assert places == [("relu-of-half", "the relu is not halved")] * 2, "of the relu and of the tanh, not of what was rewritten"


class Multiplied(Rule):
    claim = BITWISE

    def __init__(self, factor):
        self.factor = factor

    def before(self, op, x):
        return op.mul(x, self.factor)

    def after(self, op, x):
        return op.mul(x, self.factor)


def test_a_pattern_is_compiled_once_for_all_rules_of_a_class_that_say_the_same():
    assert compiled(DoubleIsAdd()) is compiled(DoubleIsAdd()) is not compiled(DoubleIsAdd(), explain=True)
    assert compiled(Multiplied(2)) is compiled(Multiplied(2)) is not compiled(DoubleIsAdd())
    factors = (2, 3, 2.0, True)
    assert len({id(compiled(Multiplied(factor))) for factor in factors}) == 4
    assert [compiled(Multiplied(factor)).roots[0].args[1] for factor in factors] == list(factors)
    unhashable = Multiplied(2)
    unhashable.notes = []
    assert compiled(unhashable) is compiled(unhashable) is not compiled(Multiplied(2))


def test_a_class_whose_left_side_was_exchanged_is_compiled_anew(monkeypatch):
    known = compiled(DoubleIsAdd())
    monkeypatch.setattr(DoubleIsAdd, "before", DropDoubleNeg.before)
    assert compiled(DoubleIsAdd()) is not known and compiled(DoubleIsAdd()).entries[0].target is aten.neg.default
