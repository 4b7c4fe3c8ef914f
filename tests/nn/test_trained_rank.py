"""A convolution is two at full rank, whatever its stride and padding; projections keep the energy; the subgradient is one."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from tautomer.nn import LowRankLinear, TrainedRankPruning
from tautomer.nn.trained_rank import Matricisation, as_matrix, as_weight, factored, rank_of
from tautomer.rewrite.errors import UsageError

CONVOLUTIONS = [
    {"kernel_size": (3, 5), "padding": (1, 2)},
    {"kernel_size": 3, "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "bias": False},
    {"kernel_size": (1, 3), "padding": "same"},
    {"kernel_size": (4, 3), "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 2, "stride": 2, "padding_mode": "circular"},
]


@pytest.mark.parametrize("matrix", get_args(Matricisation))
@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_at_full_rank_two_convolutions_are_the_one(options, matrix):
    conv, x = nn.Conv2d(4, 6, **options).double().eval(), torch.randn(2, 4, 9, 8, dtype=torch.float64)
    rank = min(as_matrix(conv.weight, matrix).shape[-2:])
    two = factored(conv, rank, matrix)
    assert torch.allclose(two(x), conv(x), atol=1e-12) and not two.training
    assert two[1].bias is conv.bias and two[0].bias is None
    N, C, H, W = conv.weight.shape
    each = {"channel": C * H * W + N, "spatial": C * H + N * W, "depthwise": (C + H * W) * N}[matrix]
    assert two[0].weight.numel() + two[1].weight.numel() == rank * each


@pytest.mark.parametrize("matrix", get_args(Matricisation))
def test_of_a_lower_rank_the_error_is_the_tail(matrix):
    conv = nn.Conv2d(4, 6, 3, bias=False).double()
    S = torch.linalg.svdvals(as_matrix(conv.weight, matrix))
    two = factored(conv, 3, matrix)
    # What two convolutions compute of a unit impulse is their kernel.
    taps = two(torch.eye(36, dtype=torch.float64).view(36, 4, 3, 3)).view(36, 6).t().reshape(6, 4, 3, 3)
    assert torch.allclose((conv.weight - taps).square().sum(), S[..., 3:].square().sum(), rtol=1e-10)
    back = as_weight(as_matrix(conv.weight, matrix), conv.weight, matrix)
    assert torch.equal(back, conv.weight)


def test_rank_by_energy():
    S = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [rank_of(S, energy) for energy in (0.1, 9 / 14, 0.65, 13 / 14, 0.99, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_of(torch.zeros(3), 0.9) == 1
    several = torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 0.0]])  # 9 + 1, then 1, of 11 in all
    assert [rank_of(several, energy) for energy in (0.9, 10 / 11, 0.92, 1.0)] == [1, 1, 2, 2]


def test_a_projection_every_few_steps_keeps_the_energy():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 6)).double()
    pruning = TrainedRankPruning(model, 0.8, every=2, matrix="spatial", skip=["0"])
    assert list(pruning.layers) == ["2", "4"]
    before = {path: layer.weight.detach().clone() for path, layer in pruning.layers.items()}
    first = model[0].weight.detach().clone()
    pruning.step()
    assert all(torch.equal(layer.weight, before[path]) for path, layer in pruning.layers.items())
    pruning.step()
    for path, layer in pruning.layers.items():
        old, new = as_matrix(before[path], "spatial"), as_matrix(layer.weight.detach(), "spatial")
        rank = int(torch.linalg.matrix_rank(new))
        assert 0.8 * old.square().sum() <= new.square().sum() < old.square().sum()
        assert rank == rank_of(torch.linalg.svdvals(old), 0.8) < min(old.shape)
    assert torch.equal(model[0].weight, first)


def test_the_subgradient_is_that_of_the_nuclear_norm():
    layer = nn.Linear(5, 7, dtype=torch.float64)
    pruning = TrainedRankPruning(layer, energy=1.0, nuclear=0.3)
    layer.weight.grad = torch.ones_like(layer.weight)
    pruning.before_step()
    (expected,) = torch.autograd.grad(torch.linalg.matrix_norm(layer.weight, "nuc"), layer.weight)
    assert torch.allclose(layer.weight.grad, 1 + 0.3 * expected, atol=1e-10)
    lean = TrainedRankPruning(layer, energy=0.5, nuclear=0.3)
    layer.weight.grad.zero_()
    lean.before_step()
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    r = rank_of(S, 0.5)
    assert r < 5 and torch.allclose(layer.weight.grad, 0.3 * U[:, :r] @ Vh[:r], atol=1e-10)


@torch.no_grad()
def test_under_depthwise_every_output_sums_paths_of_one_channel():
    conv, x = nn.Conv2d(4, 3, 3, padding=1).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    first, second = factored(conv, 2, "depthwise")
    paths = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False).double()
    paths.weight.copy_(second.weight.reshape(6, 1, 3, 3))
    expected = paths(first(x)).unflatten(1, (3, 2)).sum(2) + conv.bias[:, None, None]
    assert torch.allclose(second(first(x)), expected, atol=1e-12)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).double()
    pruning = TrainedRankPruning(model, 0.5, every=1, matrix="depthwise")
    pruning.step()
    ranks = torch.linalg.matrix_rank(as_matrix(model[0].weight, "depthwise"))
    image, whole = torch.randn(1, 8, 5, 5, dtype=torch.float64), model[0]
    expected = whole(image)
    assert ranks.max() < 4 and pruning.decompose() == ("0",)
    assert torch.allclose(model(image), expected, atol=1e-10)


@torch.no_grad()
def test_what_was_trained_near_a_low_rank_is_cut_without_loss():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 32)
    ).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    pruning = TrainedRankPruning(model, 0.4, every=1, only=["2", "4"])
    pruning.step()
    expected = model(x)
    assert pruning.decompose() == ("2", "4")
    assert isinstance(model[2], nn.Sequential) and isinstance(model[4], LowRankLinear)
    assert torch.allclose(model(x), expected, atol=1e-10)
    full = TrainedRankPruning(nn.Sequential(nn.Linear(4, 4)))
    assert full.decompose(1.0) == (), "two factors of full rank are larger"


def test_a_gradient_that_is_missing_and_half_precision():
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    pruning = TrainedRankPruning(layer, 0.7, every=1, nuclear=0.1)
    pruning.before_step()
    pruning.step()
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.grad is None


@pytest.mark.parametrize("options", [{"energy": 0.0}, {"energy": 1.1}, {"every": 0}, {"nuclear": -1.0}, {"matrix": "ND"}])
def test_arguments_out_of_range(options):
    with pytest.raises(UsageError, match="out of range"):
        TrainedRankPruning(nn.Linear(4, 4), **options)


def test_what_cannot_be_cut():
    with pytest.raises(UsageError, match="no linear layer or convolution there"):
        TrainedRankPruning(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1)))
    with pytest.raises(UsageError, match="no ungrouped convolution"):
        factored(nn.Conv2d(4, 4, 3, groups=2), 2)
    with pytest.raises(UsageError, match=r"\[4, 36\] has no rank 5"):
        factored(nn.Conv2d(4, 4, 3), 5)
