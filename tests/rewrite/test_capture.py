"""capture: the program computes what the model computes, at any size, and the model is what it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from tautomer.rewrite.capture import capture, capture_parts
from tautomer.rewrite.errors import CaptureError, UsageError
from tautomer.rewrite.interpret import interpret
from tautomer.rewrite.shapes import static

aten = torch.ops.aten


class Block(nn.Module):
    """A pre-norm block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=1.0, *, mask=None):
        y = self.dropout(self.linear(self.norm(x)))
        return x + scale * (y if mask is None else y * mask)


def answers(program, *args, **kwargs):
    with torch.no_grad():
        return program.signature.unflatten(interpret(program, program.signature.bind(args, kwargs)))


def state(model):
    """Everything about a model that a capture could disturb."""
    return {
        "tensors": {name: (t.clone(), t.requires_grad, id(t)) for name, t in model.state_dict(keep_vars=True).items()},
        "modes": [module.training for module in model.modules()],
        "attributes": [{k: id(v) for k, v in vars(module).items()} for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate()),
    }


def assert_same_state(before, after):
    for name, (tensor, trains, identity) in before["tensors"].items():
        other, other_trains, other_identity = after["tensors"][name]
        assert torch.equal(tensor, other) and trains == other_trains and identity == other_identity, name
    assert torch.equal(before["random"][0], after["random"][0]) and before["random"][1] == after["random"][1]
    for entry in ("modes", "attributes", "hooks"):
        assert before[entry] == after[entry], entry


# -- it computes what the model computes ----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_other_sizes(batch):
    model = Block().eval()
    program = capture(model, (torch.randn(batch, 5, 8),))
    for size in (1, 2, 3, 7):
        x = torch.randn(size, 5, 8)
        assert torch.equal(answers(program, x), model(x))
    assert program.mode == "eval"


def test_an_unbatched_input_and_one_whose_size_the_weights_fix():
    model = nn.Linear(4, 2)
    program = capture(model, (torch.randn(4),))
    x = torch.randn(4)
    assert torch.equal(answers(program, x), model(x).detach())
    assert program.notes == ["dimension 0 of 'input' is fixed to 4"]
    with pytest.raises(UsageError, match=r"input.shape\[0\] == 4"):
        program.signature.bind((torch.randn(5),), {})


def test_a_call_with_too_many_arguments_hears_how_many_there_are():
    program = capture(nn.Linear(4, 2), (), {"input": torch.randn(3, 4)})
    with pytest.raises(UsageError, match="Linear takes 1 positional arguments, 2 were given"):
        program.signature.bind((torch.randn(3, 4), 1), {})


def test_the_same_tensor_given_twice_is_two_inputs():
    class Sum(nn.Module):
        def forward(self, x, y):
            return 2 * x + y

    x, y = torch.full((2,), 1.0), torch.full((2,), 10.0)
    assert torch.equal(answers(capture(Sum(), (x, x)), x, y), 2 * x + y)


def test_a_branch_on_a_size_becomes_a_condition_of_the_call():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] > 4 else x * 3

    program = capture(Branch(), (torch.ones(6, 2),))
    assert torch.equal(answers(program, torch.ones(5, 2)), torch.full((5, 2), 2.0))
    with pytest.raises(UsageError, match=r"x.shape\[0\] > 4"):
        answers(program, torch.ones(3, 2))


def test_a_comparison_of_sizes_does_not_fix_them():
    class Compares(nn.Module):
        def forward(self, x):
            return x + 1 if x.shape[0] == 4 else x

    program = capture(Compares(), (torch.ones(4, 2),))
    assert torch.equal(answers(program, torch.ones(4, 2)), torch.full((4, 2), 2.0))
    with pytest.raises(UsageError, match=r"x.shape\[0\] == 4"):
        answers(program, torch.ones(3, 2))


