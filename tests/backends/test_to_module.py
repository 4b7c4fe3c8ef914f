"""A rewritten program is written back into the model it came from, or a sentence says why not and nothing changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.backends import to_module
from tautomer.rewrite.claims import ALGEBRAIC, BITWISE
from tautomer.rewrite.errors import ClaimBroken, UsageError
from tautomer.rewrite.pass_base import Context, Pass
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import Operand, Ops, Rule, Weight
from tautomer.rewrite.rules import Tensor as Matched

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
RMS = "layer-norm-to-rms-norm"


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.randn(8) + 2)

    def forward(self, hidden):
        return hidden * self.s


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale, self.gamma = Scale(), nn.Parameter(torch.randn(8) + 2)

    def forward(self, x):
        return x + self.scale(self.down(F.gelu(self.up(self.norm(x))))) * self.gamma


class Net(nn.Module):
    """Pre-norm blocks whose stream is written by editable weights, a layer scale as a module and one in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def redrawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3 + 0.1
    return model.double().eval()


@pytest.fixture
def model() -> nn.Module:
    return redrawn(Net())


def rewrite(model: nn.Module, x: Tensor = X, **options: Any) -> tautomer.Rewriting:
    """At one size, where nothing else is said."""
    return tautomer.optimize_(model, (x,), **{"target": "onnxruntime", "dynamic_shapes": "static", **options})


def snapshot(model: nn.Module) -> list[Any]:
    named = model.named_modules(remove_duplicate=False)
    kinds = [(path, id(module), type(module)) for path, module in named]
    state = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)]
    return [kinds, *state]


def same(a: list[Any], b: list[Any]) -> bool:
    return a[0] == b[0] and all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a[1:], b[1:], strict=True))


def test_the_model_is_the_same_object_of_the_same_class_with_the_same_keys_and_answers(model: nn.Module) -> None:
    before, wanted = snapshot(model), model(X)
    keys = list(model.state_dict())
    done = rewrite(model, dynamic_shapes="auto")
    assert (
        done.report.fired(RMS) == 3 and done.report.fired("fold-into-writer") == 4 and done.report.fired("fold-norm-shift") == 3
    )
    assert type(model) is Net and isinstance(model.norm, nn.LayerNorm) and isinstance(model.blocks[0].scale, Scale)
    assert list(model.state_dict()) == keys
    assert [x[1] for x in snapshot(model)[1:]] == [x[1] for x in before[1:]]
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)
    calls = tautomer.capture(model, (X,))
    assert calls.count(torch.ops.aten.layer_norm.default) == 0 and calls.count(torch.ops.aten.rms_norm.default) == 3
    assert set(done.modules) == {f"blocks.{i}.{m}" for i in (0, 1) for m in ("norm", "scale")} | {"norm"}


def test_the_original_classes_are_right_with_the_new_weights(model: nn.Module) -> None:
    wanted = model(X)
    rewrite(model)
    stock = Net().double().eval()
    stock.load_state_dict(model.state_dict())
    assert torch.allclose(stock(X), wanted, rtol=0, atol=1e-12)
    assert not model.norm.bias.any() and (model.blocks[0].gamma == 1).all() and (model.blocks[0].scale.s == 1).all()


def test_the_map_carries_a_state_dict_of_the_original_over(model: nn.Module) -> None:
    done = rewrite(model)
    other = redrawn(Net())
    for parameter in other.parameters():
        parameter.data *= 1.1
    model.load_state_dict(done.from_original(other.state_dict()))
    assert torch.allclose(model(X), other(X), rtol=0, atol=1e-12)


def test_the_map_takes_the_edit_back(model: nn.Module) -> None:
    original, wanted = copy.deepcopy(model.state_dict()), model(X)
    done = rewrite(model)
    back = done.to_original(model.state_dict())
    stock = Net().double().eval()
    stock.load_state_dict(back)
    assert list(back) == list(original) and torch.allclose(stock(X), wanted, rtol=0, atol=1e-12)


def test_what_does_nothing_any_more_does_not_train(model: nn.Module) -> None:
    done = rewrite(model)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still == {"norm.bias", *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("norm.bias", "scale.s"))}
    assert {note.id for note in done.report.notes} >= still
    model(X).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())  # what DDP asks of a model


