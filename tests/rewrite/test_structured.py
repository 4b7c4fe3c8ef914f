"""The forms against matrices written out entry by entry, the nearest one against its error, and starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.ops import TorchOps
from tautomer.rewrite.structured import BlockDense, BlockShuffle, Form, LowRank

F64 = torch.float64
FORMS = (LowRank(3), BlockDense(2, 6), BlockShuffle(2), BlockShuffle(4))
# Wide, tall and square; middles that the blocks divide, and 12/4 = 3 and 8/4 = 2 places for 4 blocks, which they do not.
CASES = [(form, m, n) for form in FORMS for m, n in ((24, 12), (8, 20), (16, 16))]


def permutation(size: int, image: list[int]) -> Tensor:
    P = torch.zeros(size, size, dtype=F64)
    P[image, torch.arange(size)] = 1
    return P


def written_out(form: Form, m: int, n: int, first: Tensor, second: Tensor) -> Tensor:
    """The matrix by the definition of the module's docstring."""
    if isinstance(form, LowRank):
        return second @ first
    if isinstance(form, BlockDense):
        return second @ torch.block_diag(*first)
    k, s = first.shape[0], min(m, n)
    P1 = permutation(s, [(i % k) * (s // k) + i // k for i in range(s)])
    P2 = permutation(m, [(i % (m // k)) * k + i // (m // k) for i in range(m)])
    return P2 @ torch.block_diag(*second) @ P1 @ torch.block_diag(*first)


def factors(form: Form, m: int, n: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=F64, requires_grad=True) for shape in form.shapes(m, n)]


@pytest.mark.parametrize(("form", "m", "n"), CASES)
def test_product_and_gradients_are_those_of_the_matrix(form: Form, m: int, n: int) -> None:
    x, b, pair = torch.randn(2, 5, n, dtype=F64, requires_grad=True), torch.randn(m, dtype=F64), factors(form, m, n)
    y, W = form.apply(TorchOps(), x, *pair, b), written_out(form, m, n, *pair)
    expected = torch.nn.functional.linear(x, W, b)
    assert torch.allclose(y, expected, atol=1e-12) and torch.allclose(form.merged(*pair), W, atol=1e-12)
    assert torch.allclose(form.apply(TorchOps(), x, *pair), expected - b, atol=1e-12)
    assert form.numel(m, n) == sum(factor.numel() for factor in pair)
    seed = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(z, (x, *pair), seed, retain_graph=True) for z in (y, expected)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def blocks_of(form: Form, W: Tensor) -> list[tuple[Tensor, int]]:
    """The blocks that a form cuts ``W`` into, and its rank there, counted place by place."""
    m, n = W.shape
    if isinstance(form, LowRank):
        return [(W, form.rank)]
    k = form.blocks
    columns = W.chunk(k, 1)
    if isinstance(form, BlockDense):
        return [(block, form.rank // k) for block in columns]
    s = min(m, n)
    count = {(a, b): sum(i // (s // k) == a and i % k == b for i in range(s)) for a in range(k) for b in range(k)}
    return [(columns[a][b::k], count[a, b]) for a in range(k) for b in range(k)]


@pytest.mark.parametrize(("form", "m", "n"), CASES)
def test_the_nearest_is_as_near_as_the_singular_values_say_and_stationary(form: Form, m: int, n: int) -> None:
    W = torch.randn(m, n, dtype=F64)
    nearest = form.nearest(W)
    tail = sum(torch.linalg.svdvals(block)[rank:].square().sum() for block, rank in blocks_of(form, W))
    assert torch.allclose((W - form.merged(*nearest)).square().sum(), tail, rtol=1e-12)
    assert [factor.shape for factor in nearest] == [torch.Size(shape) for shape in form.shapes(m, n)]
    pair = [factor.requires_grad_() for factor in nearest]
    for gradient in torch.autograd.grad((W - written_out(form, m, n, *pair)).square().sum(), pair):
        assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize(("form", "m", "n"), CASES)
def test_a_matrix_of_the_form_is_its_own_nearest(form: Form, m: int, n: int) -> None:
    W = form.merged(*factors(form, m, n)).detach()
    assert torch.allclose(form.merged(*form.nearest(W)), W, atol=1e-12)


def test_full_rank_loses_nothing() -> None:
    W = torch.randn(6, 10, dtype=F64)
    for form in (LowRank(6), BlockDense(2, 10)):
        assert torch.allclose(form.merged(*form.nearest(W)), W, atol=1e-12)


@pytest.mark.parametrize("d", [768, 1024, 1536, 2048])
def test_parameters_of_a_feedforward_layer(d: int) -> None:
    f = 4 * d

    def ratio(form: Form) -> float:
        return (form.numel(f, d) + form.numel(d, f)) / (2 * d * f)

    assert (ratio(LowRank(d // 2)), ratio(LowRank(d // 4))) == (0.625, 0.3125)
    assert (ratio(BlockShuffle(2)), ratio(BlockShuffle(4))) == (0.625, 0.3125)
    assert BlockShuffle(4).numel(f, d) + BlockShuffle(4).numel(d, f) == (2 * d * d + 2 * d * f) // 4
    k, r = {768: (2, 512), 1024: (4, 768), 1536: (2, 1024), 2048: (4, 1536)}[d]
    for rank, expected in ((r, 0.586 if k == 4 else 0.625), (r // 2, 0.293 if k == 4 else 0.3125)):
        assert round(ratio(BlockDense(k, rank)), 3 if k == 4 else 4) == expected
    assert BlockDense(k, r).numel(f, d) + BlockDense(k, r).numel(d, f) == r * d // k + f * r + f * r // k + d * r
    assert LowRank.at(0.625)(f, d) == LowRank(d // 2) and LowRank.at(0.3)(10, 10) == LowRank(1)


def test_a_ratio_keeps_within_it_and_takes_the_largest_rank() -> None:
    for m, n in ((7, 5), (64, 48), (3072, 768)):
        for ratio in (0.2, 0.3, 0.7, 1.0):
            r = LowRank.at(ratio)(m, n).rank
            assert r == 1 or r * (m + n) <= ratio * m * n + 1e-6
            assert (r + 1) * (m + n) > ratio * m * n
    with pytest.raises(UsageError, match="share of the parameters"):
        LowRank.at(1.5)


def test_starts() -> None:
    form, generator = LowRank(4), torch.Generator()
    V, U = form.drawn(12, 8, like=torch.empty(0, dtype=F64), generator=generator.manual_seed(3))
    W = torch.randn(12, 8, dtype=F64, generator=generator.manual_seed(3)) * 8**-0.5
    top = torch.linalg.svdvals(W)[:4]
    assert torch.allclose(torch.linalg.svdvals(U @ V)[:4], top) and torch.allclose(V.norm(dim=1), top.sqrt())
    assert torch.allclose(U.norm(dim=0), top.sqrt())
    for form in (BlockDense(2, 6), BlockShuffle(2)):
        for factor in form.drawn(16, 8, like=torch.empty(0, dtype=F64)):
            singular = torch.linalg.svdvals(factor)
            assert torch.allclose(singular, torch.ones_like(singular))
    plain = LowRank(300).drawn(400, 400, "plain", std=0.02)
    assert all(abs(float(factor.std()) - 0.02) < 1e-3 for factor in plain)
    assert all(factor.dtype == torch.bfloat16 for factor in form.drawn(16, 8, like=torch.empty(0, dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (LowRank(9), r"a matrix \[12, 8\] has no rank 9\n.*from 1 to 8"),
        (LowRank(0), "no rank 0"),
        (BlockDense(3, 6), "3 blocks do not divide the 8 of inputs"),
        (BlockDense(4, 6), "4 blocks do not divide the 6 of rank"),
        (BlockDense(2, 10), r"2 blocks \[12, 4\] have no rank 10 in all\n.*at most 8"),
        (BlockShuffle(8), "8 blocks do not divide the 12 of outputs"),
        (BlockShuffle(0), "0 blocks do not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_said(form: Form, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        form.shapes(12, 8)
    with pytest.raises(UsageError, match=sentence):
        form.nearest(torch.zeros(12, 8))


def test_an_unknown_start_is_said() -> None:
    with pytest.raises(UsageError, match="'spectral', 'orthogonal' or 'plain'"):
        LowRank(2).drawn(4, 4, "zeros")  # type: ignore[arg-type]
