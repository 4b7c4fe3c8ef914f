"""The vocabulary: one name per overload, three interpretations, one form for the arguments of a call."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from tautomer.rewrite.errors import PatternError
from tautomer.rewrite.ops import OPS, TABLE, TextOps, TorchOps, fill, is_pure, normal

aten = torch.ops.aten


def node_of(target, *args, shape=(2, 3, 4, 5), **kwargs) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(shape, device="meta")
    return graph.call_function(target, (x, *args), kwargs)


def test_names_and_targets_are_unique():
    assert len(OPS) == len(TABLE) == len({id(op.target) for op in TABLE})


def test_over_torch_it_computes():
    x, W = torch.randn(2, 3), torch.randn(4, 3)
    assert torch.equal(TorchOps().linear(x, W), x @ W.T)
    assert TorchOps().width(x) == 3


def test_over_strings_it_reads():
    op = TextOps()
    assert op.layer_norm("x", [op.width("x")], "g", None, "eps") == "layer_norm(x, [d], g, None, eps)"
    assert op.cast("x", torch.float32) == "cast(x, float32)"
    assert op.any_of(op.exp("x"), "y") == "exp(x)"


def test_an_op_outside_the_table_is_spelled_by_its_overload():
    assert torch.equal(TorchOps()(aten.cos.default)(torch.zeros(2)), torch.ones(2))
    assert TextOps()(aten.cos.default)("x").startswith("cos")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(PatternError, match=r"no op 'lineer'\n  try: op.linear"):
        TorchOps().lineer(1)


def test_arguments_are_filled_from_the_schema():
    assert fill(aten.add.Tensor, (1, 2), {}) == (1, 2, 1)
    assert fill(aten.var.correction, ("x", [-1]), {"keepdim": True}) == ("x", [-1], None, True)
    assert fill(aten.layer_norm.default, ("x", [4], None, None, 1e-5, False), {})[-1] is True, "cudnn_enable changes no value"
    with pytest.raises(PatternError, match="no argument 'axis'"):
        fill(aten.add.Tensor, (1, 2), {"axis": 0})
    with pytest.raises(PatternError, match="takes 1 arguments, 2 were given"):
        fill(aten.exp.default, (1, 2), {})


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.mean.dim, ([3], True), ([-1], True, None)),
        (aten.mean.dim, ([-1], True), ([-1], True, None)),
        (aten.transpose.int, (2, 1), (-3, -2)),
        (aten.transpose.int, (-1, 1), (-3, -1)),
        (aten.permute.default, ([0, 2, 1, 3],), ([-4, -2, -3, -1],)),
        (aten.unsqueeze.default, (4,), (-1,)),
        (aten.softmax.int, (3,), (-1, None)),
    ],
)
def test_axes_count_from_the_end(target, args, expected):
    assert normal(node_of(target, *args))[1:] == expected


def test_pure_means_no_write_and_no_random_numbers():
    assert is_pure(aten.add.Tensor) and is_pure(operator.getitem)
    assert not is_pure(aten.add_.Tensor)
    assert not is_pure(aten.dropout.default)
    assert not is_pure(print)
