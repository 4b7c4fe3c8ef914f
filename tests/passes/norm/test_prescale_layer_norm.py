"""In strict float16, sums included, scaled norms stay within 2e-3 where plain ones overflow; in float64 they are equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.norm.prescale_layer_norm import PrescaleLayerNorm, Scale
from tautomer.passes.norm.prescale_rms_norm import PrescaleRmsNorm
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.ops import Op, TorchOps

EPS, ROWS = 1e-5, 8
WIDTHS = (384, 767, 768, 4096, 8192)
BY: tuple[Scale, ...] = ("max", "mean")


class StrictHalf(TorchOps):
    """Every op in float16; sums are made of float16 sums, pairwise."""

    def apply(self, op: Op, *args: Any, **kwargs: Any) -> Tensor:
        if op.name in ("sum", "mean"):
            total = pairwise(args[0])
            return total if op.name == "sum" else total / args[0].shape[-1]
        result: Tensor = op.target(*args, **kwargs)
        assert result.dtype is torch.float16, op
        return result


def pairwise(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        x = x[..., 0::2] + x[..., 1::2]
    return x


def rows(n: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(ROWS, n, generator=generator, dtype=torch.float64)

    yield "N(0, 1)", normal(1.0)
    yield "N(0, 1e-3)", normal(1e-3)
    yield "N(0, 3e3)", normal(3e3).clamp(-6e4, 6e4)
    yield "constant", (1234.5 * torch.rand(ROWS, 1, generator=generator, dtype=torch.float64)).expand(-1, n)
    yield "one outlier", normal(1e-2).index_fill(1, torch.tensor([n // 3]), 6e4)
    yield "outlier first", normal(1e-2).index_fill(1, torch.tensor([0]), 6e4)
    yield "three outliers", normal(1.0).index_fill(1, torch.tensor([5, n // 2, n - 1]), 1e3)
    yield "a large mean", normal(1.0) + 2000
    yield "the largest number", torch.full((ROWS, n), 65504.0, dtype=torch.float64)
    yield "zeros", torch.zeros(ROWS, n, dtype=torch.float64)
    yield "below eps", normal(1e-6)


def error(y: Tensor, wanted: Tensor) -> float:
    return float((y.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("n", WIDTHS)
def test_in_strict_half_precision_the_error_is_small_everywhere(by: Scale, n: int) -> None:
    for name, row in rows(n):
        x = row.half()
        normed = PrescaleLayerNorm(by).after(StrictHalf(), x, [n], None, None, EPS)
        assert error(normed, F.layer_norm(x.double(), [n], eps=EPS)) <= 2e-3, name
        normed = PrescaleRmsNorm(by).after(StrictHalf(), x, [n], None, EPS)
        assert error(normed, F.rms_norm(x.double(), [n], eps=EPS)) <= 2e-3, name


def naive(op: StrictHalf, x: Tensor) -> Tensor:
    c = x - op.mean(x, [-1], True)
    return c * torch.rsqrt(op.mean(c * c, [-1], True) + EPS)


@pytest.mark.parametrize("name", ["N(0, 3e3)", "one outlier", "three outliers", "the largest number"])
def test_the_plain_norm_overflows_there(name: str) -> None:
    x = dict(rows(4096))[name].half()
    wrong = error(naive(StrictHalf(), x), F.layer_norm(x.double(), [4096], eps=EPS))
    assert not wrong <= 2e-3


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(UsageError, match="'max' or its 'mean'"):
        PrescaleLayerNorm("median")  # type: ignore[arg-type]


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def affine(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("by", BY)
def test_a_model_is_rewritten_exactly_and_exports(by: Scale, tmp_path: Path) -> None:
    for norm, rewrite in ((nn.LayerNorm(12), PrescaleLayerNorm(by)), (nn.RMSNorm(12, eps=1e-6), PrescaleRmsNorm(by))):
        model, x = Normed(affine(norm)).eval(), torch.randn(3, 4, 12)
        fast = tautomer.optimize(model, (x,), passes=[rewrite])
        assert fast.report.fired(rewrite.name) == 1
        assert fast.report.evidence.gradient is not None and fast.report.evidence.gradient <= 1e-10
        report = tautomer.export_onnx(fast, tmp_path / "model.onnx", (x,))
        assert report.error is not None and report.error <= 1e-5
        assert not {"LayerNormalization", "RMSNormalization"} & set(report.nodes)


@pytest.mark.parametrize("norm", [nn.LayerNorm((4, 12)), nn.RMSNorm((4, 12), eps=1e-6)], ids=["layer", "rms"])
def test_a_norm_over_several_axes_is_refused(norm: nn.Module) -> None:
    fast = tautomer.optimize(Normed(norm).eval(), (torch.randn(3, 4, 12),), passes=["prescale-layer-norm", "prescale-rms-norm"])
    assert not fast.report.applications
    assert "over the last axis alone" in fast.report.refusals[0].reason
