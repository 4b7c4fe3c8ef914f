"""U and V stay orthonormal, cond(S) at most tau, and a projected step is one along the manifold of the rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.nn import CondLowRank, CondLowRankLinear
from tautomer.nn.cond_low_rank import conditioned
from tautomer.rewrite.errors import UsageError

F64 = torch.float64


def test_it_is_the_nearest_of_its_rank():
    dense = nn.Linear(6, 9, dtype=F64)
    layer, x = CondLowRankLinear.from_dense(dense, 4), torch.randn(2, 3, 6, dtype=F64)
    S = torch.linalg.svdvals(dense.weight)
    assert torch.allclose((dense.weight - layer.weight).square().sum(), S[4:].square().sum()) and layer.bias is dense.bias
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.merged(), layer.bias), atol=1e-13)
    full = CondLowRankLinear.from_dense(dense, 6)
    assert torch.allclose(full(x), dense(x), atol=1e-13)
    assert CondLowRankLinear(6, 9, 4, bias=False).bias is None


def test_the_clamp():
    S = torch.randn(5, 5, dtype=F64)
    U, s, Vh = torch.linalg.svd(S)
    for tau in (1.0, 1.5, 4.0):
        new = torch.linalg.svdvals(conditioned(S, tau))
        e = s.mean() * (tau - 1) / (tau + 1)
        assert torch.allclose(new, s.clamp(s.mean() - e, s.mean() + e)) and new[0] / new[-1] <= tau * (1 + 1e-12)
    assert torch.allclose(conditioned(S, 1e9), S, atol=1e-6)
    flat = conditioned(S, None)
    assert torch.allclose(flat @ flat.t(), torch.eye(5, dtype=F64) * (S @ S.t()).trace() / 5, atol=1e-12)
    assert torch.allclose(flat, U @ Vh * ((S @ S.t()).trace() / 5).sqrt(), atol=1e-12)


@pytest.mark.parametrize("tau", [1.5, 5.0, None])
def test_training_keeps_the_condition(tau):
    torch.manual_seed(3)
    model = nn.Sequential(CondLowRankLinear(8, 12, 6), nn.Tanh(), CondLowRankLinear(12, 8, 6)).double()
    callback, target = CondLowRank(model, tau), torch.randn(8, 8, dtype=F64)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(60):
        x = torch.randn(64, 8, dtype=F64)
        loss = (model(x) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        callback.before_step()
        optimizer.step()
        callback.step()
        losses.append(float(loss.detach()))
        for layer in callback.layers:
            eye = torch.eye(6, dtype=F64)
            assert torch.allclose(layer.U.t() @ layer.U, eye, atol=1e-12) and torch.allclose(
                layer.V.t() @ layer.V, eye, atol=1e-12
            )
            s = torch.linalg.svdvals(layer.merged())[:6]
            assert s[0] / s[5] <= (tau or 1) * (1 + 1e-9)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_projected_step_moves_along_the_manifold():
    layer, step = CondLowRankLinear(7, 9, 3, bias=False, dtype=F64), 1e-6
    W, Z = layer.merged().detach(), torch.randn(9, 7, dtype=F64)  # Z: the gradient of the loss <Z, W>
    U, V = layer.U.detach().clone(), layer.V.detach().clone()
    (layer.merged() * Z).sum().backward()
    CondLowRank(layer, 1e12).before_step()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= step * parameter.grad
    tangent = U @ U.t() @ Z + Z @ V @ V.t() - U @ U.t() @ Z @ V @ V.t()
    assert torch.allclose((W - layer.merged()) / step, tangent, atol=1e-4)


def test_the_signs_are_kept():
    layer = CondLowRankLinear(6, 6, 3, dtype=F64)
    W, U = layer.merged().detach().clone(), layer.U.detach().clone()
    CondLowRank(layer, 1e12).step()
    assert torch.allclose(layer.U, U, atol=1e-12) and torch.allclose(layer.merged(), W, atol=1e-10)


def test_without_gradients_and_in_half_precision():
    layer = CondLowRankLinear(6, 6, 3, dtype=torch.bfloat16)
    callback = CondLowRank(layer)
    callback.before_step()
    callback.step()
    assert layer.U.dtype == torch.bfloat16 and layer(torch.ones(2, 6, dtype=torch.bfloat16)).isfinite().all()


def test_what_cannot_be_done_is_said():
    with pytest.raises(UsageError, match="no CondLowRankLinear"):
        CondLowRank(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="no condition number is below 1"):
        CondLowRank(CondLowRankLinear(4, 4, 2), 0.5)
    with pytest.raises(UsageError, match=r"\[4, 6\] has no rank 5"):
        CondLowRankLinear(6, 4, 5)