def test_hooks_keep_firing(model: nn.Module) -> None:
    seen: list[str] = []
    model.norm.register_forward_hook(lambda *_: seen.append("after"))
    model.norm.register_forward_pre_hook(lambda *_: seen.append("before"))
    rewrite(model)
    seen.clear()
    model(X)
    assert seen == ["before", "after"]


def test_a_hook_that_changes_values_is_said_and_nothing_is_edited(model: nn.Module) -> None:
    model.norm.register_forward_hook(lambda module, given, result: result * 2)
    before = snapshot(model)
    with pytest.raises(ClaimBroken, match="hook that changes values") as caught:
        rewrite(model)
    assert "skip=['norm']" in str(caught.value) and same(snapshot(model), before)
    wanted = model(X)
    rewrite(model, skip=["norm"])
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_a_copy_is_rewritten_too_and_independent(model: nn.Module, through: str) -> None:
    rewrite(model)
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(X), model(X)) and type(twin.norm) is type(model.norm)
    with torch.no_grad():
        twin.norm.weight.zero_()
    assert model.norm.weight.all()


def test_it_compiles_and_a_second_run_changes_nothing(model: nn.Module) -> None:
    rewrite(model)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(X), model(X))
    before, again = snapshot(model), rewrite(model)
    assert not again.modules and same(snapshot(model), before)


# -- what cannot be written back is refused, and the rest is done ------------------------------------------------


class Functional(Net):
    def forward(self, x):
        x = self.blocks[1](self.blocks[0](self.enter(x)))
        return self.head(F.layer_norm(x, (8,), self.norm.weight, self.norm.bias))


def test_code_of_a_module_with_submodules_stays() -> None:
    model = redrawn(Functional())
    wanted = model(X)
    done = rewrite(model)
    (refusal,) = [r for r in done.report.refusals if r.rewrite == RMS]
    assert "the forward of Functional, which runs other modules" in refusal.reason
    assert not any(r.rewrite.startswith("raise") for r in done.report.refusals)  # what fits nowhere is not refused
    assert done.report.fired(RMS) == 2 and type(model.norm) is nn.LayerNorm
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


class TwoRoles(Net):
    """One norm is called on the stream and on an input that nothing centres."""

    def forward(self, x):
        y = self.blocks[1](self.blocks[0](self.enter(x)))
        return self.head(self.norm(y)) + self.head(self.norm(x))


def test_a_module_in_two_roles_is_left_alone() -> None:
    model = redrawn(TwoRoles())
    wanted = model(X)
    done = rewrite(model)
    assert type(model.norm) is nn.LayerNorm and done.report.fired(RMS) == 2
    assert any("called 2 times, and not all of its calls are rewritten alike" in r.reason for r in done.report.refusals)
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


class Plain(Block):
    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Twice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Plain(), Plain()])

    def forward(self, x):
        x = self.blocks[0](self.blocks[1](self.blocks[0](self.enter(x))))
        return self.head(self.norm(x))


def test_a_module_that_is_rewritten_alike_in_all_its_calls_is_rewritten() -> None:
    model = redrawn(Twice())
    wanted = model(X)
    done = rewrite(model)
    assert "blocks.0.norm" in done.modules and done.report.fired(RMS) == 4
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


def test_a_bias_that_the_model_has_no_key_for_is_not_made() -> None:
    model = redrawn(Net())
    model.head = nn.Linear(8, 3, bias=False).double()  # narrower than the shift: the fold would pay
    wanted, keys = model(X), list(model.state_dict())
    done = rewrite(model)
    assert any("needs a new weight 'head.bias', and the keys of the model stay" in r.reason for r in done.report.refusals)
    assert list(model.state_dict()) == keys and done.report.fired(RMS) == 3
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


def test_a_forward_that_was_replaced_on_the_instance_stays(model: nn.Module) -> None:
    plain = model.norm.forward
    model.norm.forward = lambda x: plain(x)  # as accelerate does
    wanted = model(X)
    done = rewrite(model)
    assert any("the forward of 'norm' is replaced on the instance" in r.reason for r in done.report.refusals)
    assert type(model.norm) is nn.LayerNorm and torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 8, padding_idx=0), nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.blocks[1](self.blocks[0](self.embed(ids)))))


