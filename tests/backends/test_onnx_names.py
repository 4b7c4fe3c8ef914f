"""Names of an ONNX file are the user's."""

from __future__ import annotations

import dataclasses

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
    assert [unique(identifier(n), taken) for n in ("a.b", "a[b]", "a_b", "1", "")] == ["a_b", "a_b_1", "a_b_2", "_1", "_"]


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


def test_conditions_that_the_file_states_itself_are_not_said_again():
    fixed, same, less = "leaves[0].size()[1] == 7", "leaves[0].size()[0] == leaves[1].size()[0]", "leaves[1].size()[1] < 9"
    signature = Signature("Net", (), 2, (), None, None, {}, ("x", "y"), (fixed, same, less, less))
    assert fixed_sizes(signature) == {(0, 1): 7}
    assert unsaid(signature, {0: ["b", 7], 1: ["b", "n"]}) == ("y.shape[1] < 9",)
    assert unsaid(signature, {0: ["b", 7], 1: ["c", 8]}) == ("x.shape[0] == y.shape[0]",)
    assert unsaid(signature, {0: ["b", "n"], 1: ["b", 8]}) == ("x.shape[1] == 7",)
