"""A wrong rewrite is caught, located and said; a right one passes without a tolerance of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC, FORWARD
from tautomer.rewrite.errors import ClaimBroken
from tautomer.rewrite.evidence import relative_error
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.program import Program
from tautomer.rewrite.relations import Centred, relate
from tautomer.rewrite.samples import samples
from tautomer.rewrite.verification import check_program
from tautomer.rewrite.weights import Apply

aten = torch.ops.aten
D = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.linear(self.norm(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def pair() -> tuple[Program, Program]:
    torch.manual_seed(0)
    old = capture(Model().eval(), (torch.randn(3, 5, D),))
    return old, old.copy()


def call(program: Program, target: Callable[..., Tensor], index: int = 1) -> torch.fx.Node:
    return program.graph.find_nodes(op="call_function", target=target)[index]


def wrong_eps(program: Program) -> None:
    norm = call(program, aten.layer_norm.default)
    norm.args = (*norm.args[:4], 1e-4, *norm.args[5:])


def wrong_activation(program: Program) -> None:
    call(program, aten.gelu.default).kwargs = {"approximate": "tanh"}


def wrong_operand(program: Program) -> None:
    first, second = (call(program, aten.linear.default, i) for i in (0, 1))
    second.args = (second.args[0], first.args[1], second.args[2])


def dropped_residual(program: Program) -> None:
    add = call(program, aten.add.Tensor)
    add.replace_all_uses_with(add.args[1])


@pytest.mark.parametrize("damage", [wrong_eps, wrong_activation, wrong_operand, dropped_residual])
def test_damage_is_caught_and_located(damage: Callable[[Program], None]) -> None:
    old, new = pair()
    damage(new)
    with pytest.raises(ClaimBroken, match=r"blocks\.[12]") as caught:
        check_program(old, new, ALGEBRAIC)
    assert isinstance(caught.value, AssertionError) and caught.value.where is not None


def test_an_equal_program_passes_at_several_sizes() -> None:
    old, new = pair()
    for index in range(3):
        add = call(new, aten.add.Tensor, index)
        add.args = (add.args[1], add.args[0])
    evidence = check_program(old, new, ALGEBRAIC)
    assert evidence.forward <= 1e-15 and len(evidence.sizes) == 2


def edit(program: Program, name: str, *tail: object, target: Callable[..., Tensor] = aten.mul.Tensor) -> None:
    node = next(n for n in program.graph.find_nodes(op="get_attr") if n.target == name)
    leaf = program.weights[name].expression
    node.target = program.weights.stage(Apply(target, (leaf, *tail)), node.meta["val"], name)


def test_weights_are_compared_through_the_weight_map() -> None:
    old, new = pair()
    edit(new, "blocks.1.linear.weight", 2.0)
    half = call(new, aten.linear.default)
    with new.graph.inserting_before(half):
        scaled = new.graph.call_function(aten.mul.Tensor, (half.args[0], 0.5))
    scaled.meta.update(half.args[0].meta)
    half.args = (scaled, *half.args[1:])
    assert check_program(old, new, ALGEBRAIC).gradients > 0


def test_a_gradient_that_is_cut_is_caught_only_where_the_claim_speaks_of_it() -> None:
    old, new = pair()
    edit(new, "blocks.1.linear.weight", target=aten.detach.default)
    assert check_program(old, new, FORWARD).gradient is None
    with pytest.raises(ClaimBroken, match="gradients"):
        check_program(old, new, ALGEBRAIC)


def test_a_model_that_draws_random_numbers_draws_the_same_on_both_sides() -> None:
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            kept = torch.rand(x.shape[0], x.shape[1]).argsort(1)[:, :2, None].expand(-1, -1, D)
            return self.linear(x.gather(1, kept)) + torch.randn_like(x)[:, :2]

    torch.manual_seed(0)
    old = capture(Masks().eval(), (torch.randn(3, 5, D),))
    new = old.copy()
    add = call(new, aten.add.Tensor, 0)
    add.args = (add.args[1], add.args[0])
    before = torch.get_rng_state()
    assert check_program(old, new, ALGEBRAIC).forward <= 1e-15 and torch.equal(torch.get_rng_state(), before)
    add.args = (add.args[0], add.args[0])
    with pytest.raises(ClaimBroken):
        check_program(old, new, ALGEBRAIC)


def test_the_oracle_keeps_what_is_written_into_a_tensor_that_the_model_makes() -> None:
    class Marks(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            marks = torch.ones(x.shape[0], 4)
            marks[:, :2] = 0
            return x + 1, marks

    program = capture(Marks().eval(), (torch.randn(3, 4),))
    wide = interpret(program, program.example, dtype=torch.float64)[1]
    assert wide.dtype == torch.float64 and wide[:, :2].sum() == 0 and wide[:, 2:].all()


class Sharp(nn.Module):
    """Scores so large that one rounding of a weight moves the softmax, and its gradient, by a millionth."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        nn.init.ones_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * 3e9).softmax(-1) * x


