"""Every op as a person writes it, with the same bits; and what has no spelling by its full name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.backends.to_python import to_python
from tautomer.rewrite.capture import capture

Function = Callable[[Tensor, Tensor], Tensor]

SPELLED: dict[str, Function] = {
    "x + x": lambda x, i: x + x,
    "x * 2.5 - x": lambda x, i: x * 2.5 - x,
    "2 - x": lambda x, i: 2 - x,
    "(2 - x) / (x + 1.5)": lambda x, i: (2 - x) / (x + 1.5),
    "x - (x - (x - 1))": lambda x, i: x - (x - (x - 1)),
    "-x**2": lambda x, i: -(x**2),
    "(-x) ** 2": lambda x, i: (-x) ** 2,
    "x @ x.transpose(1, 2)": lambda x, i: x @ x.transpose(1, 2),
    "(x > 0) & (x <= 1)": lambda x, i: (x > 0) & (x <= 1),
    "~(x == 0)": lambda x, i: ~(x == 0),
    "x[:, 0]": lambda x, i: x[:, 0],
    "x[:, 1:3]": lambda x, i: x[:, 1:3],
    "x[..., ::2]": lambda x, i: x[..., ::2],
    "x[..., -1]": lambda x, i: x[..., -1],
    "x[:, ids]": lambda x, i: x[:, i],
    "x.unflatten(-1, (2, 4))": lambda x, i: x.reshape(x.shape[0], x.shape[1], 2, 4),
    "x.flatten(1)": lambda x, i: x.reshape(x.shape[0], -1),
    "x.unsqueeze(1).expand(-1, 2, -1, -1)": lambda x, i: x[:, None].expand(-1, 2, -1, -1),
    "x.permute(2, 0, 1)": lambda x, i: x.permute(2, 0, 1),
    "x.mean(-1, keepdim=True)": lambda x, i: x.mean(-1, keepdim=True),
    "x.sum((1, 2))": lambda x, i: x.sum((1, 2)),
    "x.var((-1,), unbiased=False)": lambda x, i: x.var(-1, unbiased=False),
    "x.to(torch.float64)": lambda x, i: x.to(torch.float64),
    "F.softmax(x, dim=-1)": lambda x, i: x.softmax(-1),
    "F.log_softmax(x, dim=1)": lambda x, i: F.log_softmax(x, 1),
    'F.gelu(x, approximate="tanh")': lambda x, i: F.gelu(x, approximate="tanh"),
    "F.relu6(x)": lambda x, i: F.relu6(x),
    "F.leaky_relu(x, 0.2)": lambda x, i: F.leaky_relu(x, 0.2),
    "F.hardtanh(x, -2, 2)": lambda x, i: F.hardtanh(x, -2, 2),
    "F.hardswish(x)": lambda x, i: F.hardswish(x),
    "F.elu(x)": lambda x, i: F.elu(x),
    "F.softplus(x)": lambda x, i: F.softplus(x),
    "F.layer_norm(x, (8,), eps=0.001)": lambda x, i: F.layer_norm(x, (8,), eps=1e-3),
    "F.rms_norm(x, (8,))": lambda x, i: F.rms_norm(x, (8,)),
    "F.instance_norm(x, use_input_stats=True, momentum=0.1, eps=1e-05)": lambda x, i: F.instance_norm(x),
    "F.max_pool1d(x, 2)": lambda x, i: F.max_pool1d(x, 2),
    "F.adaptive_avg_pool1d(x, 3)": lambda x, i: F.adaptive_avg_pool1d(x, 3),
    "F.avg_pool2d(x, 2, stride=1)": lambda x, i: F.avg_pool2d(x, 2, 1),
    "F.pad(x, (1, 2), value=0.5)": lambda x, i: F.pad(x, (1, 2), value=0.5),
    'mode="reflect"': lambda x, i: F.pad(x, (1, 2), mode="reflect"),
    "torch.cat((x, x), dim=-1)": lambda x, i: torch.cat((x, x), -1),
    "torch.stack((x, x))": lambda x, i: torch.stack((x, x)),
    'torch.einsum("btd,bsd->bts", x, x)': lambda x, i: torch.einsum("btd,bsd->bts", x, x),
    "torch.where(x > 0, x, 0.0)": lambda x, i: torch.where(x > 0, x, 0.0),
    '-float("inf")': lambda x, i: x.masked_fill(x > 0, -torch.inf),
    "torch.finfo(torch.float32).min": lambda x, i: x.masked_fill(x > 0, torch.finfo(torch.float32).min),
    "x.clamp(-1, 1)": lambda x, i: x.clamp(-1, 1),
    "x.cumsum(1)": lambda x, i: x.cumsum(1),
    "F.one_hot(": lambda x, i: F.one_hot(i, 5),
    "torch.linalg.vector_norm(": lambda x, i: torch.linalg.vector_norm(x, 2, -1),
    "x.tril()": lambda x, i: x.tril(),
    "x.repeat(1, 2, 1)": lambda x, i: x.repeat(1, 2, 1),
    "x.topk(2)[0]": lambda x, i: x.topk(2)[0],
    "x.roll((1,), (2,))": lambda x, i: x.roll(1, 2),
    "torch.arange(": lambda x, i: x + torch.arange(x.shape[1])[:, None],
    "device=x.device": lambda x, i: x + torch.arange(x.shape[1])[:, None],
    "length * 2": lambda x, i: x * (x.shape[1] * 2),
    ".baddbmm(x, x.mT)": lambda x, i: torch.zeros(1).baddbmm(x, x.mT),
    "torch.ops.aten.": lambda x, i: torch.nn.functional.interpolate(x, scale_factor=2.0),
}


class All(nn.Module):
    def __init__(self, functions: list[Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x, ids) for function in self.functions)


def test_spellings(tmp_path: Path) -> None:
    model = All(list(SPELLED.values()))
    call = torch.randn(3, 4, 8), torch.tensor([1, 0])
    to_python(capture(model, call), tmp_path / "spelled_ops", check=False)
    spec = importlib.util.spec_from_file_location("spelled_ops", tmp_path / "spelled_ops" / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = sys.modules["spelled_ops"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    text = (tmp_path / "spelled_ops" / "model.py").read_text()
    other = torch.randn(2, 6, 8), torch.tensor([2, 4, 0])
    for inputs in (call, other):
        found = package.load()(*inputs)
        for name, wanted, result in zip(SPELLED, model(*inputs), found, strict=True):
            assert wanted.dtype == result.dtype and torch.equal(wanted, result), name
    assert [name for name in SPELLED if name not in text] == []
    assert text.count("torch.ops.") == 1
