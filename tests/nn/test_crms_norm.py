"""It is a LayerNorm of the vector whose last entry it does not store."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tautomer.nn import CRMSNorm
from tautomer.rewrite.errors import UsageError


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_it_is_the_norm_of_the_completed_vector(scale: float) -> None:
    x = torch.randn(4, 6, dtype=torch.float64) * scale
    x.requires_grad_()
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], -1)
    wanted = F.layer_norm(whole, (7,), eps=1e-5)[..., :-1]
    y = CRMSNorm(6)(x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(z, x, wanted.cos()) for z in (y, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_float16_does_not_overflow() -> None:
    y = CRMSNorm(64)(torch.full((2, 64), 3000.0, dtype=torch.float16))
    assert y.dtype is torch.float16 and y.isfinite().all()


def test_any_size_exports() -> None:
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(CRMSNorm(6), (torch.randn(2, 6),), dynamic_shapes=(batch,))
    x = torch.randn(5, 6)
    torch.testing.assert_close(program.module()(x), CRMSNorm(6)(x))


def test_wrong_width() -> None:
    with pytest.raises(UsageError, match="last axis"):
        CRMSNorm(6)(torch.randn(2, 7))
    with pytest.raises(UsageError, match="width=0"):
        CRMSNorm(0)