def test_a_tied_table_is_centred_where_it_is_read() -> None:
    model, ids = redrawn(Tied()), torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    wanted, table = model(ids), model.embed.weight.detach().clone()
    done = rewrite(model, ids, dynamic_shapes="auto")
    assert done.report.fired(RMS) == 3 and "embed" in done.modules
    assert model.head.weight is model.embed.weight and torch.equal(model.embed.weight, table)
    assert torch.allclose(model.embed(ids).mean(-1), torch.zeros(2, 4).double(), atol=1e-12)
    assert torch.allclose(model(ids), wanted, rtol=0, atol=1e-12)


class FunctionalTable(Tied):
    def forward(self, ids):
        return self.head(self.norm(self.blocks[1](self.blocks[0](F.embedding(ids, self.head.weight)))))


def test_a_value_of_the_users_own_code_is_not_centred() -> None:
    model, ids = redrawn(FunctionalTable()), torch.tensor([[1, 2, 3, 0]])
    before = snapshot(model)
    done = rewrite(model, ids, passes=[RMS])
    assert done.report.fired(RMS) == 0 and same(snapshot(model), before)
    assert all("would have to be centred at run time" in r.reason for r in done.report.refusals if r.rewrite == RMS)


class Swap(Pass):
    """x + y → y + x, everywhere, whoever computes it."""

    claim = BITWISE

    def run(self, program: Program, context: Context) -> None:
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
            if isinstance(node.args[1], torch.fx.Node):
                context.applied(self, self.place(node))
                with program.graph.inserting_before(node):
                    new = program.graph.call_function(node.target, node.args[::-1])
                new.meta["val"] = node.meta["val"]
                program.replace(node, new)

    def place(self, node: torch.fx.Node) -> torch.fx.Node:
        return node


class Elsewhere(Swap):
    """The same, and says it did it to the output."""

    def place(self, node: torch.fx.Node) -> torch.fx.Node:
        return node.graph.output_node()


@pytest.mark.parametrize("rewrite_all", [Elsewhere()])
def test_a_pass_that_asks_nobody_is_given_up(model: nn.Module, rewrite_all: Pass) -> None:
    before = snapshot(model)
    done = rewrite(model, passes=[rewrite_all])
    reasons = {r.reason for r in done.report.refusals if r.rewrite == rewrite_all.name}
    assert reasons == {"it cannot be written back: the rewrite changes aten.add, which is no module's own code"}
    assert not done.report.fired(rewrite_all.name) and same(snapshot(model), before)


def test_a_pass_that_says_where_it_was_is_code_of_the_blocks(model: nn.Module) -> None:
    wanted = model(X)
    done = rewrite(model, passes=[Swap()])
    assert set(done.modules) == {"blocks.0", "blocks.1"} and done.report.fired("swap") == 2
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)
    assert not [refusal for refusal in done.report.refusals if refusal.rewrite == "swap"]


class Gemma(nn.Module):
    """A gain that is stored less one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_a_weight_that_only_new_code_reads_is_computed_by_that_code() -> None:
    model = redrawn(nn.Sequential(nn.Linear(8, 8), Gemma(), nn.Linear(8, 3)))
    wanted, gain = model(X), model[1].weight.detach().clone()
    done = rewrite(model)
    assert done.modules == ("1",) and done.report.fired("absorb-rms-norm-gain") == 1
    assert torch.equal(model[1].weight, gain) and not any(done.weights[name].edited for name in done.weights)
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


class Projection(nn.Module):
    """A linear layer as Hugging Face's Conv1D writes it, between reshapes that end where those around it begin."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(*x.shape[:-1], 8)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.norm, self.head = Projection(), Projection(), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        heads = self.enter(x).view(*x.shape[:-1], 2, 4).transpose(1, 2)
        merged = torch.tanh(heads).transpose(1, 2).reshape(*x.shape[:-1], 8)
        return self.head(self.norm(self.leave(merged)))


def test_a_reshape_at_the_edge_of_a_module_is_the_code_around_it() -> None:
    model = redrawn(Heads())
    wanted, state = model(X), copy.deepcopy(model.state_dict())
    done = rewrite(model, recipe="training", dynamic_shapes="auto")
    assert done.report.fired(RMS) == 1 and set(done.modules) == {"leave", "norm"}
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


class Double(nn.Module):
    def forward(self, x):
        return x * 2.0


