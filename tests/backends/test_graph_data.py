"""A graph survives the way through JSON; what has no form as data is refused."""

from __future__ import annotations

import json
import math
import operator

import pytest
import torch
from torch import fx

from tautomer.backends.graph_data import decode, decode_graph, decode_target, encode, encode_graph, encode_target
from tautomer.rewrite.errors import UsageError

aten = torch.ops.aten


def graph() -> fx.Graph:
    g = fx.Graph()
    x = g.placeholder("x")
    size = g.call_function(aten.sym_size.int, (x, 0))
    half = g.call_function(operator.floordiv, (size, 2))
    y = g.call_function(aten.full.default, ([half, 3], float("-inf")), {"dtype": torch.float32, "device": torch.device("cpu")})
    z = g.call_function(aten.clone.default, (y,), {"memory_format": torch.contiguous_format})
    g.output((z, half, None))
    return g


def test_a_graph_comes_back():
    before = graph()
    after = decode_graph(json.loads(json.dumps(encode_graph(before))))
    assert str(after) == str(before)
    run = fx.GraphModule({}, after)
    out, half, nothing = run(torch.zeros(4, 1))
    assert torch.equal(out, torch.full((2, 3), -math.inf)) and half == 2 and nothing is None


@pytest.mark.parametrize(
    "value",
    [None, True, 1, 1.0, 1.5, math.inf, -math.inf, 1 + 2j, "a", [1, (2, "b")], slice(None, 3, None), {"a": (1,)}, ...,
     torch.bfloat16, torch.strided, torch.channels_last, torch.device("cuda", 1)],
)  # fmt: skip
def test_a_value_comes_back(value):
    back = decode(json.loads(json.dumps(encode(value))), {})
    assert back == value and type(back) is type(value)


def test_nan_comes_back():
    assert math.isnan(decode(encode(math.nan), {}))


@pytest.mark.parametrize("value", [torch.zeros(2), object(), torch.Generator(), {1, 2}])
def test_what_has_no_form_as_data_is_refused(value):
    with pytest.raises(UsageError, match="cannot be saved"):
        encode(value)


@pytest.mark.parametrize("target", [aten.add.Tensor, aten.layer_norm.default, operator.getitem, math.ceil, torch.sym_max])
def test_a_target_comes_back(target):
    assert decode_target(encode_target(target)) is target


FORBIDDEN = ["builtins:eval", "os:system", "torch:load", "operator:__import__", "aten.no_such_op.default", "math:no"]


@pytest.mark.parametrize("text", FORBIDDEN)
def test_a_graph_calls_only_operators_and_arithmetic(text):
    with pytest.raises(UsageError, match="unknown here"):
        decode_target(text)


def test_a_function_of_the_user_is_refused():
    with pytest.raises(UsageError, match="cannot be saved"):
        encode_target(graph)


@pytest.mark.parametrize("data", [{"torch": "load"}, {"torch": "nn"}, {"pickle": "x"}])
def test_a_value_of_unknown_kind_is_refused(data):
    with pytest.raises(UsageError, match="unknown kind"):
        decode(data, {})
