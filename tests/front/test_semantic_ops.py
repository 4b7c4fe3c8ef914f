"""Ops that ATen has no name for, raised from hand-written code: the same numbers from a folder, a file and a compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import tautomer

D = 8
X = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(0))


def quick_gelu(m: Model, x: Tensor) -> Tensor:
    y = m.up(x)
    return m.down(y * torch.sigmoid(1.702 * y))


def glu(m: Model, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def normalize(m: Model, x: Tensor) -> Tensor:
    q, k = (y / y.norm(dim=-1, keepdim=True).clamp_min(1e-12) for y in (m.gate(x), m.up(x)))
    return m.down((q @ k.mT * 3).softmax(-1) @ x)


def rotary(m: Model, x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * m.frequencies
    turn = torch.cat([angles, angles], -1)
    q, k = (y * turn.cos() + torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1) * turn.sin() for y in (m.gate(x), m.up(x)))
    return m.down((q @ k.mT).softmax(-1) @ x)


def interleaved(m: Model, x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * m.frequencies
    turn, y = angles.repeat_interleave(2, -1), m.up(x)
    return m.down(y * turn.cos() + torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2) * turn.sin())


class Model(nn.Module):
    """``function(model, x)`` over three linear layers and some frequencies."""

    frequencies: Tensor

    def __init__(self, function: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.gate, self.up, self.down = (nn.Linear(D, D) for _ in range(3))
        self.register_buffer("frequencies", 0.3 ** torch.arange(D // 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(self, x)


OPS = {"quick_gelu": quick_gelu, "glu": glu, "normalize": normalize, "rotary": rotary, "rotary, interleaved": interleaved}


def raised(name: str) -> tuple[nn.Module, nn.Module]:
    model = Model(OPS[name]).eval()
    fast = tautomer.optimize(model, (X,), target="onnxruntime")
    assert fast.report.after.ops[f"tautomer.{name.partition(',')[0]}"]  # type: ignore[union-attr,index]
    return model, fast


@pytest.mark.parametrize("name", OPS)
def test_a_folder_and_a_file_keep_the_numbers(name: str, tmp_path: Path) -> None:
    model, fast = raised(name)
    tautomer.save(fast, tmp_path / "folder")
    again = tautomer.load(tmp_path / "folder")
    for x in (X, X[:1, :3]):
        with torch.no_grad():
            assert torch.equal(again(x), fast(x))
            torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)
    for module in (fast, again):
        report = tautomer.export_onnx(module, tmp_path / "model.onnx", (X,), opset=23)
        assert report.error is not None and report.error <= 1e-5
        assert len(report.sizes) > 1


@pytest.mark.zoo
@pytest.mark.parametrize("name", OPS)
def test_our_ops_fuse_forward_and_backward(name: str) -> None:
    """As many kernels and library calls as for what was written by hand, or fewer; none of them ours."""
    model = Model(OPS[name])
    fast = tautomer.optimize(model, (X,), recipe="training", target="inductor")
    assert fast.report.after.ops[f"tautomer.{name.partition(',')[0]}"]
    counted, gradients = [], []
    for module in (model, fast):
        torch.compiler.reset()
        metrics.reset()
        compiled = torch.compile(module, fullgraph=True)

        def step(run: Any = compiled) -> Tensor:
            y = run(X)
            y.sin().sum().backward()
            return y  # type: ignore[no-any-return]

        y, code = run_and_get_code(step)
        assert len(code) == 2 and not any("tautomer" in part for part in code)
        counted.append((metrics.generated_kernel_count, sum(part.count("extern_kernels.") for part in code)))
        gradients.append([y.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
    assert counted[1][0] <= counted[0][0] and counted[1][1] <= counted[0][1], counted
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
