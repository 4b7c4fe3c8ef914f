"""The factors are the best of their rank on what was seen, and say how far off they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tautomer.rewrite.factors import RIDGE, Moments, break_even, cost, factor

torch.manual_seed(3)
N = 12


def rows(count: int, n: int = N) -> Tensor:
    """Inputs whose channels are unlike in size and not independent."""
    mixing = torch.randn(n, n, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, n, dtype=torch.float64))
    return torch.randn(count, n, dtype=torch.float64) @ mixing.T + torch.linspace(-1, 1, n, dtype=torch.float64)


def seen(X: Tensor) -> Moments:
    return Moments(X.T @ X, X.sum(0), len(X))


def error(X: Tensor, W: Tensor, V: Tensor) -> float:
    """E|W x - V x|^2"""
    return float((X @ (W - V).T).square().sum(1).mean())


@pytest.mark.parametrize("m", [7, N, 20])
def test_the_predicted_tail_is_the_measured_error(m: int) -> None:
    X, W = rows(200), torch.randn(m, N, dtype=torch.float64)
    factors = factor(W, seen(X).covariance(centred=False))
    total = error(X, W, torch.zeros_like(W))
    measured = [error(X, W, factors.product(W, rank)) for rank in range(min(m, N) + 1)]
    torch.testing.assert_close(factors.tail / total, torch.tensor(measured, dtype=torch.float64) / total, rtol=0, atol=1e-10)
    assert measured == sorted(measured, reverse=True)
    assert [int(torch.linalg.matrix_rank(factors.product(W, r))) for r in (1, 3, 5)] == [1, 3, 5]
    assert factors.error(3) == pytest.approx((measured[3] / total) ** 0.5)


@pytest.mark.parametrize("m", [7, N, 20])
def test_full_rank_is_the_matrix(m: int) -> None:
    X, W = rows(200), torch.randn(m, N, dtype=torch.float64)
    for C in (None, seen(X).covariance(centred=True)):
        torch.testing.assert_close(factor(W, C).product(W, min(m, N)), W, rtol=1e-9, atol=1e-9)


def test_it_is_what_whitening_gives() -> None:
    X, W, r = rows(200), torch.randn(20, N, dtype=torch.float64), 5
    C = seen(X).covariance(centred=False)
    L = torch.linalg.cholesky(C)
    U, s, V = torch.linalg.svd(W @ L, full_matrices=False)
    whitened = (U[:, :r] * s[:r]) @ V[:r] @ torch.linalg.inv(L)
    torch.testing.assert_close(factor(W, C).product(W, r), whitened, rtol=1e-9, atol=1e-9)


def test_without_a_covariance_it_is_the_svd() -> None:
    W, r = torch.randn(9, N, dtype=torch.float64), 4
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(factor(W).product(W, r), (U[:, :r] * s[:r]) @ V[:r])


def test_the_covariance_beats_its_diagonal_and_none() -> None:
    X, W, r = rows(300), torch.randn(20, N, dtype=torch.float64), 4
    C = seen(X).covariance(centred=False)
    errors = [error(X, W, factor(W, covariance).product(W, r)) for covariance in (C, torch.diag(C.diagonal()), None)]
    assert errors[0] < 0.5 * min(errors[1:])


def test_the_mean_costs_nothing_where_there_is_a_bias() -> None:
    X, W, r = rows(300) + 3, torch.randn(20, N, dtype=torch.float64), 4
    moments = seen(X)
    factors = factor(W, moments.covariance(centred=True))
    V = factors.product(W, r)
    shifted = float((X @ W.T - (X @ V.T + (W - V) @ moments.mean)).square().sum(1).mean())
    assert shifted == pytest.approx(float(factors.tail[r]), rel=1e-9)
    assert shifted < float(factor(W, moments.covariance(centred=False)).tail[r])


@pytest.mark.parametrize("dead", [1, 4])
def test_singular_covariances(dead: int) -> None:
    X, W = rows(200), torch.randn(20, N, dtype=torch.float64)
    X[:, :dead] = 0
    factors = factor(W, seen(X).covariance(centred=False))
    assert factors.left.isfinite().all() and float(factors.tail[N - dead] / factors.tail[0]) < 1e-10
    torch.testing.assert_close(factors.product(W, N), W, rtol=1e-7, atol=1e-7)


def test_few_rows_get_a_ridge() -> None:
    few = seen(rows(5))
    assert torch.linalg.eigvalsh(few.covariance(centred=False))[0] > 0
    many = seen(rows(50))
    torch.testing.assert_close(many.covariance(centred=False), many.second / 50)


@pytest.mark.parametrize(("m", "n", "rank"), [(768, 3072, 614), (4096, 11008, 2985), (4096, 4096, 2048), (4096, 1024, 819)])
def test_break_even(m: int, n: int, rank: int) -> None:
    assert break_even(m, n) in (rank, rank - 1)
    assert cost(m, n, break_even(m, n)) < cost(m, n, None) <= cost(m, n, break_even(m, n) + 1)


def test_an_error_counts_as_much_as_it_costs_and_the_tail_says_what() -> None:
    """Nothing of the rank loses less, and what is lost is the tail; where all directions cost the same, so do the factors."""
    X, W = torch.randn(200, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    scales = torch.diag(torch.logspace(-1, 1, 9, dtype=torch.float64))
    C, G = X.T @ X / len(X), scales @ scales
    weighed, plain = factor(W, C, G), factor(W, C)
    ridged = G + RIDGE * G.diagonal().mean() * torch.eye(9, dtype=torch.float64)

    def lost(product: Tensor) -> float:
        error = (W - product) @ X.T
        return float((error * (ridged @ error)).sum() / len(X))

    for rank in range(7):
        assert lost(weighed.product(W, rank)) == pytest.approx(float(weighed.tail[rank]), abs=1e-10 * float(weighed.tail[0]))
        assert lost(weighed.product(W, rank)) <= lost(plain.product(W, rank)) + 1e-9
    assert lost(weighed.product(W, 2)) < 0.8 * lost(plain.product(W, 2))
    torch.testing.assert_close(weighed.product(W, 6), W, rtol=1e-10, atol=1e-10)
    same = factor(W, C, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(same.product(W, 3), plain.product(W, 3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1e-12, 1.0])
def test_factors_are_of_one_size_however_small_the_gradients_are(size: float) -> None:
    """A step of Adam is as long in both, and half precision holds both."""
    W = torch.randn(9, 6, dtype=torch.float64)
    W[:, 4:] = 0
    X = torch.randn(200, 6, dtype=torch.float64)
    A = torch.randn(9, 9, dtype=torch.float64)
    factors = factor(W, X.T @ X / len(X), size * (A @ A.T))
    columns, rows = factors.left.norm(dim=0), (factors.right.T @ W).norm(dim=1)
    torch.testing.assert_close(columns[:4], rows[:4], rtol=1e-9, atol=0)
    assert float(columns[:4].min()) > 0.1 and float(columns[:4].max()) < 10
    assert factors.left.float().isfinite().all() and factors.right.float().isfinite().all()
    torch.testing.assert_close(factors.product(W, 6), W, rtol=1e-9, atol=1e-9)
    nothing = factor(torch.zeros_like(W), None, size * (A @ A.T))
    assert nothing.left.float().isfinite().all() and nothing.right.float().isfinite().all()
