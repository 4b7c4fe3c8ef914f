"""An emitted module has the user's weights under the user's names, and computes what the program computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo.models import ZOO

from tautomer.backends.rewritten import Rewritten
from tautomer.backends.to_torch import to_torch
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.program import Program
from tautomer.rewrite.weights import Apply, Leaf

aten = torch.ops.aten


class Net(nn.Module):
    """A tied pair, a frozen parameter, an unread one, buffers in and out of the state dict, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)
        self.unread = nn.Parameter(torch.ones(2))
        self.register_buffer("kept", torch.arange(6.0))
        self.register_buffer("dropped", torch.arange(6.0), persistent=False)
        self.scale = torch.tensor([2.0])

    def forward(self, ids, shift=0):
        return {"logits": self.head(self.norm(self.embed(ids)) * self.scale + self.kept + self.dropped), "shift": shift}


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def program(model: nn.Module) -> Program:
    return capture(model.eval(), (IDS,))


def test_it_computes_the_same():
    model = Net()
    emitted = to_torch(program(model))
    for ids in (IDS, IDS[:1, :2]):
        mine, theirs = emitted(ids), model(ids)
        assert type(mine) is dict and mine["shift"] == 0
        assert torch.equal(mine["logits"], theirs["logits"])


def test_unedited_weights_share_the_users_memory():
    model = Net()
    emitted = to_torch(program(model))
    assert list(emitted.state_dict()) == list(model.state_dict())
    assert "dropped" not in emitted.state_dict() and "dropped" in dict(emitted.named_buffers())
    theirs = dict(model.named_parameters(remove_duplicate=False))
    mine = dict(emitted.named_parameters(remove_duplicate=False))
    assert mine.keys() == theirs.keys() and all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    assert emitted.head.weight is emitted.embed.weight
    assert [p.requires_grad for p in emitted.parameters()] == [p.requires_grad for p in model.parameters()]


def test_what_is_done_to_the_module_is_not_done_to_the_model():
    model = Net()
    emitted = to_torch(program(model))
    emitted.requires_grad_(False)
    emitted.half()
    assert model.embed.weight.requires_grad and model.embed.weight.grad is None
    assert all(x.dtype is torch.float32 for x in model.state_dict().values())
    assert emitted.head.weight is emitted.embed.weight and emitted.head.weight.dtype is torch.float16


def test_an_edited_weight_is_new_and_the_users_is_untouched():
    model = Net()
    edited = program(model)
    before = model.norm.weight.detach().clone()
    name = edited.weights.stage(Apply(aten.mul.Tensor, (Leaf("norm.weight"), 3.0)), before, "norm.tripled")
    (norm,) = edited.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    with edited.graph.inserting_before(norm):
        attribute = edited.graph.get_attr(name)
    attribute.meta["val"] = norm.args[2].meta["val"]
    norm.replace_input_with(norm.args[2], attribute)
    edited.weights.drop("norm.weight")
    emitted = to_torch(edited)
    assert "norm.weight" not in emitted.state_dict() and emitted.norm.tripled.requires_grad
    assert torch.equal(emitted.norm.tripled, 3 * before) and torch.equal(model.norm.weight, before)
    with torch.no_grad():
        model.norm.weight.mul_(3)
    assert torch.equal(emitted(IDS)["logits"], model(IDS)["logits"])


def test_edited_ties_stay_ties():
    model = Net()
    edited = program(model)
    doubled = Apply(aten.mul.Tensor, (Leaf("embed.weight"), 2.0))
    weights = edited.weights
    for name in ("embed.weight", "head.weight"):
        weights.entries[name] = type(weights[name])(name, doubled, weights[name].meta, "parameter", True, True)
    emitted = to_torch(edited)
    assert emitted.head.weight is emitted.embed.weight
    assert torch.equal(emitted.head.weight, 2 * model.head.weight) and emitted.head.weight is not model.head.weight