def in_two_steps(program: Program) -> fx.Node:
    """c y = (c / 3) (3 y), which rounds elsewhere; the second product."""
    product = call(program, aten.mul.Tensor, 0)
    with program.graph.inserting_before(product):
        first = program.graph.call_function(aten.mul.Tensor, (product.args[0], 3.0))
    first.meta.update(product.meta)
    product.args = (first, 1e9)
    return product


def test_gradients_that_amplify_a_rounding_are_held_to_what_they_amplify() -> None:
    torch.manual_seed(0)
    old = capture(Sharp().eval(), (1e-9 * torch.randn(3, 5, D),))
    right, wrong = old.copy(), old.copy()
    in_two_steps(right)
    evidence = check_program(old, right, ALGEBRAIC)
    assert evidence.gradient is not None and evidence.gradient <= 1e-10
    assert any("one float64 rounding" in note for note in evidence.notes)
    product = in_two_steps(wrong)
    product.args = (product.args[0], 1.001e9)
    with pytest.raises(ClaimBroken):
        check_program(old, wrong, ALGEBRAIC)


def test_what_one_gradient_amplifies_excuses_no_other() -> None:
    class Both(Sharp):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.gain.sin()

    torch.manual_seed(0)
    old = capture(Both().eval(), (1e-9 * torch.randn(3, 5, D),))
    right, wrong = old.copy(), old.copy()
    in_two_steps(right)
    check_program(old, right, ALGEBRAIC)
    in_two_steps(wrong)
    sine = call(wrong, aten.sin.default, 0)
    with wrong.graph.inserting_after(sine):  # sin(g) = sin(g) - c sin(g) + c sin(g), of which one part has no gradient
        stopped = wrong.graph.call_function(aten.detach.default, (sine,))
    with wrong.graph.inserting_after(stopped):
        product = wrong.graph.call_function(aten.lerp.Scalar, (sine, stopped, 1e-7))
    for node in (stopped, product):
        node.meta.update(sine.meta)
    sine.replace_all_uses_with(product, delete_user_cb=lambda user: user not in (stopped, product))
    with pytest.raises(ClaimBroken, match="gradients differ by 1"):
        check_program(old, wrong, ALGEBRAIC)


def test_what_one_output_amplifies_excuses_no_other() -> None:
    class Two(Sharp):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), self.linear(x).sin()

    torch.manual_seed(0)
    old = capture(Two().eval(), (1e-9 * torch.randn(3, 5, D),))
    wrong = old.copy()
    sine = call(wrong, aten.sin.default, 0)
    with wrong.graph.inserting_before(sine):
        near = wrong.graph.call_function(aten.mul.Tensor, (sine.args[0], 1 + 1e-8))
    near.meta.update(sine.meta)
    sine.args = (near,)
    with pytest.raises(ClaimBroken, match="outputs differ by"):
        check_program(old, wrong, ALGEBRAIC)


def test_a_relation_that_does_not_hold_is_named() -> None:
    old, new = pair()
    relate(call(new, aten.gelu.default), Centred(2))
    with pytest.raises(ClaimBroken, match="not what the rewrite says"):
        check_program(old, new, ALGEBRAIC)


def test_a_lost_dtype_is_caught() -> None:
    old, new = pair()
    result = new.output.args[0][0]
    with new.graph.inserting_before(new.output):
        narrow = new.graph.call_function(aten.to.dtype, (result, torch.bfloat16))
        back = new.graph.call_function(aten.to.dtype, (narrow, torch.float32))
    new.output.args = ((back,),)
    with pytest.raises(ClaimBroken, match="float32 output 0"):
        check_program(old, new, ALGEBRAIC)


def test_the_user_generator_does_not_notice() -> None:
    old, new = pair()
    state = torch.get_rng_state()
    check_program(old, new, ALGEBRAIC)
    assert torch.equal(state, torch.get_rng_state())


