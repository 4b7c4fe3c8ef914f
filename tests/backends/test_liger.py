"""A sum and its RMSNorm as Liger's kernel; a stand-in for the kernel runs on the CPU, with the kernel's own interface."""

from __future__ import annotations

import copy
import io
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.backends import liger
from tautomer.backends.liger import FORWARD
from tautomer.backends.targets import resolve
from tautomer.rewrite.capture import capture

PASSES = ("fuse-add-rms-norm",)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, width)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        total = x + r
        return total + self.linear(self.norm(total))


def example(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)


class Kernel:
    """``liger_kernel.ops.fused_add_rms_norm``, as far as it is called: the numbers of the kernel by plain torch."""

    _str_to_casting_mode: ClassVar = {"llama": 0, "gemma": 1, "none": -1}

    def __init__(self) -> None:
        self.calls: list[str] = []

    def fused_add_rms_norm_forward(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, mode: str
    ) -> Any:
        assert mode == "gemma" and offset == 0.0 and x.is_contiguous() and residual.is_contiguous()
        self.calls.append("forward")
        s = (x + residual).view(-1, x.shape[-1])
        r = torch.rsqrt(s.float().square().mean(-1) + eps)
        y = (s.float() * r[:, None] * weight.float()).to(x.dtype)
        return y.view(x.shape), s.view(x.shape), r, 16, 4, 2, 1

    def fused_add_rms_norm_backward(
        self, dy: Tensor, ds: Tensor, s: Tensor, weight: Tensor, r: Tensor, offset: float, mode: int, *settings: int,
        in_place: bool,
    ) -> Any:  # fmt: skip
        assert settings == (16, 4, 2) and mode == 1 and not in_place and dy.is_contiguous() and ds.is_contiguous()
        self.calls.append("backward")
        width, shape = s.shape[-1], s.shape
        dy, ds, s = (x.reshape(-1, width).float() for x in (dy, ds, s))
        m = dy * weight.float()
        dx = r[:, None] * m - r[:, None] ** 3 / width * (m * s).sum(-1, keepdim=True) * s + ds
        dg = (dy * s * r[:, None]).sum(0).to(weight.dtype)
        return dx.view(shape).to(weight.dtype), dx.view(shape).to(weight.dtype), dg


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    found = Kernel()
    monkeypatch.setattr(liger, "kernels", lambda: found)
    monkeypatch.setattr(liger, "DEVICES", ("cpu",))
    return found


def lowered(module: Any) -> int:
    return len(module.graph.find_nodes(op="call_function", target=FORWARD.overload))


def test_a_target_that_has_the_kernel_asks_for_it(kernel: Kernel) -> None:
    model, inputs = Block().eval(), example(2, 5, 8)
    fast = tautomer.optimize(model, inputs)
    assert fast.report.fired("fuse-add-rms-norm") == 1 and lowered(fast) == 1
    kernel.calls.clear()
    torch.testing.assert_close(fast(*inputs), model(*inputs))
    assert kernel.calls == ["forward"]


def test_without_the_kernel_nobody_asks() -> None:
    captured = capture(Block().eval(), example(2, 5, 8))
    assert resolve("eager").gain("fuse-add-rms-norm", captured) is None
    fast = tautomer.optimize(Block().eval(), example(2, 5, 8), passes=PASSES)
    assert fast.report.fired("fuse-add-rms-norm") == 1 and lowered(fast) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_composition(kernel: Kernel, dtype: torch.dtype) -> None:
    model = Block().to(dtype)
    inputs = tuple(x.requires_grad_() for x in example(2, 5, 8, dtype=dtype))
    fast = tautomer.optimize(model, inputs, passes=PASSES)
    kernel.calls.clear()
    mine = torch.autograd.grad(fast(*inputs).square().sum(), [*inputs, *fast.parameters()])
    assert kernel.calls == ["forward", "backward"]
    theirs = torch.autograd.grad(model(*inputs).square().sum(), [*inputs, *model.parameters()])
    torch.testing.assert_close(mine, theirs, **({} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: setattr(model.norm, "eps", None),
        lambda model: setattr(model, "norm", nn.RMSNorm(8, eps=1e-5, elementwise_affine=False)),
        lambda model: setattr(model, "norm", nn.RMSNorm((5, 8), eps=1e-5)),
    ],
)
def test_what_the_kernel_does_not_compute_stays_a_composition(kernel: Kernel, change: Any) -> None:
    model = Block()
    change(model)
    inputs = example(2, 5, 8, dtype=model.linear.weight.dtype)
    assert lowered(tautomer.optimize(model, inputs, passes=PASSES)) == 0 and kernel.calls == []


def test_a_row_wider_than_a_block_stays_a_composition(kernel: Kernel) -> None:
    assert liger.represents(torch.empty(1, liger.WIDEST), torch.empty(liger.WIDEST))
    assert not liger.represents(torch.empty(1, liger.WIDEST + 1), torch.empty(liger.WIDEST + 1))


def test_elsewhere_and_under_autocast_the_op_is_the_composition(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = Block(), example(2, 5, 8)
    fast = tautomer.optimize(model, inputs, passes=PASSES)
    kernel.calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = fast(*inputs), model(*inputs)
    assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype and kernel.calls == []
    monkeypatch.setattr(liger, "DEVICES", ("cuda",))
    inputs = tuple(x.double().requires_grad_() for x in inputs)
    mine, theirs = fast.double()(*inputs), model.double()(*inputs)
    assert torch.equal(mine, theirs) and kernel.calls == []
    for a, b in zip(torch.autograd.grad(mine.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_copies_pickles_compilers_and_exports_keep_it(kernel: Kernel) -> None:
    inputs = tuple(x.requires_grad_() for x in example(2, 5, 8))
    fast = tautomer.optimize(Block(), inputs, passes=PASSES)
    expected = torch.autograd.grad(fast(*inputs).sum(), inputs)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    exported = torch.export.export(fast, inputs).module()
    for again in (copy.deepcopy(fast), torch.load(file, weights_only=False), torch.compile(fast, backend="aot_eager"), exported):
        kernel.calls.clear()
        found = torch.autograd.grad(again(*inputs).sum(), inputs)
        assert kernel.calls == ["forward", "backward"]
        torch.testing.assert_close(found, expected)


def test_it_cannot_be_differentiated_twice(kernel: Kernel) -> None:
    inputs = tuple(x.requires_grad_() for x in example(2, 5, 8))
    fast = tautomer.optimize(Block(), inputs, passes=PASSES)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(fast(*inputs).sum(), inputs, create_graph=True)


def test_onnx_and_source_hold_the_op_and_not_the_kernel(kernel: Kernel, tmp_path: Any) -> None:
    inputs = example(2, 5, 8)
    fast = tautomer.optimize(Block().eval(), inputs, passes=PASSES)
    tautomer.export_onnx(fast, tmp_path / "model.onnx", inputs)
    tautomer.to_python(fast, tmp_path / "plain")
    assert "liger" not in (tmp_path / "plain" / "model.py").read_text()


def test_the_stand_in_is_what_torch_computes() -> None:
    (x, r), g, found = example(3, 8), torch.randn(8), Kernel()
    y, s, *_ = found.fused_add_rms_norm_forward(x, r, g, 1e-5, 0.0, "gemma")
    torch.testing.assert_close(y, F.rms_norm(x + r, (8,), g, 1e-5))
    assert torch.equal(s, x + r)
