"""Layers of structured factors as modules: nearest to a dense one, the product kept in eval mode and never stale."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle

import pytest
import torch
from torch import nn

from tautomer.nn import BlockDenseLinear, BlockShuffleLinear, LowRankLinear, StructuredLinear
from tautomer.nn.structured import dense_of
from tautomer.rewrite import structured
from tautomer.rewrite.structured import LowRank

LAYERS = [(LowRankLinear, (4,)), (BlockDenseLinear, (2, 6)), (BlockShuffleLinear, (4,))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "sizes"), LAYERS)
def test_it_is_the_linear_layer_of_its_merged_matrix(kind, sizes, bias):
    layer, x = kind(8, 16, *sizes, bias=bias, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.merged(), layer.bias), atol=1e-13)
    assert layer(x[0, 0]).shape == (16,) and layer(x[:0]).shape == (0, 5, 16)
    assert (layer.bias is None) is not bias and torch.equal(layer.weight, layer.merged())


@pytest.mark.parametrize(("kind", "sizes"), LAYERS)
def test_from_dense_takes_the_bias_itself_and_says_its_error(kind, sizes):
    dense = nn.Linear(8, 16, dtype=torch.float64).eval()
    layer = kind.from_dense(dense, *sizes, merge_below=3)
    assert layer.bias is dense.bias and not layer.training and layer.merge_below == 3
    distance = float((dense.weight - layer.merged()).detach().norm() / dense.weight.detach().norm())
    assert layer.error(dense.weight) == pytest.approx(distance, rel=1e-12) and 0.1 < distance < 1
    drawn = kind(8, 16, *sizes, dtype=torch.float64)
    assert layer.error(dense.weight) < drawn.error(dense.weight)


def test_full_rank_is_the_dense_layer():
    dense = nn.Linear(8, 5, bias=False, dtype=torch.float64)
    layer = StructuredLinear.from_dense(dense, LowRank(5))
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.allclose(layer(x), dense(x), atol=1e-14) and layer.error(dense.weight) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "sizes"), LAYERS)
def test_half_precision(kind, sizes, dtype):
    layer = kind.from_dense(nn.Linear(8, 16, dtype=dtype), *sizes)
    wide = copy.deepcopy(layer).double()
    x = torch.randn(6, 8, dtype=dtype)
    assert layer(x).dtype == layer.merged().dtype == dtype
    assert (layer(x) - wide(x.double())).norm() <= 4 * torch.finfo(dtype).eps * wide(x.double()).norm()


def products(layer: StructuredLinear, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How many products with a dense matrix a call makes, and its answer."""
    calls, original = [], nn.functional.linear
    try:
        nn.functional.linear = lambda *args: calls.append(args[1].shape) or original(*args)
        answer = layer(x)
    finally:
        nn.functional.linear = original
    return len(calls), answer


@torch.no_grad()
def test_few_tokens_meet_the_product():
    layer, x = LowRankLinear(8, 16, 4, merge_below=4).eval(), torch.randn(2, 3, 8)
    few, many = products(layer, x[:1]), products(layer, x)
    assert (few[0], many[0]) == (1, 0)
    assert torch.allclose(few[1], many[1][:1], atol=1e-6)
    assert set(layer.state_dict()) == {"V", "U", "bias"}
    assert products(layer.train(), x[:1])[0] == 0


@pytest.mark.parametrize("change", ["step", "load", "cast", "copy", "data"])
def test_the_product_is_never_stale(change):
    layer, x = LowRankLinear(8, 16, 4, merge_below=4), torch.randn(3, 8)
    layer.eval().requires_grad_(False)
    before = layer(x)
    if change == "step":
        layer.requires_grad_(True)
        optimizer = torch.optim.SGD(layer.parameters(), 1.0)
        assert products(layer, x)[0] == 0, "gradients need the factors"
        layer(x).sum().backward()
        optimizer.step()
        layer.requires_grad_(False)
    elif change == "load":
        layer.load_state_dict(LowRankLinear(8, 16, 4).state_dict())
    elif change == "cast":
        layer, x = layer.double(), x.double()
        layer.V.mul_(2)
    elif change == "copy":
        layer = copy.deepcopy(layer)
        layer.U.mul_(2)
    else:
        layer.V.data.mul_(2)
        layer.eval()
    count, after = products(layer, x)
    assert count == 1 and not torch.allclose(after.float(), before)
    assert torch.allclose(after, layer.train()(x), atol=1e-5)


def test_pickle_leaves_the_product_out_and_inference_mode_works():
    with torch.inference_mode():
        layer = LowRankLinear(8, 16, 4, merge_below=4).eval()
        first = layer(torch.ones(1, 8))
    again = pickle.loads(pickle.dumps(layer))
    assert layer._product is not None and again._product is None
    with torch.inference_mode():
        assert torch.equal(again(torch.ones(1, 8)), first)


def test_a_graph_multiplies_by_the_factors_whatever_the_batch():
    layer = BlockShuffleLinear(8, 16, 4, merge_below=100).eval()
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
        x = torch.randn(7, 8)
        assert torch.allclose(exported(x), layer(x), atol=1e-6)


def test_doctests():
    names = ("block_dense", "block_shuffle", "correction", "linears", "low_rank", "self_guided", "trained_rank")
    for module in (importlib.import_module(f"tautomer.nn.{name}") for name in names):
        found = doctest.testmod(module, extraglobs={"nn": nn, "torch": torch, "LowRankLinear": LowRankLinear, "LowRank": LowRank})
        assert found.attempted and not found.failed
    assert not doctest.testmod(structured).failed


def test_what_counts_as_a_dense_layer():
    from transformers.pytorch_utils import Conv1D

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    conv, x = Conv1D(6, 4).eval(), torch.randn(2, 4)
    dense = dense_of(conv)
    assert torch.allclose(dense(x), conv(x)) and dense.bias is conv.bias and not dense.training
    assert (dense.in_features, dense.out_features) == (4, 6)
    layer = LowRankLinear.from_dense(dense, 4)
    assert torch.allclose(layer(x), conv(x), atol=1e-6)
    linear = nn.Linear(4, 4)
    assert dense_of(linear) is linear and dense_of(Own(4, 4)) is None and dense_of(nn.Conv1d(4, 4, 1)) is None