def test_samples_vary_sizes_and_keep_kinds() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, D)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.table(ids) * mask[..., None]

    program = capture(Lookup().eval(), (torch.randint(9, (4, 30)), torch.ones(4, 30, dtype=torch.long)))
    small, odd = samples(program)
    assert [x.shape for x in small.inputs] == [(2, 16), (2, 16)]
    assert [x.shape for x in odd.inputs] == [(1, 7), (1, 7)]
    assert all(int(s.inputs[0].min()) >= 0 and int(s.inputs[0].max()) < 9 for s in (small, odd))
    assert bool((odd.inputs[1] == 1).all())


def test_a_batch_of_one_is_checked_at_two() -> None:
    program = capture(Model().eval(), (torch.randn(1, 5, D),))
    assert [x.inputs[0].shape for x in samples(program)] == [(2, 5, D), (1, 3, D)]


@pytest.mark.parametrize(
    ("value", "reference", "expected"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 0.5),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), 0.0),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0]), 0.0),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), float("inf")),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), float("inf")),
        (torch.tensor([0.5]), torch.tensor([0.0]), 0.5),
        (torch.tensor([1]), torch.tensor([2]), float("inf")),
        (torch.zeros(2), torch.zeros(3), float("inf")),
        (None, None, 0.0),
    ],
)
def test_relative_error(value: object, reference: object, expected: float) -> None:
    assert relative_error(value, reference) == expected


def test_gradients_follow_a_weight_that_moved_into_the_next_block() -> None:
    """b of block 0 and the weight of block 1 meet in one new bias; neither block agrees alone."""
    torch.manual_seed(0)
    old = capture(nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)).eval(), (torch.randn(3, D),))
    new = old.copy()
    first = call(new, aten.linear.default, 0)
    weights = {str(n.target): n for n in new.graph.find_nodes(op="get_attr")}
    b, W, c = (new.weights[name].expression for name in ("0.bias", "1.weight", "1.bias"))
    moved = new.weights.stage(
        Apply(aten.add.Tensor, (c, Apply(aten.mv.default, (W, b)))), weights["1.bias"].meta["val"], "1.bias"
    )
    weights["1.bias"].target = moved
    first.args = (*first.args[:2], None)
    first.meta["origin"] = "elsewhere"
    evidence = check_program(old, new, ALGEBRAIC)
    assert evidence.gradients == 10  # x and four parameters, at two scales
    weights["1.bias"].target = new.weights.stage(
        Apply(aten.add.Tensor, (c, Apply(aten.mv.default, (W, Apply(aten.detach.default, (b,)))))),
        weights["1.bias"].meta["val"],
        "1.bias",
    )
    with pytest.raises(ClaimBroken, match="gradients"):
        check_program(old, new, ALGEBRAIC)


def test_a_value_computed_once_for_all_blocks_is_no_gradient_of_one() -> None:
    """A table that does not train enters block 1 by another node once two equal views are merged."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
            self.register_buffer("table", torch.randn(5, D))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) * self.table.unsqueeze(0).exp()
            return x

    old = capture(Shared().eval(), (torch.randn(3, 5, D),))
    new = old.copy()
    first, second = (call(new, aten.exp.default, i) for i in (0, 1))
    second.replace_all_uses_with(first)
    assert check_program(old, new, ALGEBRAIC).gradient is not None


def test_two_merged_values_are_one_input_of_the_next_block() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            h = self.blocks[0](x)
            return self.blocks[1](h.exp()) * h.exp()

    old = capture(Twice().eval(), (torch.randn(3, D),))
    new = old.copy()
    first, second = (call(new, aten.exp.default, i) for i in (0, 1))
    second.replace_all_uses_with(first)
    new.graph.erase_node(second)
    assert check_program(old, new, ALGEBRAIC).gradients > 0


def test_a_wrong_edit_in_one_of_several_equal_blocks_is_caught() -> None:
    """The blocks look alike, and the first is right: what their weights are made of is part of what they are."""
    old, new = pair()
    for index, target in enumerate((aten.clone.default, aten.detach.default, aten.clone.default)):
        (read,) = (x for x in call(new, aten.linear.default, index).all_input_nodes if str(x.target).endswith("linear.weight"))
        edit = Apply(target, (new.weights[str(read.target)].expression,))
        read.target = new.weights.stage(edit, new.weights[str(read.target)].meta, str(read.target))
    with pytest.raises(ClaimBroken, match="gradients differ"):
        check_program(old, new, ALGEBRAIC)