class FoldDouble(Rule):
    """2 linear(x, W) → linear(x, 2 W): the class that doubles would double once more."""

    claim = ALGEBRAIC("a power of two rounds nothing")

    def before(self, op: Ops, x: Matched, W: Weight) -> Operand:
        return op.mul(op.linear(x, W, None), 2.0)

    def after(self, op: Ops, x: Matched, W: Weight) -> Operand:
        return op.linear(x, op.mul(W, 2.0), None)


def test_weights_that_are_wrong_for_the_original_classes_are_said() -> None:
    model = redrawn(nn.Sequential(nn.Linear(8, 8, bias=False), Double(), nn.Linear(8, 3)))
    wanted = model(X)
    done = rewrite(model, passes=[FoldDouble()])
    assert done.modules == ("1",) and any("right for the new code alone" in note.text for note in done.report.notes)
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


# -- modes ----------------------------------------------------------------------------------------------------


class Dropping(Net):
    def forward(self, x):
        x = F.dropout(self.enter(x), 0.5, self.training)
        return self.head(self.norm(self.blocks[0](x)))


def test_rewritten_for_eval_it_refuses_to_train_where_that_is_another_function() -> None:
    model = redrawn(Dropping())
    wanted = model(X)
    assert rewrite(model).report.fired(RMS) == 2
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)
    model.train()
    with pytest.raises(UsageError, match="LayerNorm was rewritten in eval mode, where dropout is off"):
        model(X)
    model.eval()
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.dropout(self.linear(x) * self.gamma, 0.5, self.training)


def test_where_only_weights_were_edited_their_modules_watch_the_mode() -> None:
    model = redrawn(Gated())
    wanted = model(X)
    assert rewrite(model).modules == ("linear",) and (model.gamma == 1).all()
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="Linear was rewritten in eval mode"):
        model.train()(X)


def test_a_model_in_training_mode_is_rewritten_for_both_modes() -> None:
    model = redrawn(Dropping()).train()
    done = rewrite(model)
    assert done.report.fired(RMS) == 0 and any("residual dropout" in r.reason for r in done.report.refusals)
    assert done.report.fired("fold-into-writer") == 2
    model(X)
    model.eval()(X)


def test_without_dropout_both_modes_are_one(model: nn.Module) -> None:
    rewrite(model)
    assert torch.equal(model.train()(X), model.eval()(X))


# -- errors ---------------------------------------------------------------------------------------------------


def _failing(monkeypatch: pytest.MonkeyPatch, name: str, at: int, owner: Any = to_module) -> None:
    real: Callable[..., Any] = getattr(owner, name)
    count = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt if at % 2 else RuntimeError("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, step)


@pytest.mark.parametrize(("name", "at"), [("_overwrite", 1), ("_overwrite", 4), ("exchange", 1), ("exchange", 4), ("guard", 1)])
def test_an_edit_that_fails_half_way_is_taken_back(model: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    before = snapshot(model)
    _failing(monkeypatch, name, at)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        rewrite(model)
    assert same(snapshot(model), before)
    model.load_state_dict(dict(Net().state_dict()))


@pytest.mark.parametrize(("name", "at"), [("capture", 1), ("capture", 2), ("watch", 1), ("run_passes", 2), ("plan", 2)])
def test_a_failure_before_or_after_the_edit_leaves_the_model(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    import tautomer._inplace as inplace
    import tautomer._settle as settling

    before, keys = snapshot(model), model.norm._forward_hooks.copy()
    _failing(monkeypatch, name, at, settling if name == "run_passes" else inplace)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        rewrite(model)
    assert same(snapshot(model), before) and model.norm._forward_hooks == keys


def test_an_edit_that_is_wrong_is_found_and_taken_back(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(model)
    real = to_module._overwrite
    monkeypatch.setattr(to_module, "_overwrite", lambda tensor, value: real(tensor, value * 1.001))
    with pytest.raises(ClaimBroken, match="written back, output 0 of Net is off"):
        rewrite(model)
    monkeypatch.undo()
    for name, _, trains, value in before[1:]:
        assert torch.allclose(dict(model.named_parameters())[name], value, rtol=2e-3) and trains
    assert snapshot(model)[0] == before[0]
    model.load_state_dict(dict(Net().state_dict()))  # it is not marked as edited