def test_it_trains_like_the_model():
    model = Net()
    emitted = to_torch(program(model))
    emitted(IDS)["logits"].square().sum().backward()
    mine = {name: p.grad.clone() for name, p in emitted.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in model.parameters())
    model(IDS)["logits"].square().sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys() == {"embed.weight", "norm.weight"}
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, x):
        return self.body(x)


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def test_a_program_of_both_modes_switches():
    model = Noisy().train()
    emitted = to_torch(capture(model, (X,), mode="both"))
    assert emitted.training and emitted.body.get_submodule("1").training
    statistics = model.body[1].running_mean
    for training in (True, False, True):
        emitted.train(training)
        model.train(training)
        torch.manual_seed(1)
        mine = emitted(X)
        torch.manual_seed(1)
        before = statistics.clone()
        assert torch.equal(mine, model(X))
        assert torch.equal(statistics, before) is not training
    assert torch.equal(emitted.body.get_submodule("1").running_mean, model.body[1].running_mean)


def test_a_run_in_train_mode_leaves_the_users_statistics():
    model = Noisy().train()
    emitted = to_torch(capture(model, (X,), mode="both"))
    before = {name: x.clone() for name, x in model.named_buffers()}
    emitted(X)
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())
    assert not torch.equal(emitted.body.get_submodule("1").running_mean, before["body.1.running_mean"])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_program_of_one_mode_refuses_the_other(mode):
    emitted = to_torch(capture(Noisy(), (X,), mode=mode))
    other = mode == "eval"
    emitted.train(not other)
    assert emitted.training is not other
    with pytest.raises(UsageError, match=f"Noisy was captured in {mode} mode and computes that alone"):
        emitted.train(other)
    assert emitted.training is not other


def test_a_frozen_part_stays_frozen():
    model = Noisy().train()
    model.body[1].eval()
    emitted = to_torch(capture(model, (X,), mode="both"))
    assert emitted.body.get_submodule("2").training and not emitted.body.get_submodule("1").training
    torch.manual_seed(1)
    mine = emitted(X)
    torch.manual_seed(1)
    assert torch.equal(mine, model(X))


class Casting(nn.Module):
    """Autocast regions stay one node with a body."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y + 1


def test_the_body_of_a_region_is_a_submodule():
    model = Casting()
    captured = capture(model, (X,))
    assert captured.regions
    emitted = to_torch(captured)
    assert torch.equal(emitted(X), model(X)) and list(emitted.state_dict()) == list(model.state_dict())


def test_a_weight_with_a_name_the_module_needs_is_refused():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.graph

    with pytest.raises(UsageError, match="a weight named 'graph'"):
        to_torch(capture(Graph(), (X,)))


@pytest.mark.parametrize("name", ["graph", "code", "report", "weights", "program", "_signature", "own"])
def test_a_submodule_with_a_name_the_module_needs_is_refused(name):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(4, 4))

        def forward(self, x):
            return self.get_submodule(name)(x)

    with pytest.raises(UsageError, match=f"a submodule named '{name}'.*\n.*rename it"):
        to_torch(capture(Holder().eval(), (X,)))
    inner = nn.Sequential(Holder()).eval()
    assert torch.equal(to_torch(capture(inner, (X,)))(X), inner(X))


@pytest.mark.parametrize("name", ["report", "weights", "program"])
def test_a_weight_named_like_the_history_is_refused(name):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.ones(4)))

        def forward(self, x):
            return x * self.get_parameter(name)

    with pytest.raises(UsageError, match=f"a weight named '{name}'"):
        to_torch(capture(Holder(), (X,)))


@pytest.mark.parametrize("family", ["gpt2", "falcon", "whisper", "dinov2", "swin"])
def test_hugging_face(family):
    model, inputs = ZOO[family]()
    emitted = to_torch(capture(model, (), inputs))
    assert isinstance(emitted, Rewritten)
    with torch.no_grad():
        mine, theirs = emitted(**inputs), model(**inputs)
    assert type(mine) is type(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs if isinstance(theirs[key], torch.Tensor))