class Loop(nn.Module):
    """A recurrence over the tokens, written as a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.norm = nn.Embedding(50, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids):
        x = self.embed(ids)
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(self.linear(self.norm(x[:, t])) + h)
        return h


def test_a_loop_over_the_length_fixes_the_length():
    model = Loop()
    program = capture(model, (torch.randint(0, 50, (2, 7)),))
    assert program.notes == ["dimension 1 of 'ids' is fixed to 7"]
    ids = torch.randint(0, 50, (5, 7))
    assert torch.equal(answers(program, ids), model(ids).detach())


class Sequences(nn.Module):
    """Models of ``[batch, length, width]`` numbers: one for any length, one for a single length, one with channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        kinds = {"encoder": lambda: layer, "gru": lambda: nn.GRU(8, 8, batch_first=True), "position": lambda: nn.Linear(8, 8)}
        self.kind, self.layer = kind, {**kinds, "channels": lambda: nn.Conv1d(5, 3, 3)}[kind]()
        self.positions = nn.Parameter(torch.randn(5, 8))

    def forward(self, x, mask=None):
        if self.kind == "encoder":
            return self.layer(x, mask)
        y = self.layer(x)
        return y[0] if self.kind == "gru" else y + self.positions if self.kind == "position" else y


@pytest.mark.parametrize(("kind", "fixed"), [("encoder", ()), ("gru", (1,)), ("position", (1,)), ("channels", (1,))])
def test_the_length_of_sequences_of_numbers(kind, fixed):
    model = Sequences(kind).eval()
    program = capture(model, (torch.randn(2, 5, 8),))
    assert program.notes == [f"dimension {dim} of 'x' is fixed to 5" for dim in fixed]
    for batch, length in ((1, 5), (4, 5), (3, 9), (2, 2)):
        x = torch.randn(batch, length, 8)
        if length == 5 or not fixed:
            torch.testing.assert_close(answers(program, x), model(x).detach())
        else:
            with pytest.raises(UsageError, match=r"x.shape\[1\] == 5"):
                answers(program, x)


def test_a_mask_of_positions_goes_with_the_length():
    model = Sequences("encoder").eval()
    program = capture(model, (torch.randn(2, 8, 8), torch.zeros(8, 8)))
    x, mask = torch.randn(3, 6, 8), torch.full((6, 6), float("-inf")).triu(1)
    assert program.notes == []
    torch.testing.assert_close(answers(program, x, mask), model(x, mask).detach())


def test_every_sequence_of_numbers_has_a_length_of_its_own():
    class Across(nn.Module):
        def forward(self, x, y):
            return (y @ x.transpose(1, 2)).softmax(-1) @ x

    program = capture(Across(), (torch.randn(2, 6, 8), torch.randn(2, 5, 8)))
    x, y = torch.randn(3, 4, 8), torch.randn(3, 9, 8)
    assert program.notes == []
    torch.testing.assert_close(answers(program, x, y), Across()(x, y))


def test_truths_about_one_sequence_leave_the_length_of_the_other_free():
    class Across(nn.Module):
        def forward(self, x, y, kept):
            return (y @ x.transpose(1, 2)).masked_fill(~kept[:, None], -1e9).softmax(-1) @ x

    program = capture(Across(), (torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.rand(2, 6) > 0.2))
    x, y, kept = torch.randn(3, 4, 8), torch.randn(3, 9, 8), torch.rand(3, 4) > 0.2
    assert program.notes == []
    torch.testing.assert_close(answers(program, x, y, kept), Across()(x, y, kept))


def test_what_is_added_to_the_scores_of_two_sequences_has_the_lengths_of_both():
    class Across(nn.Module):
        def forward(self, x, y, bias):
            return ((y @ x.transpose(1, 2)).unsqueeze(1) + bias).softmax(-1).mean(1) @ x

    program = capture(Across(), (torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.randn(2, 1, 5, 6)))
    x, y, bias = torch.randn(3, 4, 8), torch.randn(3, 9, 8), torch.randn(3, 1, 9, 4)
    assert program.notes == []
    torch.testing.assert_close(answers(program, x, y, bias), Across()(x, y, bias))


def test_truths_about_positions_say_which_size_of_channels_first_is_the_length():
    class Heard(nn.Conv1d):
        def forward(self, x, kept):
            return super().forward(x) * kept[:, None]

    program = capture(Heard(4, 3, 3, padding=1), (torch.randn(2, 4, 9), torch.rand(2, 9) > 0.2))
    value = program.placeholders[0].meta["val"]
    assert static(value.shape[1]) == 4 and static(value.shape[2]) is None


