"""Three forms of one mathematics agree; the past does not see the future; what is padded does not count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tautomer.rewrite.kernel_attention import kernel_attention, kernel_attention_step

F64 = torch.float64


def close(found: Tensor, wanted: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=atol)


def operands(n: int, f: int = 3, e: int = 5, heads: int = 4, key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.rand(2, heads, n, f, dtype=F64), torch.rand(2, key_heads, n, f, dtype=F64)
    return q, k, torch.randn(2, key_heads, n, e, dtype=F64)


def by_definition(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, normalized: bool) -> Tensor:
    """The recurrence of the paper, step by step, and nothing clever."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    z, rows = torch.zeros(*k.shape[:2], k.shape[3], dtype=F64), []
    S = z.unsqueeze(-1) * v[:, :, 0].unsqueeze(-2)
    g = None if g is None else g.expand(*q.shape[:3], g.shape[-1])
    for t in range(q.shape[2]):
        decay = torch.ones(1, dtype=F64) if g is None else g[:, :, t].exp()
        S = decay.unsqueeze(-1) * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = decay * z + k[:, :, t]
        y = torch.einsum("bhf,bhfe->bhe", q[:, :, t], S)
        rows.append(y / (q[:, :, t] * z).sum(-1, keepdim=True) if normalized else y)
    return torch.stack(rows, 2)


DECAYS: dict[str, Callable[[int, int], Tensor | None]] = {
    "no decay": lambda n, f: None,
    "a number per head": lambda n, f: -torch.rand(4, 1, 1, dtype=F64),
    "a number per step": lambda n, f: -torch.rand(2, 4, n, 1, dtype=F64),
    "a gate per step and channel": lambda n, f: -torch.rand(2, 4, n, f, dtype=F64),
    "strong decay": lambda n, f: -100 * torch.rand(4, 1, 1, dtype=F64),
    "strong gates": lambda n, f: -40 * torch.rand(2, 4, n, f, dtype=F64),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("n", "chunk"), [(1, 4), (7, 16), (13, 1), (13, 4), (16, 4), (150, 4), (37, 37)])
@pytest.mark.parametrize("normalized", [True, False])
def test_chunks_and_the_whole_square_are_the_recurrence(decay: str, n: int, chunk: int, normalized: bool) -> None:
    q, k, v = operands(n)
    g = DECAYS[decay](n, 3)
    wanted = by_definition(q, k, v, g, normalized)
    close(kernel_attention(q, k, v, g, None, True, normalized, chunk), wanted)
    close(kernel_attention(q, k, v, g, None, True, normalized, n), wanted)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalized", [True, False])
def test_steps_are_the_recurrence(decay: str, normalized: bool) -> None:
    q, k, v = operands(6, key_heads=2)
    g = DECAYS[decay](6, 3)
    state, rows = torch.zeros(2, 4, 3, 5 + normalized, dtype=F64), []
    for t in range(6):
        now = None if g is None else g[:, :, t : t + 1] if g.ndim == 4 else g
        y, state = kernel_attention_step(*(x[:, :, t : t + 1] for x in (q, k, v)), state, now, normalized)
        rows.append(y)
    close(torch.cat(rows, 2), by_definition(q, k, v, g, normalized))


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_of_chunks_are_those_of_the_recurrence(decay: str) -> None:
    inputs = [x.requires_grad_() for x in operands(23, key_heads=2)]
    g = DECAYS[decay](23, 3)
    if g is not None:
        inputs.append(g.requires_grad_())
    seed = torch.randn(2, 4, 23, 5, dtype=F64)
    for chunk in (4, 23):
        found = torch.autograd.grad((kernel_attention(*inputs[:3], g, None, True, True, chunk) * seed).sum(), inputs)
        wanted = torch.autograd.grad((by_definition(*inputs[:3], g, True) * seed).sum(), inputs)
        for x, y in zip(found, wanted, strict=True):
            close(x, y, 1e-10)


@pytest.mark.parametrize("normalized", [True, False])
def test_without_causality_it_is_the_weighted_mean_over_all_keys(normalized: bool) -> None:
    q, k, v = operands(7, key_heads=2)
    weights = q @ k.repeat_interleave(2, 1).mT
    weights = weights / weights.sum(-1, keepdim=True) if normalized else weights
    close(kernel_attention(q, k, v, normalized=normalized), weights @ v.repeat_interleave(2, 1))
    close(kernel_attention(q[:, :, :3], k, v, normalized=normalized), (weights @ v.repeat_interleave(2, 1))[:, :, :3])


