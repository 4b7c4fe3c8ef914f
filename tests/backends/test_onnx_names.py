"""Names of an ONNX file are the user's."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import onnx
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from tautomer.backends.onnx_names import fields, fixed_sizes, identifier, unique, unsaid
from tautomer.backends.to_onnx import to_onnx
from tautomer.rewrite._torch import pytree
from tautomer.rewrite.capture import capture
from tautomer.rewrite.signature import Signature

X = torch.ones(1)


@dataclasses.dataclass
class Point:
    x: object
    y: object = None


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (0, [""]),
        ((0, 0), ["0", "1"]),
        ({"a": 0, "b": [0, {"c": 0}]}, ["a", "b_0", "b_1_c"]),
        (BaseModelOutput(last_hidden_state=torch.zeros(1), attentions=(torch.zeros(1),)), ["last_hidden_state", "attentions_0"]),
        (torch.zeros(2, 2).max(0), ["0", "1"]),
    ],
)
def test_fields(tree, names):
    assert list(fields(pytree.tree_structure(tree))) == names


def test_identifiers_are_unique():
    taken: set[str] = set()
    assert [unique(identifier(n), taken) for n in ("a.b", "a[b]", "a_b", "1", "")] == ["a.b", "a_b", "a_b_1", "_1", "_"]


def names_of(model, args, tmp_path):
    to_onnx(capture(model.eval(), args), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    return [x.name for x in graph.input], [x.name for x in graph.output], {x.name for x in graph.initializer}


def test_weights_keep_their_names_turned_or_not(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    inputs, outputs, weights = names_of(model, (torch.randn(2, 3, 4),), tmp_path)
    assert (inputs, outputs) == (["input"], ["output"])
    assert {"0.weight.T", "1.weight", "1.bias", "2.weight.T"} <= weights


def test_an_output_may_be_called_like_a_value_inside(tmp_path):
    class Model(nn.Module):
        def forward(self, add, mean=None):
            mul = add * 2
            return {"mul": mul + 1, "add": mul.relu(), "mean": mul.mean(-1), "same": mul}

    inputs, outputs, _ = names_of(Model(), (torch.randn(2, 4),), tmp_path)
    assert inputs == ["add"] and outputs == ["mul", "add_1", "mean", "same"]


def test_nested_inputs_are_named_by_their_path(tmp_path):
    class Model(nn.Module):
        def forward(self, batch, flag=True):
            return batch["x"] + batch["more"][0], batch["x"]

    batch = {"x": torch.randn(2, 4), "more": [torch.randn(2, 4)]}
    inputs, outputs, _ = names_of(Model(), (batch,), tmp_path)
    assert inputs == ["batch_x", "batch_more_0"] and outputs == ["output_0", "output_1"]


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_named_tuples_are_named_by_their_fields(tmp_path):
    class Model(nn.Module):
        def forward(self, pair, x):
            return Pair(pair.first + x, {"rest": pair.second * x})

    inputs, outputs, _ = names_of(Model(), (Pair(torch.randn(2, 4), torch.randn(2, 4)), torch.randn(2, 4)), tmp_path)
    assert inputs == ["pair_first", "pair_second", "x"] and outputs == ["first", "second_rest"]


class Layer:
    def __init__(self, keys, values):
        self.keys, self.values = keys, values


class Memory:
    """A cache as nobody in particular writes it: objects in a list, and tensors in another."""

    def __init__(self, layers, steps):
        self.layers, self.steps, self.seen = layers, steps, 3


def flatten(memory):
    return [t for x in memory.layers for t in (x.values, x.keys)] + memory.steps, len(memory.layers)


def flatten_with_keys(memory):
    flat, n = flatten(memory)
    return [(pytree.SequenceKey(i), x) for i, x in enumerate(flat)], n


def unflatten(flat, n):
    flat = list(flat)
    return Memory([Layer(flat[2 * i + 1], flat[2 * i]) for i in range(n)], flat[2 * n :])


pytree.register_pytree_node(Memory, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)


class Strict:
    def __init__(self, x):
        self.x = x.float()


pytree.register_pytree_node(Strict, lambda s: ([s.x], None), lambda flat, _: Strict(*flat))


def test_tensors_of_an_object_are_named_by_their_place_in_it():
    memory = Memory([Layer(0, 0), Layer(0, 0)], [0])
    names = [".0.value", ".0.key", ".1.value", ".1.key", ".steps.0"]
    assert list(fields(pytree.tree_structure(memory))) == names
    assert list(fields(pytree.tree_structure({"past": memory}))) == [f"past{name}" for name in names]
    assert list(fields(pytree.tree_structure((Strict(X), 0)))) == ["0_0", "1"]  # it cannot be made of names


def test_what_is_fed_back_is_called_present(tmp_path):
    class Model(nn.Module):
        def forward(self, x, past, pasta):
            layer = past.layers[0]
            grown = Memory([Layer(torch.cat([layer.keys, x], 1), layer.values + 1)], past.steps)
            return {"past": grown, "pasta": pasta + x}

    x = torch.randn(2, 3, 4)
    inputs, outputs, _ = names_of(Model(), (x, Memory([Layer(x, x)], [x]), x), tmp_path)
    assert inputs == ["x", "past.0.value", "past.0.key", "past.steps.0", "pasta"]
    assert outputs == ["present.0.value", "present.0.key", "present.steps.0", "pasta_1"]


def test_conditions_that_the_file_states_itself_are_not_said_again():
    fixed, same, less = "leaves[0].size()[1] == 7", "leaves[0].size()[0] == leaves[1].size()[0]", "leaves[1].size()[1] < 9"
    signature = Signature("Net", (), 2, (), None, None, {}, ("x", "y"), (fixed, same, less, less))
    assert fixed_sizes(signature) == {(0, 1): 7}
    assert unsaid(signature, {0: ["b", 7], 1: ["b", "n"]}) == ("y.shape[1] < 9",)
    assert unsaid(signature, {0: ["b", 7], 1: ["c", 8]}) == ("x.shape[0] == y.shape[0]",)
    assert unsaid(signature, {0: ["b", "n"], 1: ["b", 8]}) == ("x.shape[1] == 7",)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("(leaves[0].size()[1] + leaves[1].size()[1]) == (leaves[1].size()[1] + leaves[0].size()[1])", True),
        ("min(8*leaves[0].size()[1], 16*leaves[0].size()[1]) == 8*leaves[0].size()[1]", True),
        ("leaves[0].size()[1] >= 0", True),
        ("leaves[0].size()[1] != leaves[1].size()[1]", False),
        ("not (leaves[0].size()[1] == leaves[1].size()[1])", False),
        ("leaves[0].size()[1] != 4", False),
        ("leaves[0].size()[1] > leaves[1].size()[1]", False),
    ],
)
def test_conditions_that_hold_at_any_size_are_not_said(condition, said):
    signature = Signature("Net", (), 2, (), None, None, {}, ("x", "y"), (condition,))
    assert (unsaid(signature, {0: ["b", "n"], 1: ["b", "m"]}) == ()) is said