def test_images_have_a_free_batch_alone():
    program = capture(nn.Conv2d(3, 4, 3), (torch.randn(2, 3, 9, 9),))
    assert program.notes == [] and program.placeholders[0].meta["val"].shape[1:] == (3, 9, 9)


def test_static_and_given_sizes():
    model = Block().eval()
    fixed = capture(model, (torch.randn(2, 5, 8),), dynamic_shapes=None)
    assert fixed.placeholders[0].meta["val"].shape == (2, 5, 8)
    with pytest.raises(UsageError, match=r"x.shape\[0\] == 2"):
        fixed.signature.bind((torch.randn(3, 5, 8),), {})
    batch = torch.export.Dim("batch", min=1, max=64)
    for spec in ({"x": {0: batch}}, ({0: batch},)):
        given = capture(model, (torch.randn(2, 5, 8),), dynamic_shapes=spec)
        x = torch.randn(7, 5, 8)
        assert torch.equal(answers(given, x), model(x))
    with pytest.raises(CaptureError, match="dynamic_shapes"):
        capture(model, (torch.randn(2, 5, 8),), dynamic_shapes={"x": {2: torch.export.Dim("width")}})


def test_keywords_defaults_constants_and_variadic_arguments():
    model = Block().eval()
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, 8)
    program = capture(model, (x,), {"mask": mask, "scale": 2.0})
    assert torch.equal(answers(program, scale=2.0, mask=mask, x=x), model(x, 2.0, mask=mask))
    with pytest.raises(UsageError, match=r"'scale' was 2\.0"):
        answers(program, x, 3.0, mask=mask)

    class Variadic(nn.Module):
        def forward(self, *xs, **named):
            return sum(xs) * named["b"] - named["a"]

    inputs, named = (torch.randn(2, 3), torch.randn(2, 3)), {"b": torch.randn(2, 3), "a": torch.randn(2, 3)}
    program = capture(Variadic(), inputs, named)
    more = [torch.randn(5, 3) for _ in range(4)]
    assert torch.equal(answers(program, *more[:2], a=more[2], b=more[3]), (more[0] + more[1]) * more[3] - more[2])


def test_dataclasses_in_and_out():
    @dataclasses.dataclass
    class Pair:
        first: torch.Tensor
        second: torch.Tensor | None = None

    class Swaps(nn.Module):
        def forward(self, pair):
            return Pair(pair.second, pair.first), 7, None

    program = capture(Swaps(), (Pair(torch.zeros(2, 1), torch.ones(2, 3)),))
    pair, number, nothing = answers(program, Pair(torch.zeros(4, 1), torch.ones(4, 3)))
    assert isinstance(pair, Pair) and pair.first.shape == (4, 3) and number == 7 and nothing is None


def test_weights_are_the_users_own_and_ties_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.full((), 2.0), persistent=False)
            self.unused = nn.Parameter(torch.zeros(3))

        def forward(self, ids):
            return self.head(self.embed(ids)) * self.scale + torch.tensor([1.0])

    model = Tied()
    program = capture(model, (torch.randint(0, 10, (2, 3)),))
    weights = program.weights
    assert weights.leaves["embed.weight"] is model.embed.weight
    assert set(weights.aliases("embed.weight")) == {"embed.weight", "head.weight"}
    assert not weights["scale"].persistent and weights["unused"].kind == "parameter"
    kinds = [weight.kind for weight in weights.entries.values()]
    assert kinds == ["parameter", "parameter", "parameter", "buffer", "constant"]


def test_ambient_autocast_and_inference_mode_stay_out():
    model = Block().eval()
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        program = capture(model, (x,))
    assert program.graph.find_nodes(op="call_function", target=aten.linear.default)[0].meta["val"].dtype == torch.float32
    with torch.inference_mode():
        program = capture(model, (torch.ones(2, 5, 8),))
    assert torch.equal(answers(program, x), model(x))


def test_gradients_through_a_no_grad_region():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

        def forward(self, x):
            with torch.no_grad():
                gate = torch.sigmoid(self.a * x)
            return gate * self.b * x

    model = Frozen()
    x = torch.randn(4, 3, requires_grad=True)
    program = capture(model, (x,))
    interpret(program, [x])[0].sum().backward()
    mine, model_b = (x.grad.clone(), model.b.grad.clone()), model.a.grad
    x.grad = model.b.grad = None
    model(x).sum().backward()
    assert model_b is None and torch.equal(mine[0], x.grad) and torch.equal(mine[1], model.b.grad)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.linear = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids):
        x = self.embed(ids)
        return self.linear(self.norm(x)), x.detach() * 2, ids


