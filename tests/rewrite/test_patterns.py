"""Patterns fit what they say, in every order of operands, and nothing else; they say where they stopped."""

from __future__ import annotations

from typing import Annotated

import pytest
import torch
from torch import fx, nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.emit import Editor
from tautomer.rewrite.errors import PatternError
from tautomer.rewrite.ops import OptionalWeight, Parameter, Scalar, Tensor, Weight
from tautomer.rewrite.patterns import compile_pattern, congruent


class Model(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4))
        self.W = nn.Parameter(torch.randn(4, 4))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def found(before, forward, at=-1):
    """What the pattern binds in ``forward``, at every node, as dicts of node names and literals."""
    program = capture(Model(forward), (torch.randn(3, 5, 4),))
    pattern, editor = compile_pattern(before), Editor(program)
    is_weight = lambda x: isinstance(x, fx.Node) and editor.constant(x)  # noqa: E731
    names = [v.name for v in pattern.variables]
    ways = []
    for node in program.graph.nodes:
        for entry in pattern.entries:
            if node.target is entry.target:
                ways += [dict(zip(names, map(str, way.values), strict=True)) for way in entry.match(node, is_weight)]
    return ways


def test_a_literal_is_part_of_identity():
    def before(op, x):
        return op.pow(x, 2)

    assert found(before, lambda m, x: x**2) == [{"x": "x"}]
    assert found(before, lambda m, x: x**2.0) == [{"x": "x"}]
    assert found(before, lambda m, x: x**3) == []


def test_an_axis_is_part_of_identity_and_counts_from_the_end():
    def before(op, x):
        return op.mean(x, [-1], True)

    assert found(before, lambda m, x: x.mean(2, keepdim=True))
    assert not found(before, lambda m, x: x.mean(1, keepdim=True))
    assert not found(before, lambda m, x: x.mean(-1))
    assert not found(before, lambda m, x: x.mean((-2, -1), keepdim=True))


def test_a_dtype_is_part_of_identity():
    def before(op, x):
        return op.cast(x, torch.float64)

    assert found(before, lambda m, x: x.to(torch.float64))
    assert not found(before, lambda m, x: x.to(torch.bfloat16))


def test_a_permutation_is_part_of_identity():
    def before(op, x):
        return op.permute(x, [0, 2, 1])

    assert found(before, lambda m, x: x.permute(0, -1, 1))
    assert not found(before, lambda m, x: x.permute(1, 2, 0))


def test_operands_of_a_commutative_op_are_exchanged_with_backtracking():
    def before(op, x, y):
        return op.add(op.mul(x, op.tanh(y)), op.mul(op.sigmoid(x), y))

    for forward in (
        lambda m, x: x * torch.tanh(m.w) + torch.sigmoid(x) * m.w,
        lambda m, x: torch.sigmoid(x) * m.w + torch.tanh(m.w) * x,
        lambda m, x: m.w * torch.sigmoid(x) + x * torch.tanh(m.w),
    ):
        assert found(before, forward) == [{"x": "x", "y": "w"}]
    assert not found(before, lambda m, x: x * torch.tanh(m.w) + torch.sigmoid(m.w) * x)
    assert not found(before, lambda m, x: torch.add(x * torch.tanh(m.w), torch.sigmoid(x) * m.w, alpha=2))


def test_every_way_is_yielded():
    assert len(found(lambda op, x, y: op.add(x, y), lambda m, x: x.tanh() + x)) == 2


def test_a_variable_binds_one_value_however_it_is_spelled_again():
    def before(op, x):
        return op.mul(op.tanh(x), op.exp(op.tanh(x)))

    def twice(m, x):
        return torch.tanh(x + 1) * torch.exp(torch.tanh(x + 1))

    def other(m, x):
        return torch.tanh(x + 1) * torch.exp(torch.tanh(x + 2))

    assert found(before, twice)
    assert not found(before, other)


def test_types_of_variables():
    def weight(op, x: Tensor, w: Weight):
        return op.mul(x, w)

    def scalar(op, x: Tensor, s: Scalar):
        return op.mul(x, s)

    def optional(op, x, W: Weight, b: OptionalWeight):
        return op.linear(x, W, b)

    assert found(weight, lambda m, x: x * (1 + m.w).exp()) == [{"x": "x", "w": "exp"}]
    assert not found(weight, lambda m, x: x * x.tanh())
    assert found(scalar, lambda m, x: x * 3.5) == [{"x": "x", "s": "3.5"}]
    assert not found(scalar, lambda m, x: x * m.w)
    assert found(optional, lambda m, x: nn.functional.linear(x, m.W)) == [{"x": "x", "W": "W", "b": "None"}]
    assert found(optional, lambda m, x: nn.functional.linear(x, m.W, m.w))
    assert not found(optional, lambda m, x: nn.functional.linear(x, m.W, x.mean((0, 1))))


def test_a_parameter_is_a_weight_itself():
    def before(op, x, w: Parameter):
        return op.mul(x, w)

    assert found(before, lambda m, x: x * m.w) == [{"x": "x", "w": "w"}]
    assert not found(before, lambda m, x: x * m.w.exp())
    assert not found(before, lambda m, x: x * x.tanh())


