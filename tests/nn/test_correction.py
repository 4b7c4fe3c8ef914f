"""A branch of full rank gives everything back; more rank never less; whitened never less than LoRC where it was measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.nn import LowRankLinear, corrected
from tautomer.nn.correction import branch
from tautomer.rewrite.errors import UsageError

F64 = torch.float64


def anisotropic(n: int, tokens: int = 400) -> torch.Tensor:
    return torch.randn(tokens, n, dtype=F64) * torch.logspace(0, -2, n, dtype=F64) @ torch.randn(n, n, dtype=F64)


def quantised(W: torch.Tensor, levels: int = 8) -> torch.Tensor:
    scale = W.abs().amax(1, keepdim=True) / (levels / 2)
    return (W / scale).round() * scale


@pytest.mark.parametrize(("m", "n"), [(12, 8), (8, 12)])
@pytest.mark.parametrize("whitened", [False, True])
def test_the_error_is_the_tail_and_falls_to_nothing(m, n, whitened):
    E, X = torch.randn(m, n, dtype=F64), anisotropic(n)
    C = X.t() @ X
    root = torch.linalg.cholesky(C)
    S = torch.linalg.svdvals(E @ root if whitened else E)
    for k in range(1, min(m, n) + 1):
        V, U = branch(E, k, C if whitened else None)
        rest = E - U @ V
        error = (X @ rest.t() if whitened else rest).square().sum()
        assert V.shape == (k, n) and U.shape == (m, k)
        assert torch.allclose(error, S[k:].square().sum(), rtol=1e-9, atol=1e-18 * float(S[0] ** 2) + 1e-20)
        assert torch.allclose(V.norm(dim=1), U.norm(dim=0))
    assert torch.allclose(U @ V, E, atol=1e-10)


def test_whitened_is_nearer_in_its_outputs_than_lorc_and_farther_in_its_weights():
    E, X = torch.randn(16, 12, dtype=F64), anisotropic(12)
    errors = {}
    for name, C in (("lorc", None), ("whitened", X.t() @ X)):
        V, U = branch(E, 4, C)
        errors[name] = float((X @ (E - U @ V).t()).norm()), float((E - U @ V).norm())
    assert errors["whitened"][0] < 0.8 * errors["lorc"][0] and errors["whitened"][1] > errors["lorc"][1]


def test_fewer_tokens_than_channels():
    E, X = torch.randn(6, 10, dtype=F64), torch.randn(3, 10, dtype=F64)
    V, U = branch(E, 3, X.t() @ X)
    assert torch.allclose(X @ (E - U @ V).t(), torch.zeros(3, 6, dtype=F64), atol=1e-10)
    V, U = branch(torch.zeros(4, 4, dtype=F64), 2)
    assert torch.equal(U @ V, torch.zeros(4, 4, dtype=F64)) and U.isfinite().all()


@torch.no_grad()
def test_a_quantised_layer_is_recovered_step_by_step():
    exact = nn.Linear(12, 8, dtype=F64)
    coarse, X = nn.Linear(12, 8, dtype=F64), anisotropic(12)
    coarse.weight.copy_(quantised(exact.weight))
    coarse.bias = exact.bias
    errors = [float((coarse(X) - exact(X)).norm())]
    for k in range(1, 9):
        layer = corrected(coarse, exact.weight, k, covariance=X.t() @ X)
        errors.append(float((layer(X) - exact(X)).norm()))
        assert errors[-1] <= errors[-2] * (1 + 1e-9) + 1e-12
    assert errors[-1] < 1e-10 < errors[0]
    assert layer(X.view(20, 20, 12)).shape == (20, 20, 8)


def test_a_factored_layer_and_one_that_hides_its_weight():
    exact, x = nn.Linear(8, 8, dtype=F64), torch.randn(5, 8, dtype=F64)
    factored = LowRankLinear.from_dense(exact, 3)
    assert torch.allclose(corrected(factored, exact.weight, 5)(x), exact(x), atol=1e-12)
    hidden = nn.Sequential(factored)
    with pytest.raises(UsageError, match=r"Sequential has no weight to compare\n.*quantized="):
        corrected(hidden, exact.weight, 5)
    again = corrected(hidden, exact.weight, 5, quantized=factored.merged())
    assert torch.allclose(again(x), exact(x), atol=1e-12)


def test_the_branch_in_another_dtype():
    layer = nn.Linear(8, 8)
    made = corrected(layer, layer.weight + 0.1, 2, dtype=torch.bfloat16)
    assert made.V.dtype == torch.bfloat16 and made(torch.randn(2, 8)).dtype == torch.float32


def test_what_cannot_be_done_is_said():
    layer = nn.Linear(8, 6)
    with pytest.raises(UsageError, match=r"weight is \[6, 8\], the one it should have \[8, 6\]"):
        corrected(layer, layer.weight.t(), 2)
    with pytest.raises(UsageError, match=r"\[6, 8\] has no rank 7"):
        corrected(layer, layer.weight, 7)
    with pytest.raises(UsageError, match=r"covariance is \[6, 6\], of inputs with 8 channels"):
        corrected(layer, layer.weight, 2, covariance=torch.eye(6))