@pytest.mark.parametrize("decorator", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients(decorator):
    class Decorated(Norms):
        forward = decorator()(Norms.forward)

    model, ids = Decorated().eval(), torch.randint(0, 9, (2, 3))
    program = capture(model, (ids,))
    outputs = interpret(program, [ids])
    assert not any(output.requires_grad for output in outputs) and torch.equal(outputs[0], model(ids)[0])
    floating = program.output.args[0][:2]
    assert all(node.target is aten.detach.default for node in floating)
    plain = Norms()
    assert [output.requires_grad for output in interpret(capture(plain, (ids,)), [ids])] == [True, False, False]


# -- the model is what it was ---------------------------------------------------------------------------------


class Restless(nn.Module):
    """Does in its forward what a forward should not do, and fails on demand."""

    def __init__(self, failure: str = "") -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.history, self.table, self.plain = [], {"n": 0}, torch.zeros(2)
        self.failure = failure

    def forward(self, x):
        self.calls += 1
        self.history.append(1)
        self.table["n"] += 1
        self.last = x
        with torch.no_grad():
            self.linear.bias.mul_(2)
        y = self.norm(self.linear(x)) + torch.rand(4) * random.random() * 0
        if self.failure == "eager":
            raise RuntimeError("no")
        if self.failure == "export" and y.sum() > 1e9:
            return y * 2
        if self.failure == "class":
            return object()
        return y


@pytest.mark.parametrize("failure", ["", "eager", "export", "class"])
@pytest.mark.parametrize("mode", ["eval", "train", "both"])
def test_the_model_is_what_it_was(failure, mode):
    model = Restless(failure)
    model.norm.eval()
    model.linear.requires_grad_(False)  # what is written under no_grad would lose its gradient
    handle = model.linear.register_forward_pre_hook(lambda module, args: None)
    torch.manual_seed(3)
    before = state(model)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    given = x.clone()
    with pytest.raises((CaptureError, UsageError)) if failure else contextlib.nullcontext():
        program = capture(model, (x,), mode=mode)
        assert any("self.last" in note for note in program.notes) and any("self.history" in note for note in program.notes)
    assert_same_state(before, state(model))
    assert torch.equal(x, given) and model.history == [] and model.table == {"n": 0} and not hasattr(model, "last")
    handle.remove()


def test_running_a_program_moves_no_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    program = capture(model, (torch.randn(5, 4),), mode="train")
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        interpret(program, [torch.randn(6, 4)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_decision_by_value_is_exported_once(monkeypatch):
    """No other sizes would make it a graph."""
    module, tried = sys.modules["tautomer.rewrite.capture"], []
    export = module.export
    monkeypatch.setattr(module, "export", lambda *args, **options: tried.append(1) or export(*args, **options))
    monkeypatch.setattr(module, "_exportable", lambda call: [])

    class Decides(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureError, match="values of a tensor"):
        capture(Decides().eval(), (torch.ones(2, 3),))
    assert len(tried) == 1


class Counts(nn.Module):
    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.uses, self.calls, self.drop = uses, 0, nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        return self.drop(x) * (self.calls if self.uses else 1) + self.steps


def test_state_between_calls_is_noted():
    x = torch.randn(2, 4)
    changes = "the forward changes self.calls; the program does not"
    said = [changes, "Counts keeps state between calls; the program computes what the first call does"]
    model = Counts(uses=True)
    assert capture(model, (x,)).notes == said and model.calls == 0 and float(model.steps) == 0
    assert capture(Counts(uses=False), (x,)).notes == [changes]


def test_backward_hooks_are_noted():
    model = Block().eval()
    model.linear.register_full_backward_hook(lambda module, grads, outputs: None)
    assert capture(model, (torch.randn(2, 5, 8),)).notes == ["the backward hooks of 'linear' are not part of the program"]


# -- what cannot be captured, and what cannot be right --------------------------------------------------------


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        if y.sum() > 0:
            return self.second(y)
        return y


class Items(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


@pytest.mark.parametrize("model", [Decides(), Items()])
def test_a_decision_by_value(model, capfd):
    with pytest.raises(CaptureError, match="values of a tensor") as caught:
        capture(model, (torch.randn(2, 4),))
    assert "test_capture.py" in str(caught.value.where) and ".sum()" in str(caught.value.where)
    assert "torch.where" in str(caught.value) and len(str(caught.value)) < 1500
    shown = capfd.readouterr()
    assert shown.out == shown.err == ""


def test_the_parts_of_what_cannot_be_captured():
    model = Decides()
    with pytest.raises(CaptureError, match="can be captured: first"):
        capture(model, (torch.randn(2, 4),))
    x = torch.randn(3, 4)
    parts = capture_parts(model, (torch.ones(2, 4),))
    assert set(parts) <= {"first", "second"} and torch.equal(answers(parts["first"], x), model.first(x))
    assert set(capture_parts(model.first, (x,))) == {""}


def test_an_unknown_output_class():
    class Thing:
        pass

    class Returns(nn.Module):
        def forward(self, x):
            return Thing()

    with pytest.raises(CaptureError, match="returns a Thing"):
        capture(Returns(), (torch.randn(2),))


def _nan():
    model = Block()
    model.linear.weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: capture(Block, (torch.randn(2, 5, 8),)), "Block is a class, not a model"),
        (lambda: capture(lambda x: x, (torch.randn(2),)), "must be a torch.nn.Module"),
        (lambda: capture(Block()), "missing a required argument: 'x'"),
        (lambda: capture(Block(), torch.randn(2, 5, 8)), "args must be a tuple"),
        (lambda: capture(Block(), (torch.randn(2, 5, 8),), {"max": 1}), "unexpected keyword argument 'max'"),
        (lambda: capture(Block(), (torch.randn(2, 5, 9),)), "Block does not run on the example inputs"),
        (lambda: capture(Block(), (torch.randn(2, 5, 8, device="meta"),)), "'x' is on meta, the weights are on cpu"),
        (lambda: capture(_nan(), (torch.randn(2, 5, 8),)), "'linear.weight' has NaN"),
        (lambda: capture(nn.BatchNorm1d(4), (torch.randn(2, 4),)), "training mode and has batch normalisation"),
        (lambda: capture(nn.LazyLinear(4), (torch.randn(2, 4),)), "'weight' has no shape yet"),
        (lambda: capture(Block(), (torch.randn(2, 5, 8),), mode="evil"), "there is no mode 'evil'"),
        (lambda: capture(Block(), (torch.randn(2, 5, 8),), dynamic_shapes="auot"), "no dynamic_shapes 'auot'\n  try: \"auto\""),
        (lambda: capture(Block(), (torch.randn(2, 5, 8),), dynamic_shapes=({7: torch.export.Dim.AUTO},)), "has no dimension 7"),
        (lambda: capture(Block(), (torch.randn(2, 5, 8).to_sparse(),)), "'x' is a sparse_coo tensor"),
        (
            lambda: capture(Block(), (torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged),)),
            "'x' is a nested tensor",
        ),
        (lambda: capture(torch.compile(Block(), backend="eager"), (torch.randn(2, 5, 8),)), "compiled already"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(UsageError, match=sentence.replace("(", r"\(")):
        call()


def test_weights_of_eight_bits():
    class Eight(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(4, 4).to(torch.float8_e4m3fn))

        def forward(self, x):
            return x @ self.weight.to(x.dtype)

    model, x = Eight(), torch.randn(3, 4)
    assert torch.equal(answers(capture(model, (torch.randn(2, 4),)), x), model(x))


def test_the_entries_of_a_dict_have_no_order():
    class Takes(nn.Module):
        def forward(self, d):
            return d["a"] - d["b"][0]["d"] * d["b"][0]["c"]

    one, two, three = torch.randn(3, 2, 4)
    program = capture(Takes(), ({"a": one, "b": [{"c": two, "d": three}]},))
    wanted = answers(program, {"a": one, "b": [{"c": two, "d": three}]})
    assert torch.equal(answers(program, {"b": [{"d": three, "c": two}], "a": one}), wanted)
    with pytest.raises(UsageError, match="another structure"):
        answers(program, {"b": [{"d": three, "x": two}], "a": one})


def test_meta_weights():
    with torch.device("meta"):
        model, x = Block().eval(), torch.randn(2, 5, 8)
    assert capture(model, (x,)).count(aten.layer_norm.default) == 1


def test_quiet():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        capture(Block(), (torch.randn(1, 5, 8),))
    assert seen == []


# -- Hugging Face ---------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
SMALL = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
WHISPER = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "pad_token_id": 0,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 16,
    "max_target_positions": 16, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def tokens(batch=2, length=7):
    return torch.randint(3, 60, (batch, length))


FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", SMALL, lambda: {"input_ids": tokens()}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}, lambda: {"input_ids": tokens()}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, "intermediate_size": 64}, lambda: {"input_ids": tokens()}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**SMALL, "rotary_dim": 4}, lambda: {"input_ids": tokens()}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
              lambda: {"input_ids": tokens()}),
    "falcon": ("FalconForCausalLM", "FalconConfig", TEXT, lambda: {"input_ids": tokens()}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {**TEXT, "num_key_value_heads": 2, "intermediate_size": 64,
                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, lambda: {"input_ids": tokens()}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2, "intermediate_size": 64},
              lambda: {"input_ids": tokens()}),
    "bert": ("BertModel", "BertConfig", {**TEXT, "intermediate_size": 64},
             lambda: {"input_ids": tokens(), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4,
                   "hidden_dim": 64},
                   lambda: {"input_ids": tokens()}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
           "num_heads": 4, "decoder_start_token_id": 0},
           lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(2, 5)}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER,
                lambda: {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens()}),
    "vit": ("ViTModel", "ViTConfig", {**IMAGE, "intermediate_size": 64}, lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**IMAGE, "mlp_ratio": 2}, lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {**IMAGE, "intermediate_size": 64},
             lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}),
    "swin": ("SwinModel", "SwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
             "num_heads": [2, 2], "window_size": 4},
             lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
}  # fmt: skip


