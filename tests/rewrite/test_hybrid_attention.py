"""Near keys by softmax and far ones by a kernel, against the sum written out; the step against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.hybrid_attention import block_attention, hybrid_attention, hybrid_attention_step

F64 = torch.float64


def close(found: Tensor, wanted: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=atol)


def operands(n: int, heads: int = 4, key_heads: int = 4) -> list[Tensor]:
    q, f = torch.randn(2, heads, n, 6, dtype=F64), torch.rand(2, heads, n, 3, dtype=F64)
    k, h = torch.randn(2, key_heads, n, 6, dtype=F64), torch.rand(2, key_heads, n, 3, dtype=F64)
    return [q, k, torch.randn(2, key_heads, n, 5, dtype=F64), f, h, torch.randn(heads, dtype=F64)]


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, h: Tensor, gate: Tensor, window: int, terraced: bool = False,
    keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The whole square, row by row."""
    k, v, h = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v, h))
    n, rows = q.shape[2], []
    keep = torch.ones(2, n, dtype=torch.bool) if keep is None else keep
    for i in range(n):
        first = (i // window - 1) * window if terraced else i - window + 1
        a, b = torch.zeros(*q.shape[:2], n, dtype=F64), torch.zeros(*q.shape[:2], n, dtype=F64)
        s = ((q[:, :, i : i + 1] @ k.mT).squeeze(2) / 6**0.5).masked_fill(~keep[:, None], -torch.inf)
        near = s[:, :, max(0, first) : i + 1]
        a[:, :, max(0, first) : i + 1] = gate.sigmoid()[:, None] * (near - near.amax(-1, keepdim=True).clamp_min(-1e300)).exp()
        b[:, :, : max(0, first)] = ((f[:, :, i : i + 1] @ h.mT).squeeze(2) * keep[:, None])[:, :, : max(0, first)]
        weight = (a + b) / (a + b).sum(-1, keepdim=True).clamp_min(1e-12)
        rows.append((weight.unsqueeze(2) @ v).squeeze(2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("terraced", [False, True])
@pytest.mark.parametrize(("n", "window"), [(1, 1), (7, 3), (41, 1), (70, 5), (96, 32), (97, 32), (150, 40), (33, 40)])
def test_it_is_the_sum_written_out(n: int, window: int, terraced: bool) -> None:
    x = operands(n, key_heads=2)
    close(hybrid_attention(*x, window, terraced), by_definition(*x, window, terraced))


@pytest.mark.parametrize("terraced", [False, True])
@pytest.mark.parametrize("n", [1, 20, 45])
def test_a_window_over_everything_is_softmax_whatever_the_rest_is(n: int, terraced: bool) -> None:
    q, k, v, f, h, gate = operands(n)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for window in (n, n + 30):
        close(hybrid_attention(q, k, v, f, h, gate, window, terraced), wanted)
        close(hybrid_attention(q, k, v, f * 1e6, h.log(), gate - 9, window, terraced), wanted)


def test_gradients_are_those_of_the_sum() -> None:
    x = [y.requires_grad_() for y in operands(50, key_heads=2)]
    seed = torch.randn(2, 4, 50, 5, dtype=F64)
    for terraced in (False, True):
        found = torch.autograd.grad((hybrid_attention(*x, 6, terraced) * seed).sum(), x)
        wanted = torch.autograd.grad((by_definition(*x, 6, terraced) * seed).sum(), x)
        for y, z in zip(found, wanted, strict=True):
            close(y, z, 1e-10)


@pytest.mark.parametrize("window", [1, 4, 30])
def test_steps_are_the_whole_and_carry_a_constant(window: int) -> None:
    q, k, v, f, h, gate = operands(23, key_heads=2)
    wanted = hybrid_attention(q, k, v, f, h, gate, window)
    state = torch.zeros(2, 4, 3, 6, dtype=F64)
    keys, values = torch.ones(2, 2, window, 6, dtype=F64), torch.ones(2, 2, window, 5, dtype=F64)
    features = torch.zeros(2, 2, window, 3, dtype=F64)
    for t in range(23):
        now = (x[:, :, t : t + 1] for x in (q, k, v, f, h))
        y, *rest = hybrid_attention_step(*now, gate, state, keys, values, features, torch.tensor(t))
        assert [x.shape for x in rest] == [x.shape for x in (state, keys, values, features)]
        state, keys, values, features = rest
        close(y, wanted[:, :, t : t + 1])


@pytest.mark.parametrize("terraced", [False, True])
def test_the_future_leaves_no_trace(terraced: bool) -> None:
    x = operands(50)
    before = hybrid_attention(*x, 5, terraced)
    for y in x[:5]:
        y[:, :, 37] = 1e9
    assert torch.equal(hybrid_attention(*x, 5, terraced)[:, :, :37], before[:, :, :37])


def test_what_is_not_kept_may_be_anything() -> None:
    x = operands(50, key_heads=2)
    keep = torch.ones(2, 50, dtype=torch.bool)
    keep[0, 41:], keep[1, :9] = False, False
    wanted = by_definition(*x, 5, keep=keep)
    for y in (x[1], x[2], x[4]):
        y[0, :, 41:], y[1, :, :9] = torch.nan, torch.inf
    found = hybrid_attention(*x, 5, keep=keep[:, None])
    close(found[0, :, :41], wanted[0, :, :41])
    close(found[1, :, 9:], wanted[1, :, 9:])
    assert bool((found[1, :, :9] == 0).all())
    close(found[1:, :, 9:], hybrid_attention(*(y[1:, :, 9:] for y in x[:5]), x[5], 5))  # and the batch does not matter


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "block"), [(1, 4), (23, 5), (20, 5), (9, 20)])
def test_blocks_are_softmax_by_themselves(n: int, block: int, causal: bool) -> None:
    q, k, v, *_ = operands(n, key_heads=2)
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[0, n // 2 : n - 1] = False
    at = torch.arange(n)
    seen = (at[:, None] // block == at // block) & keep[:, None, None]
    seen = seen & (at <= at[:, None]) if causal else seen
    wanted = F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True).nan_to_num(0.0)
    close(block_attention(q, k, v, block, causal, keep[:, None], 0.3), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_summed_in_thirty_two(dtype: torch.dtype) -> None:
    x = [y.to(dtype) for y in operands(600)]
    x[3], x[4] = x[3] * 30, x[4] * 30
    found, wanted = hybrid_attention(*x, 8), hybrid_attention(*(y.double() for y in x), 8)
    assert found.dtype is dtype
    assert (found.double() - wanted).abs().max() / wanted.abs().max() < 2 * torch.finfo(dtype).eps


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, f: Tensor, h: Tensor, gate: Tensor) -> Tensor:
        return torch.ops.tautomer.hybrid_attention.v1(q, k, v, f, h, gate, 5)


def test_one_export_serves_every_length() -> None:
    module, dynamic = Attend(), {2: torch.export.Dim.AUTO}
    exported = torch.export.export(module, tuple(operands(50)), dynamic_shapes=(*[dynamic] * 5, None), strict=False).module()
    for n in (2, 5, 34, 35, 36, 70, 200):
        x = operands(n)
        close(exported(*x), module(*x))
