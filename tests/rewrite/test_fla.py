"""What is handed to the kernels of flash-linear-attention, by a stand-in of their signatures: no test has their CUDA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tautomer.rewrite import _fla
from tautomer.rewrite.kernel_attention import kernel_attention


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None) -> Tensor:
    """``[batch, n, heads, ·]``, g per channel; the default scale is theirs."""
    scale, state, rows = q.shape[-1] ** -0.5 if scale is None else scale, torch.zeros(()), []
    for t in range(q.shape[1]):
        state = g[:, t].float().exp().unsqueeze(-1) * state + k[:, t].float().unsqueeze(-1) * v[:, t].float().unsqueeze(-2)
        rows.append(torch.einsum("bhf,bhfe->bhe", q[:, t].float() * scale, state))
    return torch.stack(rows, 1).to(q.dtype)


def chunk_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None):
    assert g is None or g.shape == q.shape[:3]
    return recurrence(q, k, v, torch.zeros_like(q) if g is None else g.unsqueeze(-1), scale), None


def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None):
    assert g.shape == q.shape
    return recurrence(q, k, v, g, scale), None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, kernel in (("simple_gla", chunk_simple_gla), ("gla", chunk_gla)):
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, kernel.__name__, kernel)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr("tautomer.rewrite.kernel_attention.fused", lambda x: x.dtype is torch.float16)
    monkeypatch.setattr("tautomer.rewrite.kernel_attention.in_turn", lambda x: False)
    _fla.kernels.cache_clear()
    yield
    _fla.kernels.cache_clear()


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("normalized", [True, False])
def test_their_kernels_compute_the_same_sum(stand_in: None, channels: int, normalized: bool) -> None:
    q, k, v = torch.rand(2, 4, 9, 3), torch.rand(2, 2, 9, 3), torch.randn(2, 1, 9, 5)
    g = -torch.rand(4, 1, channels) if channels else None
    found = kernel_attention(*(x.half() for x in (q, k, v)), g, None, True, normalized)
    assert found.shape == (2, 4, 9, 5) and found.dtype is torch.float16
    wanted = kernel_attention(q.double(), k.repeat_interleave(2, 1).double(), v.double(), g, None, True, normalized)
    assert (found - wanted).abs().max() < 4e-3 * wanted.abs().max()


def test_nothing_is_looked_for_without_cuda() -> None:
    assert not _fla.fused(torch.ones(2, dtype=torch.float16)) and not _fla.fused(torch.ones(2))