def family(name):
    transformers.logging.set_verbosity_error()
    model, config, settings, inputs = FAMILIES[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval(), inputs()


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model, kwargs = family(name)
    program = capture(model, (), kwargs)
    assert program.notes == []
    for batch, length in ((1, 7), (2, 7), (3, 5)):

        def resize(x, batch=batch, length=length):
            x = x[torch.arange(batch) % 2]
            return x[:, :length] if x.dim() == 2 else x

        inputs = pytree.tree_map(resize, kwargs)
        with torch.no_grad():
            reference = model(**inputs)
        output = answers(program, **inputs)
        assert type(output) is type(reference)
        for mine, theirs in zip(pytree.tree_leaves(output), pytree.tree_leaves(reference), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_step_with_a_cache():
    model, kwargs = family("gpt2")
    with torch.no_grad():
        past = model(**kwargs).past_key_values
    step = {"input_ids": tokens(2, 1), "past_key_values": past}
    program = capture(model, (), step)
    assert past.get_seq_length() == 7
    reference = model(input_ids=step["input_ids"], past_key_values=copy.deepcopy(past)).logits
    torch.testing.assert_close(answers(program, **step).logits, reference.detach())


class Counting(nn.Module):
    """Scales by a buffer that every call assigns anew."""

    def __init__(self, matters: bool) -> None:
        super().__init__()
        self.matters = matters
        self.register_buffer("g", torch.ones(4))

    def forward(self, x):
        y = x * self.g if self.matters else x * 2
        self.g = self.g + 1
        return y


def test_a_buffer_assigned_anew_is_refused_if_the_next_call_sees_it():
    with pytest.raises(CaptureError, match=r"assigns 'g' anew") as caught:
        capture(Counting(True).eval(), (torch.randn(2, 4),))
    assert "copy_" in str(caught.value)
    model = Counting(False).eval()
    assert capture(model, (torch.randn(2, 4),)).count(torch.ops.aten.mul.Tensor) == 1
    assert torch.equal(model.g, torch.ones(4))


class Branches(nn.Module):
    """One of two branches, by a value."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,))


def test_a_branch_on_a_value_is_refused_at_its_line():
    with pytest.raises(CaptureError, match=r"cannot be captured(.|\n)*return torch\.cond"):
        capture(Branches().eval(), (torch.randn(3, 4),))
