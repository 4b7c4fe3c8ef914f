"""What the maps compute, pinned to their papers' formulas, and what they start from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tautomer.passes.attention.feature_maps import (
    Elu,
    FeatureMap,
    Heads,
    Hedgehog,
    JointHedgehog,
    LogNormal,
    Relu,
    Side,
    log_normal_constants,
)
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.kernel_attention import kernel_attention
from tautomer.rewrite.ops import TorchOps

F64 = torch.float64
GIVEN = Heads(
    4, 6, 6**-0.5, {"query": torch.full((4,), 1.5, dtype=F64), "key": torch.full((4,), 0.5, dtype=F64)}, torch.ones(4).double()
)


def weights(phi: FeatureMap, side: Side = "query", given: Heads = GIVEN) -> dict[str, Tensor]:
    return {name: x.double() for name, x in phi.initial(given, side, torch.Generator().manual_seed(0)).items()}


def features(phi: FeatureMap, x: Tensor, side: Side = "query", **given: Tensor) -> Tensor:
    y: Tensor = phi.features(TorchOps(), x, side, given or weights(phi, side))
    return y


def test_elu_is_positive() -> None:
    x = torch.randn(2, 4, 5, 6, dtype=F64)
    assert torch.equal(features(Elu(), x), torch.where(x > 0, x + 1, x.exp()).where(x > 0, F.elu(x) + 1))


def test_relu_is_a_layer_per_head_that_never_vanishes() -> None:
    x, w = torch.randn(2, 4, 5, 6, dtype=F64), weights(Relu(8))
    wanted = torch.stack([F.relu(x[:, h] @ w["weight"][h] + w["bias"][h]) for h in range(4)], 1).clamp_min(1e-12)
    torch.testing.assert_close(features(Relu(8), x, **w), wanted)
    assert w["weight"].shape == (4, 6, 8) and w["bias"].shape == (4, 1, 8)
    assert 0.3 < w["weight"].abs().max() <= 6**-0.5
    everything_off = {"weight": torch.zeros(4, 6, 8, dtype=F64), "bias": -torch.ones(4, 1, 8, dtype=F64)}
    assert bool((features(Relu(8), x, **everything_off) == 1e-12).all())


def test_hedgehog_is_two_softmaxes_and_its_joint_form_is_one() -> None:
    """The two published forms are two functions: LoLCATs' features sum up to 2, those of flash-linear-attention to 1."""
    x = torch.randn(2, 4, 5, 6, dtype=F64)
    W = torch.randn(4, 6, 3, dtype=F64)
    y = torch.einsum("bhnd,hdf->bhnf", x, W)
    torch.testing.assert_close(features(Hedgehog(3), x, weight=W), torch.cat([y.softmax(-1), (-y).softmax(-1)], -1))
    b = torch.randn(3, dtype=F64)
    joint = features(JointHedgehog(3), x, weight=W[0], bias=b)
    wanted = torch.cat([2 * (x @ W[0] + b), -2 * (x @ W[0] + b)], -1).softmax(-1)
    torch.testing.assert_close(joint, wanted)
    assert features(Hedgehog(), x).sum(-1).mean().item() == pytest.approx(2.0)
    assert features(JointHedgehog(), x).sum(-1).mean().item() == pytest.approx(1.0)


def test_hedgehog_starts_as_the_identity() -> None:
    assert torch.equal(weights(Hedgehog(3))["weight"][1], torch.eye(6, 3, dtype=F64))
    assert torch.equal(weights(JointHedgehog())["weight"], torch.eye(6, dtype=F64))


def test_the_constants_of_log_normal_attention_are_those_of_the_repository_at_its_width_and_others_elsewhere() -> None:
    a, b = log_normal_constants(64)
    assert a == pytest.approx(0.14855, rel=0.02) and b == pytest.approx(-0.35487, rel=0.15)
    assert log_normal_constants(32)[0] == pytest.approx(0.193, rel=0.02)
    assert log_normal_constants(128)[0] == pytest.approx(0.117, rel=0.02)


def test_log_normal_weights_vary_as_those_of_softmax() -> None:
    """Of queries and keys with independent entries: the variance of log p, within the fit of the line."""
    torch.manual_seed(0)
    d, n, sigma = 64, 512, 1.5
    q, k = (sigma * torch.randn(1, 1, n, d, dtype=F64) for _ in range(2))
    given = Heads(1, d, d**-0.5, {"query": q.std().view(1), "key": k.std().view(1)}, k.amax().view(1))
    f, h = (features(LogNormal(), x, side, **weights(LogNormal(), side, given)) for x, side in ((q, "query"), (k, "key")))  # type: ignore[arg-type]
    log_p = (f @ h.mT).log()
    found = (log_p - log_p.logsumexp(-1, True)).var().item()
    wanted = (q @ k.mT * d**-0.5).log_softmax(-1).var().item()
    assert found == pytest.approx(wanted, rel=0.3)
    # At twice the spread of queries, or twice the scale, the keys' factor follows the scores, not the entries alone.
    twice = Heads(1, d, 2 * d**-0.5, given.spread, given.top)
    halved = Heads(1, d, d**-0.5, {"query": 2 * q.std().view(1), "key": k.std().view(1)}, given.top)
    assert weights(LogNormal(), "key", twice)["factor"].item() == pytest.approx(
        weights(LogNormal(), "key", halved)["factor"].item()
    )


def test_what_log_normal_attention_takes_off_before_exp_cancels() -> None:
    q, k, v = (torch.randn(2, 4, 9, 6, dtype=F64) for _ in range(3))
    w = weights(LogNormal(), "key")

    def attend(shift: float, moved: float) -> Tensor:
        h = features(LogNormal(), k, "key", factor=w["factor"], shift=w["shift"] + shift)
        return kernel_attention(features(LogNormal(), q + moved), h, v, None, None, True, True, 4)

    torch.testing.assert_close(attend(7.0, 0.0), attend(0.0, 0.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attend(0.0, 300.0), attend(0.0, 0.0), rtol=1e-12, atol=1e-12)  # and no overflow


def test_log_normal_attention_without_spread_is_the_mean_of_the_values() -> None:
    q, k, v = (torch.randn(2, 4, 9, 6, dtype=F64) for _ in range(3))
    zero = torch.zeros(4, 1, 1, dtype=F64)
    f, h = features(LogNormal(), q, factor=zero), features(LogNormal(), k, "key", factor=zero, shift=zero)
    torch.testing.assert_close(kernel_attention(f, h, v), v.mean(-2, keepdim=True).expand_as(v))


def test_log_normal_factors_are_measured() -> None:
    with pytest.raises(Refused, match="pass data="):
        LogNormal().initial(Heads(4, 6, 0.4), "query", torch.Generator())


@pytest.mark.parametrize("phi", [Elu(), Relu(), Hedgehog(), JointHedgehog(), LogNormal()], ids=lambda phi: type(phi).__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_in_sixteen_bits_are_positive_and_finite(phi: FeatureMap, dtype: torch.dtype) -> None:
    x = (8 * torch.randn(2, 4, 5, 6)).to(dtype)
    for side in ("query", "key"):
        y = phi.features(TorchOps(), x, side, {name: w.to(dtype) for name, w in weights(phi, side).items()})  # type: ignore[arg-type]
        assert bool(y.isfinite().all()) and bool((y >= 0).all()) and math.isfinite(float(y.sum()))
