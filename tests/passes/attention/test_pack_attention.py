"""Heads stay where linear layers write and read them: no transposition and no reshape is left around an attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.backends.targets import resolve

aten, tautomer_ops = torch.ops.aten, torch.ops.tautomer


class Attention(nn.Module):
    """Attention as models write it, in its variants."""

    def __init__(self, heads: int = 4, key_heads: int = 4, width: int = 8, value_width: int = 8) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.q, self.k = nn.Linear(16, heads * width), nn.Linear(16, key_heads * width)
        self.v, self.o = nn.Linear(16, key_heads * value_width), nn.Linear(heads * value_width, 16)

    def split(self, x: Tensor, y: Tensor) -> list[Tensor]:
        counts = (self.heads, self.key_heads, self.key_heads)
        parts = zip((self.q(x), self.k(y), self.v(y)), counts, strict=True)
        return [part.unflatten(-1, (n, -1)).transpose(-3, -2) for part, n in parts]

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x, x if y is None else y)
        grouped, causal = self.heads != self.key_heads, y is None and mask is None
        attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return self.o(attended.transpose(-3, -2).flatten(-2))


class Spelled(Attention):
    """The same with view, permute and contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, self.heads, -1).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.o(attended.permute(0, 2, 1, 3).contiguous().view(batch, length, -1))


class Headwise(Attention):
    """A norm of each head behind the transposition, and values that are read elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.RMSNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(x, x)
        attended = F.scaled_dot_product_attention(self.norm(q), self.other(k), v)
        return self.o(attended.transpose(1, 2).flatten(2)), v


X, Y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)


class Rotated(Attention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.split(x, x)
        angle = torch.arange(x.shape[1])[:, None] * torch.ones(8) * 0.1
        q, k = (t * angle.cos() + torch.cat([-t[..., 4:], t[..., :4]], -1) * angle.sin() for t in (q, k))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


VARIANTS: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]] = {
    "causal": (Attention(), lambda x, y: (x,)),
    "cross": (Attention(), lambda x, y: (x, y)),
    "grouped": (Attention(key_heads=2), lambda x, y: (x,)),
    "one key head, wide values": (Attention(key_heads=1, value_width=12), lambda x, y: (x, y)),
    "spelled": (Spelled(), lambda x, y: (x,)),
    "no batch": (Attention(), lambda x, y: (x[0],)),
    "added mask": (Attention(), lambda x, y: (x, y, x[0, :, :1] * y[0, :, 0])),
    "boolean mask per batch": (Attention(), lambda x, y: (x, y, (x[:, :, :1] * y[:, None, :, 0] > -1)[:, None])),
    "padding": (Attention(), lambda x, y: (x, y, (y[:, :, 0] > -1)[:, None, None])),
    "rotary": (Rotated(), lambda x, y: (x,)),
}


class Variants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList(model for model, _ in VARIANTS.values())

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        calls = (inputs(x, y) for _, inputs in VARIANTS.values())
        return [model(*call) for model, call in zip(self.models, calls, strict=True)]


def test_nothing_but_the_attention_is_left_of_four_transpositions(tmp_path: Path) -> None:
    stock = tautomer.export_onnx(Spelled().eval(), tmp_path / "stock.onnx", (X,)).nodes
    assert stock["Attention"] == 1 and stock["Transpose"] == stock["Reshape"] == 4
    fast = tautomer.optimize(Spelled().eval(), (X,), target="onnxruntime")
    nodes = tautomer.export_onnx(fast, tmp_path / "m.onnx", (X,)).nodes
    assert nodes == {"MatMul": 4, "Add": 4, "Attention": 1}


@pytest.mark.zoo
def test_no_transposition_is_left_of_any_variant(tmp_path: Path) -> None:
    model, inputs, count = Variants().eval(), (X, Y), len(VARIANTS)
    stock = tautomer.export_onnx(model, tmp_path / "stock.onnx", inputs).nodes
    assert stock["Attention"] == count and stock["Transpose"] >= 4 * count and stock["Reshape"] >= 4 * count
    fast = tautomer.optimize(model, inputs, target="onnxruntime")
    report = tautomer.export_onnx(fast, tmp_path / "m.onnx", inputs)
    assert fast.report.fired("pack-attention") == report.nodes["Attention"] == count
    assert "Transpose" not in report.nodes
    assert report.nodes["Reshape"] <= 4  # around the rotary embeddings, which read heads apart
    assert report.error is not None and report.error <= 1e-5


def packed(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Any], str]:
    """The calls left of a model after the passes, and what was refused."""
    passes = ["move-transpose", "pack-attention", "merge-views"]
    fast = tautomer.optimize(model.eval(), inputs, passes=passes)
    calls = [node.target for node in fast.graph.nodes if node.op == "call_function"]
    return calls, "\n".join(refusal.reason for refusal in fast.report.log.refusals)


def test_a_norm_of_each_head_is_taken_where_the_heads_are() -> None:
    calls, _ = packed(Headwise(), (X,))
    assert calls.count(tautomer_ops.packed_attention.v1) == 1
    assert calls.count(aten.transpose.int) == 1  # of the values, which are returned as they were


class Apart(nn.Module):
    """Queries, keys and values come with their heads apart: the four axes stay."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def test_heads_that_come_apart_stay_apart() -> None:
    calls, _ = packed(Apart(), tuple(torch.randn(3, 2, 4, 5, 8).unbind()))
    assert calls == [aten.scaled_dot_product_attention.default]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v: (q, k[:1], v), "one batch of keys or values"),
        (lambda q, k, v: (q, k[:, :, :1], v), "1 heads of keys and 4 of values"),
        (lambda q, k, v: (q[None], k[None], v[None]), "queries of 5 axes"),
        (lambda q, k, v: (q, k[0], v), "have not the same axes"),
    ],
)
def test_it_is_refused(change, sentence) -> None:  # type: ignore[no-untyped-def]
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            heads = change(*(f(x).unflatten(-1, (4, 4)) for f in (torch.sin, torch.cos, torch.exp)))
            return F.scaled_dot_product_attention(*(y.transpose(-3, -2) for y in heads)).transpose(-3, -2).flatten(-2)

    calls, refused = packed(Model(), (X,))
    assert sentence in refused and tautomer_ops.packed_attention.v1 not in calls


@pytest.mark.parametrize("target", ["eager", "inductor", "onnxruntime-cuda"])
def test_targets_that_do_not_ask_keep_the_four_axes(target: str) -> None:
    program = tautomer.capture(Attention().eval(), (X,))
    for name in ("move-transpose", "pack-attention", "pack-cached-attention"):
        assert resolve(target).gain(name, program) is None
        gain = resolve("onnxruntime").gain(name, program)
        assert gain is not None and gain.pays


def test_dropout_is_left_alone() -> None:
    class Model(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            attended = F.scaled_dot_product_attention(*self.split(x, x), dropout_p=0.5)
            return self.o(attended.transpose(1, 2).flatten(2))

    calls, _ = packed(Model(), (X,))
    assert tautomer_ops.packed_attention.v1 not in calls