def test_constant_decays_are_powers() -> None:
    """Pinned: position j counts λ^{i-j} at i, the own position is not decayed, S_t = λ S_{t-1} + k_tᵀ v_t."""
    q, k, v = operands(9)
    lam = torch.tensor([0.9, 0.5, 1.0, 0.1], dtype=F64)
    i = torch.arange(9)
    power = torch.where(i[:, None] >= i, lam[:, None, None] ** (i[:, None] - i).clamp_min(0), 0.0)
    wanted = (q @ k.mT * power) @ v
    close(kernel_attention(q, k, v, lam.log()[:, None, None], None, True, False, 4), wanted)
    close(kernel_attention(q, k, v, torch.zeros(4, 1, 1, dtype=F64), None, True, False, 4), (q @ k.mT).tril() @ v)
    vanishing = torch.full((4, 1, 1), -1e4, dtype=F64)
    close(kernel_attention(q, k, v, vanishing, None, True, False, 4), (q * k).sum(-1, keepdim=True) * v)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_future_leaves_no_trace(decay: str) -> None:
    q, k, v = operands(29)
    g = DECAYS[decay](29, 3)
    before = kernel_attention(q, k, v, g, None, True, True, 8)
    for x in (q, k, v):
        x[:, :, 19] = 1e12
    assert torch.equal(kernel_attention(q, k, v, g, None, True, True, 8)[:, :, :19], before[:, :, :19])


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_not_kept_may_be_anything_and_rows_without_keys_are_zero(causal: bool) -> None:
    q, k, v = operands(11, key_heads=2)
    keep = torch.ones(2, 1, 11, dtype=torch.bool)
    keep[0, 0, 8:] = False  # padded at the end
    keep[1, 0, :4] = False  # padded at the start
    k[0, :, 8:], v[0, :, 8:] = torch.inf, torch.nan
    k[1, :, :4], v[1, :, :4] = torch.nan, torch.inf
    y = kernel_attention(q, k, v, None, keep, causal, True, 4)
    close(y[:1, :, :8], kernel_attention(q[:1, :, :8], k[:1, :, :8], v[:1, :, :8], None, None, causal))
    close(y[1:, :, 4:], kernel_attention(q[1:, :, 4:], k[1:, :, 4:], v[1:, :, 4:], None, None, causal))
    assert not causal or bool((y[1, :, :4] == 0).all())


@pytest.mark.parametrize("causal", [True, False])
def test_samples_of_a_batch_do_not_see_each_other(causal: bool) -> None:
    q, k, v = operands(21)
    whole = kernel_attention(q, k, v, None, None, causal, True, 8)
    close(kernel_attention(q[1:], k[1:], v[1:], None, None, causal, True, 8), whole[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_summed_in_thirty_two(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in operands(700))
    k = k * 100  # a sum of 700 of these is beyond float16
    found = kernel_attention(q, k, v, None, None, True)
    wanted = kernel_attention(q.double(), k.double(), v.double(), None, None, True)
    assert found.dtype is dtype
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 2 * torch.finfo(dtype).eps
    _, state = kernel_attention_step(q[:, :, :1], k[:, :, :1], v[:, :, :1], torch.zeros(2, 4, 3, 6))
    assert state.dtype is torch.float32


def test_a_decay_needs_causality() -> None:
    with pytest.raises(ValueError, match="needs causal=True"):
        kernel_attention(*operands(3), torch.zeros(4, 1, 1))


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.tautomer.kernel_attention.v1(q, k, v, torch.tanh(q[..., :1]) - 1, None, True, True, 8)


def test_one_export_serves_every_length() -> None:
    """Without decay and with a free batch it is exported in tests/backends/test_onnx_table.py."""
    module = Attend()
    exported = torch.export.export(module, operands(21), dynamic_shapes=({2: torch.export.Dim.AUTO},) * 3, strict=False)
    assert "tautomer.kernel_attention.v1" in {str(node.target) for node in exported.graph.nodes}
    for n in (2, 3, 7, 8, 9, 16, 64, 300):
        x = operands(n)
        close(exported.module()(*x), module(*x))