def test_a_range_of_a_scalar():
    def before(op, x, eps: Annotated[Scalar, "> 0", "<= 1e-3"]):
        return op.add(x, eps)

    assert found(before, lambda m, x: x + 1e-5) == [{"x": "x", "eps": "1e-05"}]
    assert found(before, lambda m, x: x + 1e-3)
    assert not found(before, lambda m, x: x + -1e-5)
    assert not found(before, lambda m, x: x + 1e-2)
    assert not found(before, lambda m, x: x + m.w)


def test_a_dtype_of_a_tensor():
    def before(op, x: Annotated[Tensor, torch.float16, torch.float64]):
        return op.tanh(x)

    assert found(before, lambda m, x: x.double().tanh())
    assert found(before, lambda m, x: x.half().tanh())
    assert not found(before, lambda m, x: x.tanh())


def test_axes_by_name_are_equal_sizes():
    def product(op, x: Annotated[Tensor, "*batch n d"], y: Annotated[Tensor, "*batch d m"]):
        return op.matmul(x, y)

    assert found(product, lambda m, x: x @ x.transpose(1, 2))
    assert not found(product, lambda m, x: x @ x[0].t()), "one of them has no batch"
    assert not found(product, lambda m, x: x @ x[:1].transpose(1, 2)), "one batch is stretched"

    def gain(op, x: Annotated[Tensor, "... d"], g: Annotated[Weight, "d"] | None):
        return op.layer_norm(x, [op.width(x)], g)

    assert found(gain, lambda m, x: nn.functional.layer_norm(x, (4,), m.w)) == [{"x": "x", "g": "w"}]
    assert found(gain, lambda m, x: nn.functional.layer_norm(x, (4,))) == [{"x": "x", "g": "None"}]
    assert not found(gain, lambda m, x: nn.functional.layer_norm(x, (5, 4), (m.w + 0 * x.mean((0, 2))[:, None])))

    def square(op, W: Annotated[Weight, "4 _"], x: Annotated[Tensor, "_ _ 4"]):
        return op.linear(x, W)

    assert found(square, lambda m, x: nn.functional.linear(x, m.W))
    assert not found(square, lambda m, x: nn.functional.linear(x, m.W[:3]))


def test_symbolic_sizes_are_equal_only_if_they_are_for_every_input():
    def before(op, x: Annotated[Tensor, "n ..."], y: Annotated[Tensor, "n ..."]):
        return op.add(op.exp(x), op.tanh(y))

    assert found(before, lambda m, x: x.exp() + (x + 1).tanh())
    assert not found(before, lambda m, x: x.exp() + x[:1].tanh())


def test_a_dtype_or_a_width_is_a_literal_once_its_tensor_is_bound():
    def before(op, x, y):
        return op.mul(op.cast(x, op.dtype(y)), y)

    assert found(before, lambda m, x: x.double() * x.double().exp())[0]["y"] == "exp"
    assert not found(before, lambda m, x: x.double() * x.exp())


def test_alternatives_nest_and_leave_variables_unbound():
    def before(op, x, w):
        scaled = op.any_of(op.mul(x, w), x)
        return op.any_of(op.tanh(scaled), op.neg(op.tanh(scaled)))

    assert found(before, lambda m, x: torch.tanh(x * m.w))[0] == {"x": "x", "w": "w"}
    assert {"x": "x", "w": "None"} in found(before, lambda m, x: torch.tanh(x))


def test_several_roots_are_found_through_a_shared_operand():
    def before(op, x, A: Weight, B: Weight):
        return op.linear(x, A), op.tanh(op.linear(x, B))

    ways = found(before, lambda m, x: (nn.functional.linear(x, m.W), nn.functional.linear(x, m.W + 1).tanh()))
    assert [way["A"] for way in ways] == ["W"]
    assert not found(before, lambda m, x: (nn.functional.linear(x, m.W), nn.functional.linear(x + 1, m.W + 1).tanh()))


def test_lists_of_operands():
    def before(op, x, y):
        return op.cat([op.tanh(x), y], -1)

    assert found(before, lambda m, x: torch.cat([torch.tanh(x), x], 2)) == [{"x": "x", "y": "x"}]
    assert not found(before, lambda m, x: torch.cat([torch.tanh(x), x, x], 2))


def test_ill_formed_patterns():
    with pytest.raises(PatternError, match="does not mention y"):
        compile_pattern(lambda op, x, y: op.tanh(x))
    with pytest.raises(PatternError, match="must be an op"):
        compile_pattern(lambda op, x: x)
    with pytest.raises(PatternError, match="counts from the front"):
        compile_pattern(lambda op, x: op.mean(x, [1], True))
    with pytest.raises(PatternError, match="shares nothing"):
        compile_pattern(lambda op, x, y: (op.tanh(x), op.exp(y)))
    with pytest.raises(PatternError, match="is asked where y is not bound"):
        compile_pattern(lambda op, x, y: op.tanh(op.any_of(op.exp(y), op.cast(x, op.dtype(y)))))


def test_congruence_is_by_value_for_pure_calls_only():
    program = capture(Model(lambda m, x: (x.tanh() * 2, x.tanh() * 2, x.tanh() * 3)), (torch.randn(3, 4),))
    a, b, c = program.output.args[0]
    assert congruent(a, b)
    assert not congruent(a, c)
    a.target = b.target = torch.ops.aten.rand_like.default
    assert not congruent(a, b)
